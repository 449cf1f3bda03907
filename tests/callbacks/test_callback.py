"""The callback leaves training alone, survives what goes wrong, and remembers."""

import json
import logging
import math
import pickle
import random
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from depass_lightning import DePass, DePassError, Token
from depass_lightning.callbacks import DePassCallback
from depass_lightning.faithfulness import Case
from depass_lightning.faithfulness.evaluate import entropy
from depass_lightning.monitoring.history import SCALARS
from depass_lightning.monitoring.runner import isolated
from depass_lightning.storage import read_attributions, read_rows
from depass_lightning.tasks import Example, Task
from tests.reference.training import PROMPTS, OwnModule, fit, trainer

pytestmark = pytest.mark.covering

SETTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "softmax": {"rule": "softmax", "every_n_steps": 3},
    "taylor": {"rule": "taylor", "every_n_steps": 3},
}


class Witness(Callback):
    """Keeps everything about a training that a callback could have changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(
            {
                "modes": [module.training for module in pl_module.modules()],
                "hooks": [len(module._forward_hooks) for module in pl_module.modules()],
                "attention": pl_module.inside.lm.config._attn_implementation,
                "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                "random": (random.getstate(), torch.get_rng_state().tolist()),
                "numpy": pickle.dumps(np.random.get_state()),
            }
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = {
            "weights": pl_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "losses": pl_module.losses,
            "steps": self.steps,
        }
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def watching(folder: Path, settings: dict[str, Any]) -> list[Callback]:
    """The witness, after the callback if there are settings for one."""
    return [*([DePassCallback(list(PROMPTS), **settings)] if settings else []), Witness(folder)]


def assert_same_trainings(folder: Path, rank: int = 0) -> None:
    without, *others = (torch.load(folder / name / f"rank{rank}.pt", weights_only=False) for name in SETTINGS)
    assert len(without["losses"]) == 6
    for other in others:
        assert [key for key in without if not same(without[key], other[key])] == []


def history_of(folder: Path, name: str = "probes") -> dict[str, Any]:
    return json.loads((folder / "depass" / name / "history.json").read_text())


def train(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    folder.mkdir(exist_ok=True)
    run = trainer(folder, callbacks, **options)
    fit(run, OwnModule())
    return run


@pytest.mark.parametrize("processes", [1, 2])
def test_training_is_bit_identical_with_and_without_it(tmp_path: Path, processes: int) -> None:
    options = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    for name, settings in SETTINGS.items():
        folder = tmp_path / name
        train(folder, *watching(folder, settings), **options)
    for rank in range(processes):
        assert_same_trainings(tmp_path, rank)
    assert history_of(tmp_path / "taylor")["steps"] == [0, 2, 3, 4, 6]


def test_it_is_bit_identical_with_autocast_and_gradient_checkpointing(tmp_path: Path) -> None:
    for name, settings in SETTINGS.items():
        folder = tmp_path / name
        folder.mkdir()
        module = OwnModule()
        module.inside.lm.activation_checkpointing_enable()
        fit(trainer(folder, watching(folder, settings), precision="bf16-mixed"), module)
    assert_same_trainings(tmp_path)
    # outside of autocast the scores add up as well as in float32
    assert max(history_of(tmp_path / "softmax")["curves"]["completeness"]) < 1e-5


@pytest.mark.parametrize("count", [5, 1])
def test_ranks_share_the_probes_unevenly_and_agree(tmp_path: Path, count: int) -> None:
    probes = list(PROMPTS[:count])
    train(tmp_path / "one", DePassCallback(probes))
    monitor = {"monitor": "depass/probes/value", "save_top_k": -1, "every_n_train_steps": 3}
    checkpoint = ModelCheckpoint(tmp_path / "two", filename="{step}", **monitor)
    callbacks = [DePassCallback(probes), checkpoint]
    train(tmp_path / "two", *callbacks, devices=2, strategy="ddp_fork", enable_checkpointing=True)
    one, two = (tmp_path / name / "depass/probes/step-000000.parquet" for name in ("one", "two"))
    assert [row["id"] for row in read_rows(two)] == [f"probes-{i}" for i in range(count)]
    for alone, shared in zip(read_attributions(one), read_attributions(two), strict=True):
        assert alone.names == shared.names
        torch.testing.assert_close(alone.scores, shared.scores, rtol=1e-5, atol=1e-6)
    history = history_of(tmp_path / "two")
    assert history["steps"] == [0, 2, 3, 4, 6]
    saved = torch.load(tmp_path / "two/step=3.ckpt", weights_only=True)
    [state] = [state for key, state in saved["callbacks"].items() if key.startswith("DePassCallback")]
    assert state["history"]["probes"]["curves"]["value"] == history["curves"]["value"][:3]


def test_what_is_logged_and_when(tmp_path: Path) -> None:
    text, answer = PROMPTS[0]
    at = text.index("Mary")
    example = Example("io", text, answer, " John", {"indirect_object": ((at, at + 4),)}, ("indirect_object",))
    seen = {}

    class Watch(Callback):
        def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen["during the sanity check"] = (tmp_path / "depass").exists()

    callback = DePassCallback(
        {"ioi": Task("ioi", [example]), "others": list(PROMPTS[1:])}, size=3, every_n_steps=5
    )
    run = train(tmp_path, callback, Watch(), num_sanity_val_steps=1)
    assert not seen["during the sanity check"]
    assert callback.history["ioi"].steps == callback.history["others"].steps == [0, 2, 4, 5, 6]
    logged = {name: float(value) for name, value in run.callback_metrics.items() if "depass/" in name}
    wanted = {f"depass/ioi/{name}" for name in (*SCALARS, "failed")} | {"depass/overhead"}
    wanted |= {f"depass/others/{name}" for name in (*SCALARS, "failed") if name != "on_target"}
    assert set(logged) == wanted
    [last] = read_attributions(tmp_path / "depass/ioi/step-000006.parquet")
    assert last.target == "' Mary' − ' John'"
    for name, value in {
        "value": last.value,
        "probability": last.probability,
        "rank": last.rank,
        "completeness": last.completeness,
        "on_target": last.positive_fraction([(at, at + 4)]),
        "entropy": entropy(Case(last)),
    }.items():
        assert logged[f"depass/ioi/{name}"] == pytest.approx(value, rel=1e-5)
    [first] = read_attributions(tmp_path / "depass/ioi/step-000000.parquet")
    [previous] = read_attributions(tmp_path / "depass/ioi/step-000005.parquet")
    assert logged["depass/ioi/similarity_first"] == pytest.approx(first.compare(last).cosine, rel=1e-5)
    assert logged["depass/ioi/similarity_previous"] == pytest.approx(previous.compare(last).cosine, rel=1e-5)
    assert 0 < logged["depass/overhead"] < 1
    assert len(read_attributions(tmp_path / "depass/others/step-000006.parquet")) == 3


def test_validating_alone_reports_and_leaves_the_history(tmp_path: Path) -> None:
    callback = DePassCallback(list(PROMPTS))
    run = train(tmp_path, callback)
    before = callback.state_dict()
    [reported] = run.validate(run.lightning_module, run.val_dataloaders, verbose=False)
    assert same(before, callback.state_dict())
    assert reported["depass/probes/value"] == pytest.approx(callback.history["probes"].curves["value"][-1])
    assert reported["depass/probes/similarity_previous"] == pytest.approx(1)


def test_a_second_training_begins_a_new_history(tmp_path: Path) -> None:
    callback = DePassCallback(list(PROMPTS))
    train(tmp_path / "one", callback)
    train(tmp_path / "two", callback)
    assert history_of(tmp_path / "two") == history_of(tmp_path / "one")


def test_a_failing_probe_is_named_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probes: list[Any] = [*PROMPTS[:2], ("", " Mary"), *PROMPTS[2:]]
    callback = DePassCallback(probes, batch_size=4)
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, callback)
    assert run.global_step == 6
    said = [record.getMessage() for record in caplog.records if "probe" in record.getMessage()]
    assert len(said) == 4
    assert all(message.startswith("probe 'probes-2' of 'probes' failed at step ") for message in said)
    assert "empty" in said[0]
    rows = read_rows(tmp_path / "depass/probes/step-000006.parquet")
    assert [row["id"] for row in rows] == ["probes-0", "probes-1", "probes-3", "probes-4", "probes-5"]
    assert callback.history["probes"].curves["failed"] == [1.0] * 4
    mean = np.mean([row["value"] for row in rows])
    assert callback.history["probes"].curves["value"][-1] == pytest.approx(mean)


def test_strict_callbacks_raise_for_a_failing_probe(tmp_path: Path) -> None:
    callback = DePassCallback([*PROMPTS, ("Mary went", Token(" Mary went"))], on_error="raise")
    with pytest.raises(DePassError, match=r"probe 'probes-5' of 'probes' failed at step 0: .*Mary went"):
        train(tmp_path, callback)


def test_a_rank_whose_probe_fails_strictly_leaves_no_other_waiting(tmp_path: Path) -> None:
    callback = DePassCallback([PROMPTS[0], ("", " Mary")], on_error="raise")
    with pytest.raises(Exception, match="probe 'probes-1'"):
        train(tmp_path, callback, devices=2, strategy="ddp_fork")


def test_weights_that_are_not_a_number_do_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Diverge(Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                pl_module.inside.lm.model.layers[1].mlp.up_proj.weight.data[0] = math.nan

    callback = DePassCallback(list(PROMPTS))
    with caplog.at_level(logging.WARNING):
        checkpoint = ModelCheckpoint(tmp_path, monitor="depass/probes/value")
        run = train(tmp_path, callback, Diverge(), checkpoint, enable_checkpointing=True)
    assert run.global_step == 6
    curves = callback.history["probes"].curves
    assert curves["failed"] == [0.0, 0.0, 5.0, 5.0]
    assert [math.isnan(value) for value in curves["value"]] == [False, False, True, True]
    assert math.isnan(run.callback_metrics["depass/probes/similarity_first"])
    assert "probes 'probes-0', 'probes-1', 'probes-2' and 2 more of 'probes' failed at step 4" in caplog.text
    assert "were not written" not in caplog.text
    assert history_of(tmp_path)["curves"]["value"] == [*curves["value"][:2], None, None]


def test_want_of_memory_halves_the_batch_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attribute, sizes = DePass.attribute_sources, []

    def short_of_memory(self: DePass, prompt: list[str], **options: Any) -> Any:
        sizes.append(len(prompt))
        if len(prompt) > 2:
            raise torch.OutOfMemoryError("no room")
        return attribute(self, prompt, **options)

    monkeypatch.setattr(DePass, "attribute_sources", short_of_memory)
    callback = DePassCallback(list(PROMPTS), batch_size=4)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, callback, max_steps=2)
    assert sizes == [4, 2, 2, 1, 2, 2, 1]
    assert "memory ran out on 4 probes; there are 2 in a pass now" in caplog.text
    assert callback.history["probes"].curves["failed"] == [0.0, 0.0]


def test_maps_that_cannot_be_written_do_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    run = train(tmp_path, DePassCallback(list(PROMPTS), folder=tmp_path / "file"))
    assert run.global_step == 6
    assert "the maps of 'probes' at step 6 were not written" in caplog.text


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # resuming where one left off
def test_a_resumed_run_keeps_its_curves_and_its_reference(tmp_path: Path) -> None:
    def callbacks(checkpoints: Path) -> list[Callback]:
        kept = ModelCheckpoint(checkpoints, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        return [DePassCallback(list(PROMPTS)), kept]

    class Kill(Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("killed")

    def module() -> OwnModule:
        return OwnModule(attention_dropout=0.0)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"max_steps": 8, "val_check_interval": 3, "enable_checkpointing": True}
    epochs = {"batches": 4}  # so that the checkpoint is at an epoch's end, from where a loader can go on
    fit(trainer(whole, callbacks(tmp_path / "a"), **options), module(), **epochs)
    with pytest.raises(RuntimeError, match="killed"):
        fit(trainer(broken, [*callbacks(tmp_path / "b"), Kill()], **options), module(), **epochs)
    resumed = trainer(broken, callbacks(tmp_path / "b"), **options)
    fit(resumed, module(), **epochs, ckpt_path=tmp_path / "b/step=4.ckpt")
    assert history_of(broken)["steps"] == [0, 3, 4, 6, 8]
    assert history_of(broken) == history_of(whole)


def test_checkpoints_and_early_stopping_can_watch_it(tmp_path: Path) -> None:
    name = "depass/probes/similarity_first"
    best = ModelCheckpoint(tmp_path, monitor=name, mode="max", save_top_k=1, filename="best-{step}")
    stop = EarlyStopping(monitor=name, mode="max", patience=2)
    callback = DePassCallback(list(PROMPTS))
    run = train(tmp_path, callback, best, stop, enable_checkpointing=True, max_steps=40, max_epochs=-1)
    # the similarity to the beginning is highest at the first validation, and only falls from there
    curve = callback.history["probes"].curves["similarity_first"]
    assert best.best_model_score == pytest.approx(max(curve[1:]))
    assert Path(best.best_model_path).name == f"best-step={2 * (1 + int(np.argmax(curve[1:])))}.ckpt"
    assert run.global_step < 40
    assert stop.wait_count == 2


def test_checkpoints_can_watch_it_without_any_validation(tmp_path: Path) -> None:
    name = "depass/probes/value"
    kept = ModelCheckpoint(tmp_path, monitor=name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callback = DePassCallback(list(PROMPTS), every_n_steps=1)
    train(tmp_path, callback, kept, enable_checkpointing=True, limit_val_batches=0)
    history = callback.history["probes"]
    assert history.steps == [0, 1, 2, 3, 4, 5, 6]
    scores = {Path(path).stem: float(score) for path, score in kept.best_k_models.items()}
    assert scores == pytest.approx({f"step={n}": history.curves["value"][n] for n in range(1, 7)}, rel=1e-5)


@pytest.mark.parametrize(
    ("trigger", "options", "steps"),
    [
        ({"every_n_train_steps": 1}, {"limit_val_batches": 0}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 1}, {"val_check_interval": 3}, [1, 2, 3, 4, 5, 6]),
        ({"train_time_interval": timedelta(0)}, {"limit_val_batches": 0}, [1, 2, 3, 4, 5, 6]),
        (
            {"every_n_epochs": 1},
            {"limit_val_batches": 0, "limit_train_batches": 2, "max_epochs": 3},
            [2, 4, 6],
        ),
    ],
)
def test_checkpoints_are_ranked_by_the_value_at_their_own_step(
    tmp_path: Path, trigger: dict[str, Any], options: dict[str, Any], steps: list[int]
) -> None:
    """ModelCheckpoint ranks before it notifies other callbacks of a save, with validation and without."""
    name, trigger = "depass/probes/value", {"save_top_k": -1, "filename": "{step}", **trigger}
    kept = ModelCheckpoint(tmp_path, monitor=name, **trigger)
    callback = DePassCallback(list(PROMPTS))
    options = {"check_val_every_n_epoch": 1, "val_check_interval": None, **options}
    train(tmp_path, callback, kept, enable_checkpointing=True, **options)
    history = callback.history["probes"]
    measured = dict(zip(history.steps, history.curves["value"], strict=True))
    scores = {Path(path).stem: float(score) for path, score in kept.best_k_models.items()}
    assert scores == pytest.approx({f"step={n}": measured[n] for n in steps}, rel=1e-5)


def test_a_training_that_fails_starts_no_run(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("no more")

    callback = DePassCallback(list(PROMPTS))
    kept = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=100, filename="{step}")
    with pytest.raises(RuntimeError, match="no more"):
        train(tmp_path, callback, Fail(), kept, enable_checkpointing=True)
    assert list(tmp_path.glob("*.ckpt"))
    assert callback.history["probes"].steps == [0, 2]


def test_what_training_had_is_put_back() -> None:
    def drawn() -> tuple[Any, ...]:
        return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()

    def fail_inside() -> None:
        with isolated():
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            _ = random.random(), np.random.rand(), torch.rand(1)
            assert drawn() != before
            raise KeyError

    before = drawn()
    with torch.inference_mode(), torch.autocast("cpu"):
        with pytest.raises(KeyError):
            fail_inside()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert drawn() == before


def test_nothing_is_written_in_a_fast_dev_run(tmp_path: Path) -> None:
    callback = DePassCallback(list(PROMPTS))
    train(tmp_path, callback, fast_dev_run=True)
    assert callback.history["probes"].steps == [0, 1]
    assert not (tmp_path / "depass").exists()


def test_sharded_strategies_are_refused() -> None:
    run: Any = SimpleNamespace(strategy=FSDPStrategy.__new__(FSDPStrategy))
    with pytest.raises(DePassError, match="FSDPStrategy shards the model's weights"):
        DePassCallback(list(PROMPTS)).setup(run, OwnModule(), "fit")
