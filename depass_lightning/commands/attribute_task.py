"""Attribute a task's prompts with one model: an analysis, or one model of a comparison."""

import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from depass_lightning import __version__, tasks
from depass_lightning.attribution.automatic_rule import AUTO, automatic_rule
from depass_lightning.attribution.settings import DEFAULTS
from depass_lightning.callbacks import (
    AttributionProgress,
    AttributionWriter,
    ComponentParallelCallback,
    ProcessMonitor,
)
from depass_lightning.commands.console import (
    instantiate_each,
    loggers_of,
    predict,
)
from depass_lightning.commands.outputs import Results, number_of, write_results
from depass_lightning.commands.shell import first_process, print_stderr, waiting
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.logit_lens import PageLens
from depass_lightning.methods import DePassMethod, Method, make_method
from depass_lightning.models.decoder import Decoder
from depass_lightning.modules.attribution_module import AttributionModule, Explained
from depass_lightning.modules.prompt_datamodule import PromptData
from depass_lightning.monitoring.sinks import is_named
from depass_lightning.reports.numbers import model_name
from depass_lightning.sources import Source
from depass_lightning.storage import (
    Manifest,
    RunStore,
    keep_manifest,
    task_fingerprint,
    weights_fingerprint,
)
from depass_lightning.tasks import Task
from depass_lightning.utils.atomic_files import file_hash
from depass_lightning.utils.tokenization import beginning_of, encode

log = logging.getLogger(__name__)

ESTIMATE_THRESHOLD = 10.0  # seconds; shorter estimates are not printed
TRIALS = 8  # prompts on which the settings are tried; if all fail, the run ends
SHOWN = 5  # damaged files listed by name
# The part of the configuration that determines the scores; the rest is about hardware, batches and reports.
MANIFEST_KEYS = (
    "model",
    "task",
    "source",
    "method",
    "rule",
    "target",
    "compute_dtype",
    "bias",
    "attention_path",
    "compat",
    "seed",
    "faithfulness",
    "states",
)
PARAMETERS: dict[str, tuple[str, ...]] = {"softmax": ("temperature",), "shap": ("score_weight",)}  # of rules
DESCRIPTIVE_KEYS = ("parameters", "context", "licence", "gated")  # of a model's entry; for the reader only


@dataclass(frozen=True)
class AttributedTask:
    """A task that was attributed.

    Attributes:
        results: the output files and their content.
        skipped: the prompts that could not be attributed, each with the `reason`.
        skipped_path: the file that lists them.
        prompts: the number of prompts, skipped ones included.
    """

    results: Results
    skipped: list[dict[str, Any]]
    skipped_path: Path
    prompts: int


def attribute_task(config: DictConfig, folder: Path, load: Callable[[], DePass]) -> AttributedTask | None:
    """Attribute the prompts of the configured task, and write and log the results.

    Returns:
        The attributed task; None on processes other than the first.
    """
    with loggers_of(config) as loggers:
        return _attribute(config, folder, load, loggers)


def _attribute(
    config: DictConfig, folder: Path, load: Callable[[], DePass], loggers: list[Logger]
) -> AttributedTask | None:
    started = time.perf_counter()
    source = instantiate(config.source, _convert_="all")
    task = task_of(config)
    with waiting(f"loading {config.model.name}"):
        depass = load()
    task = task.formatted(depass.tokenizer)
    resolve_rule(config, depass.decoder, source)
    fingerprint = weights_fingerprint(depass.model)
    manifest = manifest_of(config, fingerprint, task)
    resumed = first_process() and keep_manifest(manifest, folder / "attributions")
    generates = config.target.kind == "generation"
    if generates and config.faithfulness is not None:
        print_stderr(
            "what is generated is explained token by token; faithfulness and right answers are not measured"
        )
    together = splits_components(config)
    writer = AttributionWriter(
        folder,
        resume=resumed,
        expected=len(task),
        rows=config.target.get("max_new_tokens", 1),
        skipped=task.skipped,
        together=together,
    )
    kept = print_kept(writer, len(task)) if resumed else 0
    trainer = trainer_of(config, writer, loggers)
    module = attribution_module(config, source, depass, task, fingerprint)
    data = PromptData(
        task,
        config.batch_size,
        length=token_counter(depass),
        done=lambda: writer.done,
        together=together,
    )
    if not generates and kept < len(task):
        print_estimate(config, depass, task, module, trainer)
    predict(trainer, module, data, lambda: _kept(writer.run_store))
    if not trainer.is_global_zero:
        return None
    skipped = writer.run_store.skipped()
    results = write_results(
        folder,
        writer.run_store.path,
        about={
            "skipped": len(skipped),
            **({"attributed_before": kept} if kept else {}),
            "seconds": time.perf_counter() - started,
            **describe(config, depass, trainer, fingerprint),
        },
        title=f"What {model_name(config.model.name)} relies on",
        subtitle=subtitle_of(config, task),
        size=config.report,
        lens=PageLens(depass, source),
        generated=generates,
    )
    log_results(loggers, results)
    return AttributedTask(results, skipped, writer.run_store.skipped_path, len(task) + len(task.skipped))


