"""`python analyze.py`: attribute a task's prompts, measure faithfulness, and write the results."""

from pathlib import Path

from omegaconf import DictConfig
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from depass_lightning.commands.attribute_task import AttributedTask, attribute_task
from depass_lightning.commands.check import Check
from depass_lightning.commands.circuit_task import run_circuits
from depass_lightning.commands.compare import compare, load_entry
from depass_lightning.commands.console import (
    command,
    console,
    open_page,
    open_run,
    save_config,
    work_offline_if_unreachable,
)
from depass_lightning.commands.launchers import check_launch
from depass_lightning.commands.outputs import print_results
from depass_lightning.commands.resume import lock_run_folder
from depass_lightning.commands.schema import AnalyzeSettings, check_config
from depass_lightning.commands.serve import serve
from depass_lightning.commands.shell import first_process, print_stderr
from depass_lightning.commands.study import run_study
from depass_lightning.commands.sweep_report import report_sweep
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.commands.watch import watch
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError


@command
def analyze(config: DictConfig) -> int:
    """Run an analysis and return the exit code: 1 if a prompt was skipped, or a check failed."""
    check_config(config, AnalyzeSettings)
    if config.sweep_report is not None:
        code = report_sweep(config.sweep_report, console)
        open_page(config, Path(config.sweep_report) / "sweep.html")
        return code
    check_launch(config)
    if config.serve:
        return serve(config, load, console)
    if config.timeline is not None:
        for page in write_timelines(config.timeline):
            console.print(Text(f"timeline {page}"), soft_wrap=True)
            open_page(config, page)
        return 0
    with lock_run_folder(Path(config.paths.output_dir)):
        folder = open_run(config)
        code = run(config, folder)
        save_config(config, folder)
        open_page(config, folder / ("report.html" if config.compare is None else "compare.html"))
    return code


def run(config: DictConfig, folder: Path) -> int:
    """Run a comparison, a watch, circuits, a study or a task, write its files, and return the exit code."""
    if config.compare is not None:
        return compare(config, folder, load, attribute_task, console)
    if config.watch.folder is not None:
        return watch(config, folder, load)
    if config.circuit:
        return run_circuits(config, folder, load, console)
    if config.study is not None:
        return run_study(config, folder, load, console)
    check = Check.of(config)
    attributed = attribute_task(config, folder, lambda: load(config))
    if attributed is None:
        return 0
    print_results(attributed.results, console, config.report.shown)
    failed = 0 if check is None else check.run(attributed.results.summary, folder)
    return max(failed, print_skipped(attributed))


def load(config: DictConfig) -> DePass:
    """Load the model that the configuration names.

    Raises:
        DePassError: the model cannot be loaded; the message names what is missing and where to get it.
    """
    model = config.model
    if config.checkpoint is not None:
        plain = config.copy()
        plain.checkpoint = None
        return load_entry(config.checkpoint, plain, load)
    if not first_process():
        disable_progress_bar()
    work_offline_if_unreachable(model.name)
    options = {key: model[key] for key in ("revision", "dtype", "device_map")}
    options["compute_dtype"] = config.compute_dtype
    try:
        return DePass.from_pretrained(
            model.name, **{key: value for key, value in options.items() if value is not None}
        )
    except DePassError as error:
        hints = []
        if model.gated and "gated" not in str(error):
            hints.append(f"it is gated too: ask for access at https://huggingface.co/{model.name}")
        if "/" in model.name and "path" not in model:
            hints.append("a folder is given as model=hf model.name=..., a file as model=gguf model.path=...")
        raise DePassError("; ".join([str(error), *hints])) from error


def print_skipped(attributed: AttributedTask) -> int:
    """Print how many prompts were skipped, and return the exit code."""
    if not attributed.skipped:
        return 0
    first = attributed.skipped[0]
    name = f"row {first['row']}" if "row" in first else f"prompt {first['id']!r}"
    counts = f"{len(attributed.skipped)} of {attributed.prompts} prompts were skipped"
    print_stderr(f"{counts}, listed in {attributed.skipped_path}; {name}: {first['reason']}", "red")
    return 1
