"""ModelCheckpoint and EarlyStopping watch the probes, and go on doing so in a resumed run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from depass_lightning.callbacks import DePassCallback
from depass_lightning.tasks import Example, Task
from tests.reference.training import PROMPTS, OwnModule, fit, trainer

NAME = "depass/ioi/on_target"
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")


class Kill(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("killed")


def ioi() -> Task:
    text, answer = PROMPTS[0]
    return Task("ioi", [Example("io", text, answer, " John", {"io": ((5, 9),)}, ("io",))])


def watched(folder: Path) -> tuple[DePassCallback, ModelCheckpoint, EarlyStopping]:
    best = ModelCheckpoint(
        folder, monitor=NAME, mode="max", save_top_k=1, filename="best-{step}", save_last=True
    )
    return DePassCallback(ioi()), best, EarlyStopping(monitor=NAME, mode="max", patience=50)


def test_the_best_checkpoint_and_the_patience_survive_a_restart(tmp_path: Path) -> None:
    options = {"max_steps": 12, "max_epochs": -1, "enable_checkpointing": True}

    def module() -> OwnModule:
        return OwnModule(attention_dropout=0.0)

    whole = watched(tmp_path / "a")
    fit(trainer(tmp_path / "whole", whole, **options), module(), 2)
    broken = watched(tmp_path / "b")
    with pytest.raises(RuntimeError, match="killed"):
        fit(trainer(tmp_path / "broken", [*broken, Kill()], **options), module(), 2)
    resumed = watched(tmp_path / "b")
    run = trainer(tmp_path / "broken", resumed, **options)
    fit(run, module(), 2, ckpt_path=tmp_path / "b/last.ckpt")
    assert run.global_step == 12
    curves = [callbacks[0].history["ioi"].curves["on_target"] for callbacks in (whole, resumed)]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 7
    assert len(set(curves[0])) > 3
    # the run at the start is before any validation
    best = max(curves[0][1:])
    for callbacks in (whole, resumed):
        assert callbacks[1].best_model_score == pytest.approx(best)
        assert Path(callbacks[1].best_model_path).stem == f"best-step={2 * (1 + curves[0][1:].index(best))}"
        assert callbacks[2].best_score == pytest.approx(best)
    assert whole[2].wait_count == resumed[2].wait_count
