"""What goes wrong in a probe of one of two ranks costs that probe, and leaves no rank waiting."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed

from depass_lightning import DePass
from depass_lightning.callbacks import DePassCallback
from depass_lightning.faithfulness import token_removal
from depass_lightning.storage import read_rows
from tests.callbacks.test_callback import Witness, history_of, same
from tests.reference.training import PROMPTS, OwnModule, fit, trainer

TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}


def train(folder: Path, callbacks: list[Callback], **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    fit(trainer(folder, callbacks, **(TWO | options)), OwnModule())


class Losses(Callback):
    """Keeps what every rank trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        own = {"step": trainer.global_step, "losses": pl_module.losses, "weights": pl_module.state_dict()}
        torch.save(own, self.folder / f"rank{trainer.global_rank}.pt")


def on_rank_one(error: Callable[[int], Exception | None]) -> Callable[..., Any]:
    """Return an `attribute` that fails on the second rank, depending on how many probes it is given."""
    attribute = DePass.attribute_sources

    def failing(self: DePass, *arguments: Any, **options: Any) -> Any:
        found = error(len(options["prompt"]))
        if distributed.get_rank() == 1 and found is not None:
            raise found
        return attribute(self, *arguments, **options)

    return failing


ERRORS: dict[str, Callable[[int], Exception | None]] = {
    "an exception": lambda count: RuntimeError("the probe broke"),
    "out of memory, always": lambda count: torch.OutOfMemoryError("no room"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_one_ranks_probes_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Training is bit-identical to one without the callback, and the other rank's probes are there."""
    train(tmp_path / "without", [Losses(tmp_path / "without")])
    monkeypatch.setattr(DePass, "attribute_sources", on_rank_one(ERRORS[kind]))
    train(tmp_path / "with", [DePassCallback(list(PROMPTS)), Losses(tmp_path / "with")])
    for rank in (0, 1):
        without, found = (torch.load(tmp_path / name / f"rank{rank}.pt") for name in ("without", "with"))
        assert found["step"] == 6
        assert same(without, found)
    rows = read_rows(tmp_path / "with/depass/probes/step-000006.parquet")
    assert [row["id"] for row in rows] == ["probes-0", "probes-2", "probes-4"]
    assert history_of(tmp_path / "with")["curves"]["failed"] == [2.0] * 4


def test_want_of_memory_on_one_rank_halves_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(count: int) -> Exception | None:
        return torch.OutOfMemoryError("no room") if count > 1 else None

    monkeypatch.setattr(DePass, "attribute_sources", on_rank_one(short))
    train(tmp_path, [DePassCallback(list(PROMPTS)), Losses(tmp_path)])
    assert history_of(tmp_path)["curves"]["failed"] == [0.0] * 4
    assert len(read_rows(tmp_path / "depass/probes/step-000006.parquet")) == 5


def test_want_of_memory_while_tokens_are_removed_halves_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    removal, sizes = token_removal.removal_curves, []

    def short(model: Any, attributions: Any, answers: Any, **options: Any) -> Any:
        sizes.append(len(attributions))
        if len(attributions) > 1:
            raise torch.OutOfMemoryError("no room")
        return removal(model, attributions, answers, **options)

    monkeypatch.setattr(token_removal, "removal_curves", short)
    callback = DePassCallback(list(PROMPTS), batch_size=4, faithfulness=3)
    with caplog.at_level(logging.WARNING):
        fit(trainer(tmp_path, [callback], max_steps=1), OwnModule())
    # four probes, three of them in the sample; then two and two; then the first two one by one; each probe
    # that succeeds with all tokens, then with the last one kept
    assert sizes == [3, 2, *[1] * 12]
    curves = callback.history["probes"].curves
    assert curves["failed"] == [0.0, 0.0]
    assert not any(math.isnan(value) for value in curves["faithfulness"])
    rows = read_rows(tmp_path / "depass/probes/step-000001.parquet")
    assert [row["patch_top"] is not None for row in rows] == [True, True, True, False, False]


def test_weights_that_are_not_a_number_on_one_rank(tmp_path: Path) -> None:
    """Before the gradients are shared out, one rank's probes fail and the other's do not."""

    class Diverge(Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3 and trainer.global_rank == 1:
                pl_module.inside.lm.model.layers[1].mlp.up_proj.weight.data[0] = math.nan

    kept = ModelCheckpoint(tmp_path / "kept", monitor="depass/probes/value", every_n_train_steps=1)
    callbacks = [Diverge(), DePassCallback(list(PROMPTS), every_n_steps=3), kept, Losses(tmp_path)]
    train(tmp_path, callbacks, max_steps=4, enable_checkpointing=True)
    history = history_of(tmp_path)
    assert history["steps"][-1] == 4
    failed = dict(zip(history["steps"], history["curves"]["failed"], strict=True))
    assert failed[3] == 2.0
    assert failed[4] == 5.0  # the gradients' mean is not a number anywhere
    assert history["curves"]["value"][-1] is None


def test_all_ranks_log_the_same(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            numbers = {
                name: value.item() for name, value in trainer.callback_metrics.items() if "depass" in name
            }
            (tmp_path / f"rank{trainer.global_rank}.json").write_text(json.dumps(numbers))

    (tmp_path / "witness").mkdir()
    train(tmp_path, [DePassCallback(list(PROMPTS)), Keep(), Witness(tmp_path / "witness")])
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert 0 < one["depass/overhead"] < 1
