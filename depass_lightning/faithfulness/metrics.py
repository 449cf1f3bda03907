"""Means over the rows of many prompts, with bootstrap intervals, as torchmetrics.

Each metric reads one column of rows as `AttributionModule` makes them; rows without the column do not count.
`MetricCollection` combines several (with `compute_groups=False`: columns may differ where first rows agree).
Prompts are sorted by their value before they are resampled, so that neither their order nor the number of
processes changes an interval.
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
        low: the lower bound of the bootstrap 95% CI.
        high: its upper bound.
        highest: the largest value of a prompt.
        prompts: the number of prompts that have the column.
    """

    value: float
    low: float
    high: float
    highest: float
    prompts: int


class CurvesMean(NamedTuple):
    """A curve's mean over prompts.

    Attributes:
        percents: the percentages of the points.
        mean: the mean at each point.
        area: the area under the curve, as a mean height; None for a single point.
        points: the mean at each point with its interval; empty where intervals were not requested.
        prompts: the number of prompts that have the curve.
    """

    percents: list[float]
    mean: list[float]
    area: PromptsMean | None
    points: list[PromptsMean]
    prompts: int


class _OfRows(Metric):
    """A metric that keeps every prompt's numbers, and can be computed without any."""

    full_state_update = False
    values: list[Tensor]

    def __init__(self, column: str, *, draws: int = 1000, **options: Any) -> None:
        super().__init__(**options)
        self.column = column
        self.draws = draws
        self.set_dtype(torch.float64)  # also on a process without rows
        # Flat, because processes gather tensors of one dimension only.
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, rows: Rows) -> None:
        """Add some prompts' rows."""
        known = [row[self.column] for row in rows if row.get(self.column) is not None]
        if known:
            self.values.append(torch.tensor(known, dtype=torch.float64, device=self.device).flatten())

    def kept(self) -> Tensor:
        """Return all prompts' numbers, concatenated."""
        if isinstance(self.values, list) and not self.values:
            return torch.empty(0, dtype=torch.float64)
        return dim_zero_cat(self.values).cpu()

    def mean(self, values: list[float]) -> PromptsMean:
        """Return the mean of values, in any order, with its interval."""
        values = sorted(values)
        interval = bootstrap(values, draws=self.draws)
        return PromptsMean(interval.value, interval.low, interval.high, values[-1], len(values))


class PromptMean(_OfRows):
    """The mean of a number over prompts.

    Args:
        column: the number's column.
        draws: the number of bootstrap samples.
        options: further arguments of `torchmetrics.Metric`.
    """

    def compute(self) -> PromptsMean | None:
        """Return the mean, or None where no prompt has the column."""
        values = self.kept().tolist()
        return self.mean(values) if values else None


class CurveMean(_OfRows):
    """The mean of a curve over prompts, and of the area under it.

    Args:
        column: the curve's column.
        percents: the percentages of its points.
        points: also compute an interval at every point.
        draws: the number of bootstrap samples.
        options: further arguments of `torchmetrics.Metric`.

    Raises:
        DePassError: the percentages do not rise.
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
        curves = self.kept().view(-1, len(self.percents))  # [prompt, point]
        if not len(curves):
            return None
        several = len(self.percents) > 1
        return CurvesMean(
            percents=self.percents,
            mean=curves.mean(0).tolist(),
            area=self.mean([area(self.percents, curve) for curve in curves.tolist()]) if several else None,
            points=[self.mean(values) for values in curves.T.tolist()] if self.points else [],
            prompts=len(curves),
        )
