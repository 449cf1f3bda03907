"""DePassTrainerCallback leaves a transformers Trainer's training alone, and logs where its users look."""

import json
import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from torch import distributed, nn
from torch.multiprocessing.spawn import start_processes
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from depass_lightning import DePass, DePassError
from depass_lightning.integrations.transformers import DePassTrainerCallback
from depass_lightning.storage import read_attributions
from tests.callbacks.test_callback import same
from tests.callbacks.test_loggers import history_rows
from tests.reference.training import PROMPTS, WORDS, language_model, tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "softmax": {"every_n_steps": 3},
    "taylor": {"every_n_steps": 2, "rule": "taylor", "source": ["tokens", "heads"]},
}
CURVES = "depass/probes/history.json"


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    ids = torch.randint(1, len(WORDS), (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """Return a quiet Trainer: 6 steps on the CPU, with an evaluation after each second."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(settings | options)),
        train_dataset=rows(),  # type: ignore[arg-type]
        eval_dataset=rows(2, seed=9),  # type: ignore[arg-type]
        processing_class=tokenizer(),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


class Losses(TrainerCallback):
    """Keeps the losses and the random state after each step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append((logs.get("loss"), logs.get("eval_loss"), logs.get("grad_norm")))

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        modes = [module.training for module in objects["model"].modules()]
        self.seen.append((torch.get_rng_state(), modes))


def trained(folder: Path, model: nn.Module, settings: dict[str, Any], **options: Any) -> Any:
    """Train, and return everything that a callback could have changed."""
    losses = Losses()
    callbacks = [DePassTrainerCallback(list(PROMPTS), **settings)] if settings else []
    run = trainer(folder, model, *callbacks, losses, **options)
    run.train()
    optimizer: Any = run.optimizer
    return losses.seen, model.state_dict(), optimizer.state_dict()


def model_of(kind: str) -> nn.Module:
    torch.compiler.reset()
    model = language_model()
    if kind == "lora":
        peft = pytest.importorskip("peft")
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "up_proj"])
        return peft.get_peft_model(model, config)
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("lora", {"activation_checkpointing": True}),
        ("plain", {"bf16": True}),
        pytest.param(
            "plain", {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "lora with activation checkpointing", "bf16", "compiled"],
)
@pytest.mark.covering(2)
def test_training_is_bit_identical(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    found = {
        name: trained(tmp_path / name, model_of(kind), settings, **options)
        for name, settings in SETTINGS.items()
    }
    assert len(found["without"][0]) > 12
    assert same(found["without"], found["softmax"])
    assert same(found["without"], found["taylor"])
    history = json.loads((tmp_path / "softmax" / CURVES).read_text())
    assert history["steps"] == [0, 2, 3, 4, 6]
    assert history["curves"]["failed"] == [0.0] * 5
    assert max(history["curves"]["completeness"]) < 1e-5  # outside of the Trainer's autocast
    assert history["curves"]["value"][0] != history["curves"]["value"][-1]


def test_what_is_logged_and_where(tmp_path: Path) -> None:
    callback = DePassTrainerCallback(list(PROMPTS), every_n_steps=5)
    run = trainer(tmp_path, language_model(), callback)
    run.train()
    curve = dict(
        zip(*(callback.history["probes"].steps, callback.history["probes"].curves["value"]), strict=True)
    )
    assert list(curve) == [0, 2, 4, 5, 6]
    name = "depass/probes/value"
    logged = {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}
    assert logged == pytest.approx(curve)
    assert "train_runtime" in run.state.log_history[-1]  # where scripts look for it
    [last] = [a.value for a in read_attributions(tmp_path / "depass/probes/step-000006.parquet")][:1]
    prompt, target = PROMPTS[0]
    model: Any = run.model
    assert last == pytest.approx(DePass(model, tokenizer()).attribute(prompt, target).value, rel=1e-5)
    # evaluating alone reports, and leaves the history
    before = callback.monitor.state_dict()
    assert run.evaluate()[f"eval_{name}"] == pytest.approx(curve[6])
    assert same(before, callback.monitor.state_dict())


def test_the_best_model_and_early_stopping_watch_a_scalar(tmp_path: Path) -> None:
    name = "depass/probes/similarity_first"
    callback = DePassTrainerCallback(list(PROMPTS), faithfulness=0)
    options = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(
        tmp_path,
        language_model(),
        callback,
        EarlyStoppingCallback(early_stopping_patience=2),
        metric_for_best_model=name,
        greater_is_better=True,
        max_steps=30,
        **options,
    )
    run.train()
    curve = callback.history["probes"].curves["similarity_first"]
    # the similarity to the beginning is highest at the first evaluation, and only falls from there
    assert run.state.best_metric == pytest.approx(max(curve[1:]))
    assert run.state.global_step < 30
    assert run.state.best_model_checkpoint is not None
    best = callback.history["probes"].steps[1 + curve[1:].index(max(curve[1:]))]
    assert Path(run.state.best_model_checkpoint).name == f"checkpoint-{best}"


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("killed")


@pytest.mark.parametrize("kind", ["plain", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_resumed_run_keeps_its_curves_and_its_reference(tmp_path: Path, kind: str) -> None:
    options = {"max_steps": 8, "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}

    def run(folder: str, *callbacks: TrainerCallback) -> Trainer:
        return trainer(
            tmp_path / folder, model_of(kind), DePassTrainerCallback(list(PROMPTS)), *callbacks, **options
        )

    run("whole").train()
    with pytest.raises(RuntimeError, match="killed"):
        run("broken", Kill()).train()
    state = torch.load(tmp_path / "broken/checkpoint-4/depass.pt", weights_only=True)
    assert state["step"] == 4
    run("broken").train(resume_from_checkpoint=True)
    whole, broken = (json.loads((tmp_path / name / CURVES).read_text()) for name in ("whole", "broken"))
    assert broken["steps"] == [0, 3, 4, 6, 8]
    assert broken == whole


def test_failures_cost_their_probe_and_weights_that_are_not_a_number_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Diverge(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            if state.global_step == 3:
                objects["model"].model.layers[1].mlp.up_proj.weight.data[0] = math.nan

    callback = DePassTrainerCallback([*PROMPTS, ("", " Mary")])
    run = trainer(tmp_path, language_model(), callback, Diverge())
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.state.global_step == 6
    assert callback.history["probes"].curves["failed"] == [1.0, 1.0, 6.0, 6.0]
    assert "probe 'probes-5' of 'probes' failed at step 0" in caplog.text
    strict = DePassTrainerCallback([("", " Mary")], on_error="raise")
    with pytest.raises(DePassError, match="probe 'probes-0' of 'probes' failed at step 0"):
        trainer(tmp_path / "strict", language_model(), strict).train()


def test_mistakes_are_found_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DePassError, match="every_n_steps must be at least 1"):
        DePassTrainerCallback(every_n_steps=0)
    with pytest.raises(DePassError, match="there is no setting 'sise'"):
        DePassTrainerCallback(sise=3)  # type: ignore[call-arg]
    with pytest.raises(DePassError, match="no attribute of LlamaForCausalLM"):
        trainer(tmp_path, language_model(), DePassTrainerCallback(list(PROMPTS), model="policy")).train()


def test_wandb_has_the_scalars_and_maps_over_the_trainers_step(tmp_path: Path) -> None:
    callback = DePassTrainerCallback(list(PROMPTS), faithfulness=0)
    run = wandb.init(project="tests", dir=tmp_path, mode="offline")
    trainer(tmp_path, language_model(), callback, report_to="wandb").train()
    run.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    logged = history_rows(folder)
    mine = [row for row in logged if "depass/probes/value" in row]
    assert [row["train/global_step"] for row in mine] == callback.history["probes"].steps
    assert all({"depass/probes/map", "depass/probes/table"} <= set(row) for row in mine)
    assert [row["train/global_step"] for row in logged if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def rank_process(rank: int, port: int, folder: Path) -> None:
    """Train as one of two processes, without the callback and with it, and keep what each has."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    for name in ("without", "softmax"):
        found = trained(folder / name, language_model(), SETTINGS[name], ddp_backend="gloo")
        assert distributed.get_world_size() == 2
        torch.save(found, folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_share_the_probes_and_train_alike(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    start_processes(rank_process, (port, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        without, other = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for name in ("without", "softmax")
        )
        assert same(without, other)
    history = json.loads((tmp_path / "softmax" / CURVES).read_text())
    assert history["steps"] == [0, 2, 3, 4, 6]
    assert history["curves"]["failed"] == [0.0] * 5
    assert len(read_attributions(tmp_path / "softmax/depass/probes/step-000006.parquet")) == 5
