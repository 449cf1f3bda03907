"""`python train.py`: train a causal language model and attribute held-out probes during training."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from depass_lightning.callbacks import DePassCallback
from depass_lightning.commands.console import (
    command,
    console,
    instantiate_each,
    loggers_of,
    open_run,
    save_config,
    work_offline_if_unreachable,
)
from depass_lightning.commands.schema import TrainSettings, check_config
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.errors import DePassError
from depass_lightning.models.export import export_model
from depass_lightning.models.load import dtype_of, load_model
from depass_lightning.monitoring.sinks import is_named, wandb_name

CURVES = ("value", "probability", "on_target")

# Lightning warnings without a cause here: a resumed run has another folder, and data sets may be small.
EXPECTED = (".*dirpath has changed.*", ".*smaller than the logging interval.*")


@command
def train(config: DictConfig) -> int:
    """Train the configured model, and return the exit code."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    check_config(config, TrainSettings)
    folder = open_run(config)
    seed_everything(config.seed, workers=True, verbose=False)
    if config.ckpt_path is not None and not Path(config.ckpt_path).exists():
        raise DePassError(f"no checkpoint {config.ckpt_path} to resume from (ckpt_path=)")
    disable_progress_bar()
    model, tokenizer = make_model(config)
    # `_partial_`: Hydra would copy objects passed as arguments into the configuration.
    data = instantiate(config.data, _partial_=True)(tokenizer=tokenizer)
    module = instantiate(config.module, _partial_=True)(model=model)
    callbacks = instantiate_each(config.get("callbacks"))
    with loggers_of(config) as loggers:
        trainer: Trainer = instantiate(config.trainer, _partial_=True)(
            callbacks=callbacks, logger=loggers or False
        )
        save_config(config, folder)
        trainer.fit(module, datamodule=data, ckpt_path=config.ckpt_path)
        if trainer.is_global_zero:
            if config.export_dir is not None:
                dtype = None if config.export_dtype is None else dtype_of(config.export_dtype)
                export_model(model, tokenizer, config.export_dir, dtype)
            show(trainer, callbacks, folder, config.export_dir)
            histories = [history for callback in probing(callbacks) for history in callback.history.values()]
            if any(len(history.steps) > 1 for history in histories):
                pages = write_timelines(folder)
                for page in pages:
                    console.print(Text(f"{'timeline':9}{page}"), soft_wrap=True)
                log_timelines(loggers, pages, folder / "depass")
            print_sync(loggers)
    return 0


def make_model(config: DictConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the configured model, or make an untrained one."""
    if config.untrained is not None:
        return instantiate(config.untrained)
    work_offline_if_unreachable(config.model.name)
    model, tokenizer = load_model(config.model.name, revision=config.model.revision, dtype=config.dtype)
    model.train()
    return model, tokenizer


def show(trainer: Trainer, callbacks: list[Callback], folder: Path, export_dir: str | None) -> None:
    """Print the training's results and the paths of its output files."""
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


def log_timelines(loggers: Sequence[Logger], pages: Sequence[Path], maps: Path) -> None:
    """Log the timeline pages with this process's run of Weights & Biases, if there is one."""
    if (run := wandb_run(loggers)) is not None:
        import wandb  # slow to import

        named = {wandb_name(page.parent.relative_to(maps).as_posix()): page for page in pages}
        texts = {name: page.read_text(encoding="utf-8") for name, page in named.items()}
        run.log(
            {
                f"depass/{name}/timeline": wandb.Html(text, inject=False, data_is_not_path=True)
                for name, text in texts.items()
            }
        )


def print_sync(loggers: Sequence[Logger]) -> None:
    """Print the command that uploads a run that Weights & Biases recorded offline."""
    run = wandb_run(loggers)
    if run is not None and run.offline:
        console.print(Text(f"{'wandb':9}wandb sync {Path(run.dir).parent}"), soft_wrap=True)


def wandb_run(loggers: Sequence[Logger]) -> Any:
    """Return this process's run of Weights & Biases; None without one."""
    if not any(is_named(logger, "WandbLogger") for logger in loggers):
        return None
    import wandb  # slow to import

    return wandb.run


def probing(callbacks: list[Callback]) -> list[DePassCallback]:
    """Return the callbacks that attribute probes."""
    return [callback for callback in callbacks if isinstance(callback, DePassCallback)]


def history_table(name: str, steps: list[int], curves: Mapping[str, list[float]], rows: int = 8) -> Table:
    """Return a table of a probe set's curves at up to `rows` steps, including the first and the last."""
    shown = sorted({round(i * (len(steps) - 1) / max(1, rows - 1)) for i in range(rows)})
    table = Table(
        "step",
        *(curve for curve in CURVES if curve in curves),
        title=f"probes: {name}",
        title_justify="left",
        box=None,
    )
    for column in table.columns:
        column.justify = "right"
    for i in shown:
        values = (curves[curve][i] for curve in CURVES if curve in curves)
        table.add_row(str(steps[i]), *("" if math.isnan(value) else f"{value:.3f}" for value in values))
    return table


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Return a table of the last value of every logged metric."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    return table
