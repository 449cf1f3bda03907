"""Every benchmark that needs no GPU runs, on a model of a few numbers."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks import callback, engine, linear, neurons, sweep

SMALL = {"HIDDEN": 24, "NEURONS": 32, "LAYERS": 2, "HEADS": 2}
ARGUMENTS = {
    engine: ["--tokens", "5", "6", "--repeats", "1", "--no-memory"],
    linear: ["--heads", "5", "--adjoint", "5", "6", "--repeats", "1"],
    neurons: ["--tokens", "5", "6", "--layers", "0", "--top", "2", "--repeats", "1", "--no-memory"],
}


@pytest.mark.parametrize("benchmark", ARGUMENTS, ids=lambda module: module.__name__)
def test_each_row_is_printed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SMALL.items():
        for module in (engine, benchmark):
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmark", *ARGUMENTS[benchmark]])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    for tokens in ("5", "6"):
        assert any(line.startswith(f"| {tokens} |") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "arguments"),
    [
        (callback, ["--steps", "2", "--every", "1", "--batch-size", "2", "--repeats", "1"]),
        (sweep, ["--prompts", "20", "--tokens", "6"]),
    ],
    ids=["callback", "sweep"],
)
def test_trainings_and_sweeps_run(
    benchmark: Any,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    benchmark.main()
    assert capsys.readouterr().out.count("\n") > 5
