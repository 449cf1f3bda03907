"""One rank's share of the probes: attributed in batches, failures kept apart, and nothing else touched."""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed

from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.faithfulness import Case, Columns, TokenRemoval, evaluate
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.results.attribution import Attribution
from depass_lightning.sources import Source

log = logging.getLogger(__name__)

REMOVED = (0, 20, 40, 60, 80, 100)  # percent: coarse, because it is measured again and again
ORDERS = 2  # random ones a probe


@dataclass(frozen=True)
class Failure:
    """Why a probe has no attribution."""

    reason: str


@dataclass(frozen=True)
class Finding:
    """What a probe came to.

    Attributes:
        attributions: one a source.
        curves: for each source what removal does to the answer; empty where it was not measured.
    """

    attributions: list[Attribution]
    curves: list[Columns]


Outcome = Finding | Failure


@dataclass
class ProbeRunner:
    """Attributes probes so that one that fails costs no other its result.

    Attributes:
        depass: the model.
        device: where it is.
        sources: what states are split into; all share one recorded pass, and a linear rule's backward pass.
        batch_size: probes in one pass. It is halved for good where memory runs out.
        settings: what else every call of `attribute` is given: the rule and the like.
    """

    depass: DePass
    device: torch.device
    sources: Sequence[Source]
    batch_size: int
    settings: RuleOptions = field(default_factory=RuleOptions)

    def outcomes(self, probes: Sequence[ProbePrompt], removal: int = 0) -> list[Outcome]:
        """Return what each probe came to, in order.

        Args:
            probes: all as text, or all as ids.
            removal: for how many of them, from the first, tokens are removed as well.
        """
        done: list[Outcome] = []
        while len(done) < len(probes):
            batch = probes[len(done) : len(done) + self.batch_size]
            done += self._halving(batch, max(0, removal - len(done)))
        return done

    def _halving(self, probes: Sequence[ProbePrompt], removal: int) -> list[Outcome]:
        """Attribute a batch; where it fails, its halves, until the probe that is to blame stands alone."""
        try:
            return self._outcomes(probes, removal)
        except torch.OutOfMemoryError as error:
            reason, short = _reason(error), True
        except Exception as error:
            log.debug("attributing %d probes failed", len(probes), exc_info=True)
            reason, short = _reason(error), False
        # outside of the handlers: there the error's traceback would keep the failed pass's memory
        if len(probes) == 1:
            return [Failure(reason)]
        middle = len(probes) // 2
        if short:
            self.batch_size = min(self.batch_size, middle)
            log.warning("memory ran out on %d probes; there are %d in a pass now", len(probes), middle)
        return self._halving(probes[:middle], removal) + self._halving(
            probes[middle:], max(0, removal - middle)
        )

    def _outcomes(self, probes: Sequence[ProbePrompt], removal: int) -> list[Outcome]:
        found = self.depass.attribute_sources(
            **_asked(probes),
            target=[probe.target for probe in probes],
            sources=self.sources,
            batch_size=len(probes),
            **self.settings,
        )
        outcomes = [_checked(attributions) for attributions in found]
        sample = [own for own in outcomes[:removal] if isinstance(own, Finding)]
        self._remove([(own, i) for own in sample for i in range(len(self.sources))])
        return outcomes

    def _remove(self, places: Sequence[tuple[Finding, int]]) -> None:
        """Measure what removal does, where components stand for text and the target is a token."""
        removal = TokenRemoval(
            percents=REMOVED,
            draws=ORDERS,
            batch_size=8 * self.batch_size,  # plain passes: no components to hold
            rationales=(),
        )
        curves = evaluate([Case(finding.attributions[i]) for finding, i in places], [removal], self.depass)
        for (finding, i), columns in zip(places, curves, strict=True):
            finding.curves[i] = columns


def gather(share: Any) -> list[Any]:
    """Return every rank's share, on every rank; alone, one's own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [share]
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, share)
    return shares


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Leave the random states as they are, and shut out the trainer's autocast and inference mode.

    Args:
        device: where the model is; a CUDA device's random state is kept, too.
    """
    kind = "cpu" if device is None else device.type
    python, numpy = random.getstate(), np.random.get_state()
    on_gpu = [device] if device is not None and kind == "cuda" else []
    try:
        with (
            torch.random.fork_rng(on_gpu),
            torch.inference_mode(False),
            torch.no_grad(),  # inside, because leaving inference mode turns gradients on
            torch.autocast(kind, enabled=False),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _asked(probes: Sequence[ProbePrompt]) -> dict[str, Any]:
    """Return the probes as the prompts of a call: as text, or as ids padded on the right."""
    rows = [probe.ids for probe in probes if probe.ids is not None]
    if not rows:
        return {"prompt": [probe.prompt for probe in probes]}
    longest = max(map(len, rows))
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"prompt": None, "input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def _checked(attributions: list[Attribution]) -> Outcome:
    for own in attributions:
        if not (math.isfinite(own.value) and bool(own.scores.isfinite().all())):
            return Failure("its value or its scores are not finite")
    return Finding(attributions, [{} for _ in attributions])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
