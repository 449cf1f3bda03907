"""`python train.py`: train a causal language model, with attributions of held-out probes along the way."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import hydra
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from depass_lightning.callbacks import DePassCallback
from depass_lightning.commands.console import (
    command,
    console,
    expect_hub,
    instantiate_each,
    keep_config,
    loggers_of,
    open_run,
    shell,
)
from depass_lightning.commands.schema import TrainSettings, check_config
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.errors import DePassError
from depass_lightning.models.export import export_model
from depass_lightning.models.load import dtype_of, load_model

CURVES = ("value", "probability", "on_target")

# What Lightning warns of where nothing is wrong: a resumed run has its own folder, and data may be few.
EXPECTED = (".*dirpath has changed.*", ".*smaller than the logging interval.*")


@command
def train(config: DictConfig) -> int:
    """Train as the configuration says, and return the exit code."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    check_config(config, TrainSettings)
    folder = open_run(config)
    seed_everything(config.seed, workers=True, verbose=False)
    if config.ckpt_path is not None and not Path(config.ckpt_path).exists():
        raise DePassError(f"no checkpoint {config.ckpt_path} to resume from (ckpt_path=)")
    disable_progress_bar()
    model, tokenizer = make_model(config)
    # Objects are handed to partial functions: Hydra would copy them into the configuration.
    data = instantiate(config.data, _partial_=True)(tokenizer=tokenizer)
    module = instantiate(config.module, _partial_=True)(model=model)
    callbacks = instantiate_each(config.get("callbacks"))
    with loggers_of(config) as loggers:
        trainer: Trainer = instantiate(config.trainer, _partial_=True)(
            callbacks=callbacks, logger=loggers or False
        )
        keep_config(config, folder)
        trainer.fit(module, datamodule=data, ckpt_path=config.ckpt_path)
    if trainer.is_global_zero:
        if config.export_dir is not None:
            dtype = None if config.export_dtype is None else dtype_of(config.export_dtype)
            export_model(model, tokenizer, config.export_dir, dtype)
        show(trainer, callbacks, folder, config.export_dir)
        if any(len(own.history[name].steps) > 1 for own in probing(callbacks) for name in own.history):
            for page in write_timelines(folder):
                console.print(Text(f"{'timeline':9}{page}"), soft_wrap=True)
    return 0


@shell
@hydra.main(version_base="1.3", config_path="pkg://depass_lightning.conf", config_name="train")
def main(config: DictConfig) -> None:
    """Run the command with the configuration that Hydra composes."""
    train(config)


def make_model(config: DictConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that the configuration names, or make an untrained one."""
    if config.untrained is not None:
        return instantiate(config.untrained)
    expect_hub(config.model.name)
    model, tokenizer = load_model(config.model.name, revision=config.model.revision, dtype=config.dtype)
    model.train()
    return model, tokenizer


def show(trainer: Trainer, callbacks: list[Callback], folder: Path, export_dir: str | None) -> None:
    """Print what the training came to, and where it lies."""
    for callback in probing(callbacks):
        for name, history in callback.history.items():
            console.print(history_table(name, history.steps, history.curves))
    metrics = {
        name: value.item() for name, value in trainer.callback_metrics.items() if "depass/" not in name
    }
    console.print(metrics_table(metrics))
    for label, place in (("maps", folder / "depass"), ("model", export_dir), ("folder", folder)):
        if place is not None and Path(place).exists():
            console.print(Text(f"{label:9}{place}"), soft_wrap=True)


def probing(callbacks: list[Callback]) -> list[DePassCallback]:
    """Return those that attribute probes."""
    return [callback for callback in callbacks if isinstance(callback, DePassCallback)]


def history_table(name: str, steps: list[int], curves: Mapping[str, list[float]], rows: int = 8) -> Table:
    """Return how a probe set's numbers went, at up to `rows` steps, the first and the last among them."""
    shown = sorted({round(i * (len(steps) - 1) / max(1, rows - 1)) for i in range(rows)})
    table = Table(
        "step", *(c for c in CURVES if c in curves), title=f"probes: {name}", title_justify="left", box=None
    )
    for column in table.columns:
        column.justify = "right"
    for i in shown:
        values = (curves[curve][i] for curve in CURVES if curve in curves)
        table.add_row(str(steps[i]), *("" if math.isnan(value) else f"{value:.3f}" for value in values))
    return table


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Return the last value of everything that was logged."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    return table
