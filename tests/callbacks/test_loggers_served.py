"""Loggers of either Lightning, probe sets of any name, and what a logger did not take."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depass_lightning.callbacks import DePassCallback
from depass_lightning.callbacks.depass import SHARDED
from depass_lightning.monitoring.sinks import is_named
from depass_lightning.monitoring.wandb_logger import wandb_logger
from tests.callbacks.test_loggers import STEPS, _finished, assert_files, history_rows, records, train  # noqa: F401
from tests.reference.training import PROMPTS, OwnModule, fit, language_model, loader, tokenizer, trainer


@pytest.mark.usefixtures("_finished")
def test_wandb_takes_probe_sets_of_any_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names that no artifact, file or table of W&B may have; scalars keep them, and none is lost."""
    names = ["事実", "x" * 150, "a b#?%", "..", "plain"]
    callback = DePassCallback({name: [PROMPTS[0]] for name in names}, folder=tmp_path, faithfulness=0)
    fit(trainer(tmp_path, [callback], logger=wandb_logger(save_dir=tmp_path), max_steps=1), OwnModule())
    wandb.finish()
    assert "did not take" not in caplog.text
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    rows = history_rows(run)
    keys = {key for row in rows for key in row}
    assert {f"depass/{name}/value" for name in names} <= keys
    assert {"depass/plain/map", "depass/plain/table"} <= keys
    for kind in ("map", "table"):
        shown = [key for key in keys if key.endswith(f"/{kind}")]
        assert len(shown) == len(names)
        assert all(key.isascii() and ".." not in key and len(key) < 100 for key in shown)
    artifacts = {record.artifact.name for record in records(run) if record.HasField("artifact")}
    found = [name for name in artifacts if name.startswith("attributions-")]
    assert len(found) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name) for name in found)


def test_what_a_logger_did_not_take_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The maps are written all the same, and every other logger gets its own."""

    served: Any = WandbLogger  # its properties are attributes here

    class Broken(served):
        def __init__(self) -> None: ...

        name = version = save_dir = experiment = "broken"
        log_hyperparams = finalize = save = after_save_checkpoint = lambda *_, **__: None

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if not all(isinstance(value, int | float) for value in metrics.values()):
                raise ConnectionError("the server is away")

    train(tmp_path, Broken(), TensorBoardLogger(tmp_path, "board", ""), folder=tmp_path)
    assert_files(tmp_path)
    assert "the maps of step 5 are in " in caplog.text
    assert ", but Weights & Biases failed: the server is away" in caplog.text
    assert "were not written" not in caplog.text
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload()
    assert len(events.Images("depass/probes/map/probes-0")) == len(STEPS)


@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning"
)  # torch, of Lightning's code
def test_pytorch_lightning_is_served_as_lightning_is(tmp_path: Path) -> None:
    """Its classes share nothing with `lightning`'s but their names."""
    import pytorch_lightning
    from pytorch_lightning.loggers import TensorBoardLogger as Board
    from pytorch_lightning.strategies import FSDPStrategy

    class Twin(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lm, self.tokenizer = language_model(), tokenizer()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.lm(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    run: Any = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=Board(tmp_path, "board", ""),
        callbacks=[DePassCallback(list(PROMPTS))],  # type: ignore[list-item]
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    run.fit(Twin(), loader())
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload()
    assert len(events.Images("depass/probes/map/probes-0")) == 2
    assert is_named(FSDPStrategy.__new__(FSDPStrategy), *SHARDED)
    assert is_named(type("Mine", (WandbLogger,), {}).__new__(WandbLogger), "WandbLogger")
