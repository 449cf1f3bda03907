"""One rank's share of the probes: attributed in batches, failures kept apart, and nothing else touched."""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from depass_lightning.attribution import Attribution
from depass_lightning.callbacks.probes import Probe
from depass_lightning.depass import DePass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a probe has no attribution."""

    reason: str


Outcome = Attribution | Failure


@dataclass
class Prober:
    """Attributes probes so that one that fails costs no other its result.

    Attributes:
        depass: the model.
        device: where it is.
        options: what every call of `attribute` is given: the source and the rule.
        batch_size: probes in one pass. It is halved for good where memory runs out.
    """

    depass: DePass
    device: torch.device
    options: Mapping[str, Any]
    batch_size: int

    def outcomes(self, probes: Sequence[Probe]) -> list[Outcome]:
        """Return an attribution, or why there is none, for each probe in order."""
        done: list[Outcome] = []
        while len(done) < len(probes):
            batch = probes[len(done) : len(done) + self.batch_size]
            done += self._halving(batch)
        return done

    def _halving(self, probes: Sequence[Probe]) -> list[Outcome]:
        """Attribute a batch; where it fails, its halves, until the probe that is to blame stands alone."""
        try:
            prompts, targets = [probe.prompt for probe in probes], [probe.target for probe in probes]
            found = self.depass.attribute(prompts, target=targets, batch_size=len(probes), **self.options)
            return [_checked(attribution) for attribution in found]
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
        return self._halving(probes[:middle]) + self._halving(probes[middle:])


def gather(share: Any) -> list[Any]:
    """Return every rank's share, on every rank; alone, one's own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [share]
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, share)
    return shares


@contextmanager
def untouched(device: torch.device | None = None) -> Iterator[None]:
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


def _checked(attribution: Attribution) -> Outcome:
    finite = math.isfinite(attribution.value) and bool(attribution.scores.isfinite().all())
    return attribution if finite else Failure("its value or its scores are not finite")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
