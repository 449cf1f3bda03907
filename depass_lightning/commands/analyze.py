"""`python analyze.py`: attribute a task's prompts, judge the scores, and write what was found."""

from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from depass_lightning.commands.attribute_task import Done, attribute_task
from depass_lightning.commands.compare import compare, load_entry
from depass_lightning.commands.console import (
    command,
    console,
    expect_hub,
    first_process,
    keep_config,
    open_run,
    shell,
    tell,
)
from depass_lightning.commands.launchers import check_launch
from depass_lightning.commands.outputs import print_results
from depass_lightning.commands.resume import claim
from depass_lightning.commands.schema import AnalyzeSettings, check_config
from depass_lightning.commands.study import run_study
from depass_lightning.commands.sweep_report import report_sweep
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError


@command
def analyze(config: DictConfig) -> int:
    """Run an analysis and return the exit code: 1 where a prompt had to be skipped."""
    check_config(config, AnalyzeSettings)
    if config.sweep_report is not None:
        return report_sweep(config.sweep_report, console)
    check_launch(config)
    if config.timeline is not None:
        for page in write_timelines(config.timeline):
            console.print(Text(f"timeline {page}"), soft_wrap=True)
        return 0
    with claim(Path(config.paths.output_dir)):
        folder = open_run(config)
        code = run(config, folder)
        keep_config(config, folder)
    return code


def run(config: DictConfig, folder: Path) -> int:
    """Do what the configuration asks of a model, write it into the run's folder, and return the exit code."""
    if config.compare is not None:
        return compare(config, folder, load, attribute_task, console)
    if config.study is not None:
        return run_study(config, folder, load, console)
    done = attribute_task(config, folder, lambda: load(config))
    if done is None:
        return 0
    print_results(done.results, console, config.report.shown)
    return tell_skipped(done)


@shell
@hydra.main(version_base="1.3", config_path="pkg://depass_lightning.conf", config_name="analyze")
def main(config: DictConfig) -> None:
    """Run the command with the configuration that Hydra composes."""
    analyze(config)


def load(config: DictConfig) -> DePass:
    """Load the model that the configuration names.

    Raises:
        DePassError: it cannot be loaded; the message says what is missing, and where to get it.
    """
    model = config.model
    if config.checkpoint is not None:
        plain = config.copy()
        plain.checkpoint = None
        return load_entry(config.checkpoint, plain, load)
    if not first_process():
        disable_progress_bar()
    expect_hub(model.name)
    options = {key: model[key] for key in ("revision", "dtype", "device_map")}
    options["compute_dtype"] = config.compute_dtype
    try:
        return DePass.from_pretrained(model.name, **{k: v for k, v in options.items() if v is not None})
    except DePassError as error:
        hints = []
        if model.gated and "gated" not in str(error):
            hints.append(f"it is gated too: ask for access at https://huggingface.co/{model.name}")
        if "/" in model.name and "path" not in model:
            hints.append("a folder is given as model=hf model.name=..., a file as model=gguf model.path=...")
        raise DePassError("; ".join([str(error), *hints])) from error


def tell_skipped(done: Done) -> int:
    """Say how many prompts were skipped, and return the exit code."""
    if not done.skipped:
        return 0
    first = done.skipped[0]
    name = f"row {first['row']}" if "row" in first else f"prompt {first['id']!r}"
    skipped = f"{len(done.skipped)} of {done.prompts} prompts were skipped, listed in {done.listed}"
    tell(f"{skipped}; {name}: {first['reason']}", "red")
    return 1
