"""The examples run, and show what they say they show."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_own_script_learns_and_leaves_its_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "own_script.py"))["main"](steps=60)
    said = capsys.readouterr().out
    rows = [
        line.split() for line in said.splitlines() if line[:4].strip().isdigit() and len(line.split()) == 3
    ]
    assert [int(step) for step, *_ in rows] == [0, 20, 40, 60]
    probabilities = [float(probability) for _, probability, _ in rows]
    assert probabilities[-1] > probabilities[0] + 0.2
    folder = tmp_path / "logs/own_script/version_0/depass/known"
    assert len(list(folder.glob("step-*.html"))) == 4
    assert str(folder.relative_to(tmp_path)) in said
