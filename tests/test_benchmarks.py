"""Every benchmark that needs no GPU runs, on a model of a few numbers."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks import callback, circuits, engine, linear, neurons, refine, sweep

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


@pytest.mark.filterwarnings("ignore:the model's tokenizer does not know 'then'")
@pytest.mark.parametrize(
    ("benchmark", "arguments", "rows"),
    [
        (circuits, ["tiny", "--repeats", "1"], ("operations", "processor time")),
        (refine, ["tiny", "--tokens", "40", "60", "--refine", "16"], ("   40 tokens", "   60 tokens")),
    ],
    ids=["circuits", "refine"],
)
def test_the_bundled_models_rows_are_printed(
    benchmark: Any,
    arguments: list[str],
    rows: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(row) for line in lines) for row in rows)


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
