"""The documented scalars are the ones that are logged."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring.history import SCALARS
from depass_lightning.monitoring.wandb_logger import wandb_logger
from depass_lightning.tasks import Example
from tests.callbacks.test_loggers import history_rows
from tests.conftest import ROOT
from tests.reference.training import PROMPTS, OwnModule, fit, trainer

PAGE = ROOT / "docs/training-loops.md"


def documented() -> dict[str, tuple[str, str]]:
    """Return the unit and the meaning of every name in the table."""
    rows = re.findall(r"^\| `(depass/[^`]+)` \|([^|]*)\|([^|]+)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {name: (unit.strip(), meaning.strip()) for name, unit, meaning in rows}


def probes() -> list[Example]:
    text, answer = PROMPTS[0]
    return [Example("io", text, answer, " John", {"io": ((5, 9),)}, ("io",))]


@pytest.fixture
def _finished() -> Iterator[None]:
    yield
    wandb.finish()


@pytest.mark.usefixtures("_finished")
def test_every_logged_name_is_documented_and_the_other_way_round(tmp_path: Path) -> None:
    run = trainer(tmp_path, [DePassCallback({"ioi": probes()})], logger=wandb_logger(save_dir=tmp_path))
    fit(run, OwnModule())
    wandb.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    logged = {key for row in history_rows(folder) for key in row if key.startswith("depass/")}
    names = {name.replace("<set>", "ioi") for name in documented()}
    assert logged == names
    watched = {name for name in run.callback_metrics if name.startswith("depass/")}
    assert watched == names - {"depass/ioi/map", "depass/ioi/table"}


def test_every_scalar_has_a_unit_and_every_name_a_meaning() -> None:
    found = documented()
    assert {name.removeprefix("depass/<set>/") for name in found} >= {*SCALARS, "failed"}
    for name, (unit, meaning) in found.items():
        assert bool(unit) != name.endswith(("/map", "/table")), name
        assert len(meaning) > 10, name


def test_several_sources_have_the_same_names_below_their_own(tmp_path: Path) -> None:
    callback = DePassCallback({"ioi": probes()}, source=["tokens", "heads"])
    run = trainer(tmp_path, [callback], max_steps=1)
    fit(run, OwnModule())
    watched = {name for name in run.callback_metrics if name.startswith("depass/")}
    names = {name for name in documented() if not name.endswith(("/map", "/table"))}
    tokens = {name.replace("<set>", "ioi/tokens") for name in names}
    heads = {name.replace("<set>", "ioi/heads") for name in names if "on_target" not in name}
    assert watched == tokens | {name for name in heads if "faithfulness" not in name}


def test_without_a_sample_nothing_is_said_of_faithfulness(tmp_path: Path) -> None:
    callback = DePassCallback(list(PROMPTS), faithfulness=0)
    fit(trainer(tmp_path, [callback], max_steps=1, logger=TensorBoardLogger(tmp_path, "b", "")), OwnModule())
    tags = EventAccumulator(str(tmp_path / "b")).Reload().Tags()["scalars"]
    assert "depass/probes/value" in tags
    assert "depass/probes/faithfulness" not in tags
