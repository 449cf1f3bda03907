"""`python analyze.py check.reference=...`: fail if an analysis is worse than an earlier one.

Each alarm is one test case: its scalar is a number in `summary.json`, the reference is the same number of the
earlier run, and the null band is the reference's confidence interval.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement

from omegaconf import DictConfig

from depass_lightning.commands.outputs import number_of
from depass_lightning.commands.shell import print_stderr
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.alarms import Alarm
from depass_lightning.utils.atomic_files import whole_file

REPORT = "junit.xml"
COMPARED = ("task", "source", "method", "rule", "target")  # settings that should be the same in both


@dataclass(frozen=True)
class Check:
    """The alarms of a check and the summary that they compare with.

    Attributes:
        alarms: the alarms.
        reference: the earlier run's `summary.json`.
    """

    alarms: list[Alarm]
    reference: Mapping[str, Any]

    @classmethod
    def of(cls, config: DictConfig) -> "Check | None":
        """Read the configured check, before the analysis begins; None without a reference.

        Raises:
            DePassError: the reference cannot be read, or an alarm needs what a summary does not have.
        """
        if config.check.reference is None:
            return None
        path = Path(config.check.reference)
        try:
            reference = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = f"check.reference: {path} is no summary.json of an analysis: {error}"
            raise DePassError(reason) from error
        if not isinstance(reference, dict) or "prompts" not in reference:
            raise DePassError(f"check.reference: {path} is no summary.json of an analysis")
        alarms = [Alarm.parse(condition) for condition in config.check.alarms]
        if not alarms:
            raise DePassError("check.alarms is empty; give at least one, as in 'correct below 0.95'")
        for alarm in alarms:
            if alarm.runs > 1 or alarm.probes is not None:
                raise DePassError(f"check.alarms: {alarm.condition!r} is for training; a check has one run")
            if number_of(reference.get(alarm.scalar)) is None:
                known = ", ".join(name for name in reference if number_of(reference.get(name)) is not None)
                raise DePassError(f"check.alarms: {path} has no number {alarm.scalar!r}; it has {known}")
        return cls(alarms, reference)

    def run(self, summary: Mapping[str, Any], folder: Path) -> int:
        """Test a finished analysis, write `junit.xml`, and return the exit code: 1 if a test failed."""
        for name in COMPARED:
            if summary.get(name) != self.reference.get(name):
                print_stderr(f"check: the reference has another {name}: {self.reference.get(name)}", "yellow")
        failures = {alarm.condition: self._failure(alarm, summary) for alarm in self.alarms}
        failed = sum(failure is not None for failure in failures.values())
        suite = Element("testsuite", name="depass", tests=str(len(failures)), failures=str(failed))
        for condition, failure in failures.items():
            case = SubElement(suite, "testcase", classname="depass.check", name=condition)
            if failure is not None:
                SubElement(case, "failure", message=failure)
                print_stderr(f"check failed: {failure}", "red")
        with whole_file(folder / REPORT) as path:
            ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
        return int(failed > 0)

    def _failure(self, alarm: Alarm, summary: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a number, or None."""
        reference, value = number_of(self.reference.get(alarm.scalar)), number_of(summary.get(alarm.scalar))
        assert reference is not None
        if value is None:
            return f"{alarm.condition}: the analysis has no number {alarm.scalar!r}"
        entry = self.reference[alarm.scalar]
        band = (entry["low"], entry["high"]) if isinstance(entry, Mapping) and "low" in entry else None
        if not alarm.holds(value, reference, band):
            return None
        return f"{alarm.condition}: {value:.4g}, the reference has {reference:.4g}"
