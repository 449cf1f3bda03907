"""Alarms: conditions on scalars, such as "on_target below 0.8 of the reference, twice in a row".

A condition is a scalar, `above` or `below`, and a number, which `of the reference` makes a ratio to the first
run's value. `twice in a row` or `3 times in a row`, and `beyond the null band` may follow, after commas.
"""

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from depass_lightning.errors import DePassError
from depass_lightning.monitoring.history import Band
from depass_lightning.monitoring.results import Result
from depass_lightning.utils.distributed import place, sharing

log = logging.getLogger(__name__)

CONDITION = re.compile(
    r"(?:(?P<probes>\S+)/)?(?P<scalar>\w+) (?P<side>above|below) (?P<threshold>\S+)"
    r"(?P<relative> of the reference)?"
)
IN_A_ROW = re.compile(r"(?P<count>twice|\d+ times) in a row")
BEYOND = "beyond the null band"
EXAMPLE = "'on_target below 0.8 of the reference, twice in a row, beyond the null band'"


@dataclass(frozen=True)
class AlarmEvent:
    """An alarm that a run has raised.

    Attributes:
        condition: the alarm's condition.
        name: the probe set, or the set and source where there are several sources.
        step: the optimiser step.
        value: the scalar's value.
        limit: the limit that it has crossed.
    """

    condition: str
    name: str
    step: int
    value: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.name!r}: {self.condition}: {self.value:.4g} at step {self.step}, limit {self.limit:.4g}"
        )


AlarmAction = Literal["log", "stop"] | Callable[[AlarmEvent], Any]
Alarms = str | Sequence[str] | Mapping[str, AlarmAction]


@dataclass(frozen=True)
class Alarm:
    """A condition on a scalar, and what happens when it begins to hold.

    Attributes:
        condition: the condition in words.
        scalar: the scalar's name.
        above: whether the scalar must be above the limit; otherwise below it.
        threshold: the limit, or its ratio to the reference.
        relative: whether the threshold is a ratio.
        beyond: whether the scalar must also be outside of the null band.
        runs: the number of consecutive runs in which the condition must hold.
        probes: the probe set; None for all.
        action: "log" reports the event, "stop" also ends training, a function is called with the event.
    """

    condition: str
    scalar: str
    above: bool
    threshold: float
    relative: bool = False
    beyond: bool = False
    runs: int = 1
    probes: str | None = None
    action: AlarmAction = "log"

    @classmethod
    def parse(cls, condition: str, action: AlarmAction = "log") -> "Alarm":
        """Parse a condition.

        Args:
            condition: the condition in words.
            action: what happens when it begins to hold.

        Raises:
            DePassError: the words are not a condition, or there is no such action.
        """
        if action not in ("log", "stop") and not callable(action):
            raise DePassError(f"the action of an alarm is 'log', 'stop' or a function, not {action!r}")
        first, *rest = (part.strip() for part in str(condition).split(","))
        match, runs = CONDITION.fullmatch(first), 1
        try:
            threshold = float(match["threshold"]) if match else math.nan
        except ValueError:
            threshold = math.nan
        for part in rest:
            if row := IN_A_ROW.fullmatch(part):
                runs = 2 if row["count"] == "twice" else int(row["count"].split()[0])
            elif part != BEYOND:
                match = None
        if match is None or not math.isfinite(threshold) or runs < 1:
            raise DePassError(f"{condition!r} is no condition of an alarm; write it as in {EXAMPLE}")
        return cls(
            condition,
            match["scalar"],
            match["side"] == "above",
            threshold,
            relative=match["relative"] is not None,
            beyond=BEYOND in rest,
            runs=runs,
            probes=match["probes"],
            action=action,
        )

    def limit(self, reference: float) -> float:
        """Return the limit that the scalar must cross.

        Args:
            reference: the reference's value; a ratio to a negative value is one to its magnitude.
        """
        return reference + (self.threshold - 1) * abs(reference) if self.relative else self.threshold

    def holds(self, value: float, reference: float, band: Band | None = None) -> bool:
        """Return whether the condition holds in one run; it never holds for NaN.

        Args:
            value: the scalar's value.
            reference: the reference's value.
            band: the null band.
        """
        limit = self.limit(reference)
        low, high = band if self.beyond and band else (limit, limit)
        return value > max(limit, high) if self.above else value < min(limit, low)

    def event(
        self, name: str, steps: Sequence[int], curve: Sequence[float], bands: Sequence[Band | None]
    ) -> AlarmEvent | None:
        """Return the event if the condition begins to hold in the last run.

        Args:
            name: the name of the curve's probe set.
            steps: the steps of all runs.
            curve: the scalar at each.
            bands: the null band at each.
        """
        reference = next((value for value in curve if math.isfinite(value)), math.nan)
        holding = [self.holds(value, reference, band) for value, band in zip(curve, bands, strict=True)]
        now, before = holding[-self.runs :], holding[-self.runs - 1 : -1]
        if len(now) < self.runs or not all(now) or (len(before) == self.runs and all(before)):
            return None
        return AlarmEvent(self.condition, name, steps[-1], curve[-1], self.limit(reference))


def name_alarms(
    alarms: Alarms, scalars: Collection[str], probes: Collection[str], control: str | None
) -> list[Alarm]:
    """Return the alarms for conditions in words.

    Args:
        alarms: conditions; a mapping has an action for each.
        scalars: the names of the scalars.
        probes: the names of the probe sets.
        control: the probe set whose changes give the null bands.

    Raises:
        DePassError: a condition cannot be parsed, names a set or scalar that does not exist, or needs a null
            band without a control, or there is no such control.
    """
    if control is not None and (control not in probes or len(probes) == 1):
        known = ", ".join(probes)
        raise DePassError(f"control is {control!r}; it must be one of several probe sets; there are {known}")
    if isinstance(alarms, str):
        alarms = [alarms]
    actions: dict[str, AlarmAction] = (
        dict(alarms) if isinstance(alarms, Mapping) else dict.fromkeys(alarms, "log")
    )
    parsed = [Alarm.parse(condition, action) for condition, action in actions.items()]
    for alarm in parsed:
        for name, kind, known in ((alarm.scalar, "scalar", scalars), (alarm.probes, "set", probes)):
            if name is not None and name not in known:
                raise DePassError(
                    f"the alarm {alarm.condition!r} reads the {kind} {name!r}; there are {', '.join(known)}"
                )
        if alarm.beyond and control is None:
            raise DePassError(
                f"the alarm {alarm.condition!r} needs a null band; name the probe set whose prompts should "
                "not change: control='...'"
            )
    return parsed


def raise_alarms(
    alarms: Sequence[Alarm], results: Sequence[Result], control: str | None
) -> list[tuple[Alarm, AlarmEvent]]:
    """Return the alarms that a run has raised; the first rank also logs them and calls their functions.

    Args:
        alarms: the alarms.
        results: the results of the run, which their histories include.
        control: the probe set that gives the null bands.
    """
    raised = []
    for alarm, result in product(alarms, results):
        history, probes = result.history, result.name.split("/")[0]
        curve = history.curves.get(alarm.scalar)
        if curve is None or alarm.probes not in (None, probes) or (alarm.beyond and probes == control):
            continue
        bands = history.bands.get(alarm.scalar, [None] * len(curve))
        event = alarm.event(result.name, history.steps, curve, bands)
        if event is not None:
            raised.append((alarm, event))
    with sharing():
        rank, _ = place()
    for alarm, event in raised if rank == 0 else ():
        log.warning("alarm of %s", event)
        if callable(alarm.action):
            alarm.action(event)
    return raised
