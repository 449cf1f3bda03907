"""What a command answers without running anything, it answers without importing the libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import depass_lightning
from tests.conftest import ROOT

HEAVY = (
    "torch",
    "transformers",
    "lightning",
    "sklearn",
    "matplotlib",
    "datasets",
    "captum",
    "wandb",
    "pandas",
)
CODE = f"""
import sys
import depass_lightning
from depass_lightning.commands import main
from omegaconf import OmegaConf
print("resolver", OmegaConf.has_resolver("hydra_folder"), file=sys.stderr)  # before a run's folder is made
for command, argument in ((main.analyze, "--help"), (main.train, "--help"), (main.analyze, "ruel=max"),
                          (main.analyze, "model=tinny"), (main.analyze, "prompt= ")):
    sys.argv = ["analyze.py", argument]
    try:
        command()
    except SystemExit as ended:
        print("exit", ended.code, file=sys.stderr)
print("imported", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def test_help_and_mistakes_import_no_library(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "imported []" in ended.stderr, ended.stderr
    assert "resolver True" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count("Groups, chosen with group=option") == 2
    for reason in ("Could not override 'ruel'", "Could not find 'model/tinny'", "error: prompt= is empty"):
        assert reason in ended.stderr
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_there() -> None:
    for name in depass_lightning.__all__:
        assert getattr(depass_lightning, name) is not None
    assert set(depass_lightning.__all__) <= set(dir(depass_lightning))
    assert set(depass_lightning._PUBLIC) == set(depass_lightning.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'DePas'"):
        _ = depass_lightning.DePas  # type: ignore[attr-defined]