def subtitle_of(config: DictConfig, task: Task) -> str:
    """Return the page's subtitle: the prompts, a file's by its name, and the target."""
    name = Path(config.task.path).name if config.task.get("path") else task.name
    named = [] if typed(config) else [name]
    counted = [f"{len(task):,} prompts"] if len(task) > 1 else []
    return ", ".join([*named, *counted, f"target: {config.target.kind}"])


def typed(config: DictConfig) -> bool:
    """Return whether the prompts are typed: their targets are then to be explained, and need not be right."""
    return bool(config.task.get("rows"))


def task_of(config: DictConfig) -> Task:
    """Load the configured task."""
    options: Any = OmegaConf.to_container(config.task, resolve=True)
    return tasks.load(**options)


def trainer_of(config: DictConfig, writer: AttributionWriter, loggers: list[Logger]) -> Trainer:
    """Build the configured trainer with the callbacks of an analysis."""
    # `_partial_`: Hydra would copy objects passed as arguments into the configuration.
    return instantiate(config.trainer, _partial_=True)(
        callbacks=[
            writer,
            AttributionProgress(log_every=config.log_every),
            ProcessMonitor(),
            *([ComponentParallelCallback()] if writer.together else []),
            *instantiate_each(config.get("callbacks")),
        ],
        logger=loggers or False,
    )


def _kept(run_store: RunStore) -> str:
    """Describe the finished part of an interrupted analysis."""
    finished = run_store.counted()
    return f"{finished:,} prompts are kept in {run_store.folder}" if finished else ""


def splits_components(config: DictConfig) -> bool:
    """Return whether processes split each prompt's components instead of the prompts.

    Raises:
        DePassError: `parallel` is neither of the two, or is combined with a generation.
    """
    if config.parallel not in ("prompts", "components"):
        raise DePassError(f"parallel={config.parallel!r} is unknown; choose 'prompts' or 'components'")
    together = config.parallel == "components"
    if together and config.target.kind == "generation":
        raise DePassError("parallel=components explains no generated tokens; leave out one of the two")
    return together


def print_kept(writer: AttributionWriter, prompts: int) -> int:
    """Print and return how many prompts an earlier run has attributed, and name damaged files."""
    damaged = writer.tidy()
    for path in damaged[:SHOWN]:
        print_stderr(f"{path} is damaged or missing; its prompts are attributed again", "yellow")
    if len(damaged) > SHOWN:
        print_stderr(f"and {len(damaged) - SHOWN:,} more files", "yellow")
    kept = len(writer.done or ())
    if kept:
        print_stderr(f"{kept:,} of {prompts:,} prompts have been attributed before", "yellow")
    return kept


def manifest_of(config: DictConfig, fingerprint: str, task: Task) -> Manifest:
    """Return the manifest: everything that determines the run's scores."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    settings: dict[str, Any] = {name: plain[name] for name in MANIFEST_KEYS}
    settings["model"] = {
        key: value for key, value in settings["model"].items() if key not in DESCRIPTIVE_KEYS
    }
    for group in ("source", "rule"):  # a subspace's or a rule's file may be written again under its name
        if (path := settings[group].get("path")) and Path(path).is_file():
            settings[group]["file"] = file_hash(path)[:16]
    return Manifest(
        settings=settings,
        weights=fingerprint,
        task=task_fingerprint(task),
        prompts=len(task),
        versions=versions(),
    )


def token_counter(depass: DePass) -> Callable[[str], int]:
    """Return a function that counts a prompt's tokens, at most those of its beginning."""
    tokenizer = depass.tokenizer
    assert tokenizer is not None
    limit = depass.decoder.max_positions
    return lambda prompt: len(encode(beginning_of(prompt, limit), tokenizer).ids)


