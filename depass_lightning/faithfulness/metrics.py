"""Means over the rows of many prompts, with their intervals, as torchmetrics that several processes share.

Each takes rows as `AttributionModule` makes them and reads one column; rows that do not know it do not count.
`MetricCollection` puts several together (with `compute_groups=False`: columns differ where first rows agree).
Prompts are sorted by their value before they are drawn for an interval, so that neither their order nor the
number of processes changes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from depass_lightning.faithfulness.token_removal import area, check_percents
from depass_lightning.utils.bootstrap import bootstrap

Rows = Iterable[Mapping[str, Any]]


class PromptsMean(NamedTuple):
    """A number's mean over prompts.

    Attributes:
        value: the mean.
        low: the lower bound of 95% of the means over prompts drawn anew.
        high: their upper bound.
        highest: the largest value of a prompt.
        prompts: how many prompts know the number.
    """

    value: float
    low: float
    high: float
    highest: float
    prompts: int


class CurvesMean(NamedTuple):
    """A curve's mean over prompts.

    Attributes:
        percents: each K.
        mean: the mean at each K.
        area: of the area under the curve, as a mean height; None of a single point.
        points: the mean at each K with its bounds; empty where these were not asked for.
        prompts: how many prompts have the curve.
    """

    percents: list[float]
    mean: list[float]
    area: PromptsMean | None
    points: list[PromptsMean]
    prompts: int


class _OfRows(Metric):
    """A metric that keeps numbers of each prompt, and can be computed where no prompt had any.

    Args:
        column: what it reads of a row.
        draws: how many times prompts are drawn for an interval.
        options: as for `torchmetrics.Metric`.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self, column: str, *, draws: int = 1000, **options: Any) -> None:
        super().__init__(**options)
        self.column = column
        self.draws = draws
        self.set_dtype(torch.float64)  # also of what a process without rows brings
        # One number behind the other: processes gather tensors of one dimension only.
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, rows: Rows) -> None:
        """Take some prompts' rows.

        Args:
            rows: rows of `depass_lightning.storage.ATTRIBUTION_SCHEMA`.
        """
        known = [row[self.column] for row in rows if row.get(self.column) is not None]
        if known:
            self.values.append(torch.tensor(known, dtype=torch.float64, device=self.device).flatten())

    def kept(self) -> Tensor:
        """Return all numbers, one prompt's behind the other's."""
        if isinstance(self.values, list) and not self.values:
            return torch.empty(0, dtype=torch.float64)
        return dim_zero_cat(self.values).cpu()

    def mean(self, values: list[float]) -> PromptsMean:
        """Return the mean of values with its bounds, whatever their order."""
        values = sorted(values)
        interval = bootstrap(values, draws=self.draws)
        return PromptsMean(interval.value, interval.low, interval.high, values[-1], len(values))


class PromptMean(_OfRows):
    """The mean of a number over prompts.

    Args:
        column: the number's column.
        draws: how many times prompts are drawn for the interval.
        options: as for `torchmetrics.Metric`.
    """

    def compute(self) -> PromptsMean | None:
        """Return the mean, or None where no prompt knows the number."""
        values = self.kept().tolist()
        return self.mean(values) if values else None


class CurveMean(_OfRows):
    """The mean of a curve over prompts, and of the area under it.

    Args:
        column: the curve's column.
        percents: its K.
        points: give bounds at every K too.
        draws: how many times prompts are drawn for an interval.
        options: as for `torchmetrics.Metric`.

    Raises:
        DePassError: the K do not rise.
    """

    def __init__(
        self,
        column: str,
        percents: Sequence[float],
        *,
        points: bool = False,
        draws: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(column, draws=draws, **options)
        check_percents(percents)
        self.percents = [float(percent) for percent in percents]
        self.points = points

    def compute(self) -> CurvesMean | None:
        """Return the mean curve, or None where no prompt has one."""
        curves = self.kept().view(-1, len(self.percents))
        if not len(curves):
            return None
        several = len(self.percents) > 1
        return CurvesMean(
            percents=self.percents,
            mean=curves.mean(0).tolist(),
            area=self.mean([area(self.percents, own) for own in curves.tolist()]) if several else None,
            points=[self.mean(own) for own in curves.T.tolist()] if self.points else [],
            prompts=len(curves),
        )
