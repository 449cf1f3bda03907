"""`python analyze.py circuit=true`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from depass_lightning import Circuit
from tests.commands.test_analyze import run


def test_a_tasks_circuits_are_averaged_by_role(tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "circuit=true", "task.size=3") == 0
    mean = Circuit.load(tmp_path / "circuit.safetensors")
    assert mean.prompts == 3
    assert {"indirect object", "subject", "repetition", "end", "other"} == {
        node.label for node in mean.nodes if node.kind == "token"
    }
    assert mean.completeness < 1e-5
    circuits = [Circuit.load(path) for path in sorted((tmp_path / "circuits").iterdir())]
    assert len(circuits) == 3
    assert mean.value == pytest.approx(sum(circuit.value for circuit in circuits) / 3)
    assert json.loads((tmp_path / "summary.json").read_text())["prompts"] == 3
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "first.html").is_file()
    assert "layer 2 head 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["rule=softmax"], "add rule=half"), (["target=generation"], "a circuit explains one target")],
)
def test_what_has_no_circuit_is_refused(overrides: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "circuit=true", "task.size=2", *overrides) != 0
    assert message in capsys.readouterr().err