def attribution_module(
    config: DictConfig, source: Source, depass: DePass, task: Task, fingerprint: str
) -> AttributionModule:
    """Build the configured attribution module."""
    measures = [] if config.faithfulness is None else [instantiate(config.faithfulness, _convert_="all")]
    return AttributionModule(
        method_of(config, source, depass),
        explained=Explained(**config.target),
        measures=measures,
        states=config.states,
        run={"model": config.model.name, "fingerprint": fingerprint},
        trial=trials([example.prompt for example in task]),
        judged=not typed(config),
    )


def trials(prompts: Sequence[str]) -> list[str]:
    """Return up to `TRIALS` prompts of increasing length; several, because one of them may be invalid."""
    ordered = sorted(set(prompts), key=len)
    return [ordered[index] for index in sorted({k * len(ordered) // TRIALS for k in range(TRIALS)})]


def resolve_rule(config: DictConfig, decoder: Decoder, source: Source) -> None:
    """Replace the rule `auto` by the one that it takes, for the run's files and its resumption."""
    if config.rule.name == AUTO:
        engine = "auto" if config.states is None else "propagate"
        name = automatic_rule(decoder, source, config.compat, engine, config.attention_path)
        config.rule = {"name": name, **{key: DEFAULTS[key] for key in PARAMETERS.get(name, ())}}


def rule_options(config: DictConfig) -> dict[str, Any]:
    """Return the configured rule and its settings, as arguments of `DePass.attribute`."""
    rule: Any = OmegaConf.to_container(config.rule)
    name, path = rule.pop("name"), rule.pop("path", None)
    return {"rule": path or name, **rule}


def method_of(config: DictConfig, source: Source, depass: DePass) -> Method:
    """Return the configured attribution method: DePass with its options, or another one."""
    options: Any = OmegaConf.to_container(config.method, resolve=True)
    name = options.pop("name")
    if name == DePassMethod.name:
        options |= rule_options(config)
        options |= {key: config[key] for key in ("bias", "compat", "attention_path")}
    return make_method(name, depass, source, **options)


def print_estimate(
    config: DictConfig, depass: DePass, task: Task, module: AttributionModule, trainer: Trainer
) -> None:
    """Print the estimated time and memory of the scores if they take long."""
    if not first_process() or module.decomposing is None:
        return
    fitting = [example.prompt for example in task if example.prompt.strip()]
    limit, count = depass.decoder.max_positions, token_counter(depass)
    fitting = [prompt for prompt in fitting if limit is None or count(prompt) <= limit]
    if not fitting:
        return
    module.to(trainer.strategy.root_device)  # the trainer moves it there, too
    try:
        cost = depass.estimate(fitting, batch_size=config.batch_size, **module.decomposing.settings)
    except Exception:  # an invalid prompt is reported when it is attributed
        log.debug("there is no estimate", exc_info=True)
        return
    if cost.seconds > ESTIMATE_THRESHOLD:
        print_stderr(f"the scores of {len(fitting):,} prompts: {cost}")


def describe(config: DictConfig, depass: DePass, trainer: Trainer, fingerprint: str) -> dict[str, Any]:
    """Return the summary's description of the run: everything that its numbers depend on."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {
        "model": {
            **plain["model"],
            "fingerprint": fingerprint,
            "parameters": sum(parameter.numel() for parameter in depass.model.parameters()),
        },
        **{name: plain[name] for name in ("task", "source", "method", "rule", "target")},
        "settings": {
            "compute_dtype": str(depass.decoder.dtype).removeprefix("torch."),
            **{name: plain[name] for name in ("bias", "attention_path", "compat", "seed", "batch_size")},
        },
        "hardware": {"device": trainer.strategy.root_device.type, "processes": trainer.world_size},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute the scores."""
    packages = ("transformers", "lightning", "datasets")
    return {
        "depass_lightning": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which a wheel's metadata may leave out
        **{package: importlib.metadata.version(package) for package in packages},
    }


def log_results(loggers: list[Logger], results: Results) -> None:
    """Log the run's numbers with every logger, and its page and table with Weights & Biases."""
    numbers = {f"analysis/{name}": number_of(entry) for name, entry in results.summary.items()}
    for logger in loggers:
        logger.log_metrics({name: number for name, number in numbers.items() if number is not None})
        if is_named(logger, "WandbLogger") and results.page is not None:
            import wandb  # slow to import

            columns = ("id", "text", "target", "value", "prediction", "correct", "completeness")
            table = wandb.Table(
                columns=[*columns], data=[[row[name] for name in columns] for row in results.rows]
            )
            page = wandb.Html(results.page.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)
            wandb_logger: Any = logger  # the class of `lightning` or of `pytorch_lightning`
            wandb_logger.experiment.log({"analysis/report": page, "analysis/attributions": table})
        logger.save()
        logger.finalize("success")
