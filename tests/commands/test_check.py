"""`analyze.py check.reference=`: an attribution test for a release pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.commands.test_analyze import run

FEW = ("task=known", "task.size=3", "faithfulness=none")


def test_a_worse_analysis_exits_with_1_and_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "first", *FEW) == 0
    path = tmp_path / "first/summary.json"
    again = (f"check.reference={path}",)
    assert run(tmp_path / "same", *FEW, *again) == 0
    suite = ElementTree.parse(tmp_path / "same/junit.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "0")
    reference = json.loads(path.read_text())
    reference["evidence_first"] |= {"value": 2.0, "low": 1.8, "high": 2.2}
    path.write_text(json.dumps(reference))
    assert run(tmp_path / "worse", *FEW, *again, "target=token") == 1
    suite = ElementTree.parse(tmp_path / "worse/junit.xml").getroot()
    failures = {case.attrib["name"]: case.find("failure") for case in suite}
    assert failures["correct below 0.95 of the reference"] is None
    failed = failures["evidence_first below 0.9 of the reference, beyond the null band"]
    assert failed is not None
    assert "the reference has 2" in failed.attrib["message"]
    shown = capsys.readouterr().err
    assert "check failed: evidence_first below 0.9 of the reference" in shown
    assert "the reference has another target" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["check.reference=missing.json"], "missing.json is no summary.json"),
        (["check.reference=PATH", "check.alarms=[]"], "check.alarms is empty"),
        (["check.reference=PATH", "check.alarms=[loss above 1]"], "has no number 'loss'; it has prompts"),
        (["check.reference=PATH", "check.alarms=['prompts below 1, twice in a row']"], "a check has one run"),
    ],
)
def test_mistakes_are_found_before_the_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"prompts": 3}')
    assert run(tmp_path / "run", *FEW, *(override.replace("PATH", str(path)) for override in overrides)) == 1
    assert message in "".join(capsys.readouterr().err.split("\n"))
