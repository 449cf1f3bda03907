"""One run of all probe sets, shared among the ranks.

1. Every rank attributes its share, `range(rank, n, world)`, with the model itself rather than its distributed
   wrapper: a plain forward pass needs no other rank, so shares may be uneven or empty.
2. The shares are gathered once. Every rank then has every outcome: all of them compute the same numbers and
   keep the same history, and none waits for another.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.utilities import rank_zero_only

from depass_lightning.errors import DePassError
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.monitoring.results import Result, result_of
from depass_lightning.monitoring.runner import Failure, Outcome, ProbeRunner, gather

log = logging.getLogger(__name__)

SHOWN = 3  # failed probes that are named


@dataclass(frozen=True)
class ProbeMonitor:
    """Runs probe sets on all ranks, and measures each set under each source.

    Args:
        runner: attributes probes.
        sets: the probe sets by their names.
        sources: the names of the runner's sources.
        faithfulness: the number of probes of each set for which removal is measured.
        on_error: "log" reports a failing probe; "raise" raises an error.
    """

    runner: ProbeRunner
    sets: Mapping[str, Sequence[ProbePrompt]]
    sources: Sequence[str]
    faithfulness: int
    on_error: Literal["log", "raise"]

    def run(
        self, histories: dict[str, History], step: int, rank: int, world_size: int, *, record: bool
    ) -> list[Result]:
        """Run every set, on all ranks together.

        Args:
            histories: the runs so far, by the results' names.
            step: the optimiser step.
            rank: this process's rank.
            world_size: the number of processes.
            record: append the run to the histories.

        Returns:
            A result for each set and source, the same on every rank.

        Raises:
            DePassError: a probe failed, where `on_error` is "raise".
        """
        shares = gather({name: self._share(probes, rank, world_size) for name, probes in self.sets.items()})
        results = []
        for name, probes in self.sets.items():
            outcomes = {i: outcome for share in shares for i, outcome in share[name].items()}
            self._report(name, step, outcomes)
            for index, source in enumerate(self.sources):
                key = name if len(self.sources) == 1 else f"{name}/{source}"
                history = histories.get(key, History())
                result = result_of(key, step, probes, outcomes, index, history)
                if record:
                    history.add(step, result.metrics, result.scored)
                    histories[key] = history
                results.append(result)
        return results

    def _share(self, probes: Sequence[ProbePrompt], rank: int, world_size: int) -> dict[int, Outcome]:
        """Attribute this rank's probes of a set, and return the outcomes by the probes' indices."""
        indices = range(rank, len(probes), world_size)
        removal = len(range(rank, min(self.faithfulness, len(probes)), world_size))
        outcomes = self.runner.outcomes([probes[i] for i in indices], removal)
        return dict(zip(indices, outcomes, strict=True))

    def _report(self, name: str, step: int, outcomes: Mapping[int, Outcome]) -> None:
        """Report the probes that failed, grouped by reason; or raise for the first reason."""
        failures: dict[str, list[str]] = {}
        for i, outcome in sorted(outcomes.items()):
            if isinstance(outcome, Failure):
                failures.setdefault(outcome.reason, []).append(repr(self.sets[name][i].id))
        for reason, probes in failures.items():
            more = f" and {len(probes) - SHOWN} more" if len(probes) > SHOWN else ""
            some = ", ".join(probes[:SHOWN]) + more
            message = f"probe{'s' * (len(probes) > 1)} {some} of {name!r} failed at step {step}: {reason}"
            if self.on_error == "raise":
                raise DePassError(message)
            rank_zero_only(log.warning)(message)
