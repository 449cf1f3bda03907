"""What the callback asks, and whom: the held-out prompts, and the language model inside a LightningModule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from depass_lightning import tasks
from depass_lightning.errors import DePassError
from depass_lightning.targets import TargetLike
from depass_lightning.tasks import Example, Task

ProbeSource = str | Path | Task | Sequence[Example | tuple[str, TargetLike]]
ModelFinder = str | Callable[[LightningModule], nn.Module]


@dataclass(frozen=True)
class Probe:
    """One held-out prompt, and what is asked about it.

    Attributes:
        id: its name, the same in every run: similarities follow it.
        prompt: the text.
        target: what is explained; None for the model's own next token.
        evidence: the character ranges [start, end) of the prompt that hold the right tokens; empty where
            they are not known.
    """

    id: str
    prompt: str
    target: TargetLike
    evidence: tuple[tuple[int, int], ...] = ()


def name_sets(probes: ProbeSource | Mapping[str, ProbeSource]) -> dict[str, ProbeSource]:
    """Give every probe set its name: a mapping's key, a task's name, a file's stem; "probes" for a list."""
    if isinstance(probes, Mapping):
        if not probes:
            raise DePassError("probes is an empty mapping; give at least one set, such as {'ioi': 'ioi'}")
        return dict(probes)
    if isinstance(probes, Task):
        return {probes.name: probes}
    if isinstance(probes, str | Path):
        return {Path(probes).stem if _is_file(probes) else str(probes): probes}
    return {"probes": probes}


def load_set(name: str, probes: ProbeSource, size: int) -> list[Probe]:
    """Load the first `size` probes of a set.

    Args:
        name: the set's name, for errors.
        probes: the name of a task, a task, a file of JSON lines, or a list of examples and of pairs of a
            prompt and its target.
        size: how many to take at most.

    Raises:
        DePassError: for something that is none of these, an empty set, or two probes of one name.
    """
    if isinstance(probes, str | Path):
        # a task generates as many as are asked for; a file may hold fewer
        probes = tasks.load("jsonl", path=probes) if _is_file(probes) else tasks.load(str(probes), size=size)
    if not isinstance(probes, Task | Sequence):
        raise DePassError(
            f"the probes of {name!r} are a {type(probes).__name__}; give a task or its name, a file, "
            "or a list of (prompt, target)"
        )
    loaded = [_probe(name, i, probes[i]) for i in range(min(size, len(probes)))]
    if not loaded:
        raise DePassError(f"the probe set {name!r} is empty; give it at least one prompt")
    ids = [probe.id for probe in loaded]
    if twice := next((id for id in ids if ids.count(id) > 1), None):
        raise DePassError(f"two probes of {name!r} are both named {twice!r}; give each an id of its own")
    return loaded


def find_model(pl_module: LightningModule, where: ModelFinder | None = None) -> PreTrainedModel:
    """Find the causal language model inside a LightningModule; compiled and LoRA-wrapped ones are found too.

    Args:
        pl_module: the module that is trained.
        where: the path of an attribute ("policy.model"), or a function that takes the module and returns the
            model; None to search.

    Raises:
        DePassError: where there is none, or more than one.
    """
    root: Any = pl_module
    if isinstance(where, str):
        try:
            root = attrgetter(where)(pl_module)
        except AttributeError as error:
            holder = type(pl_module).__name__
            raise DePassError(f"model={where!r} is no attribute of {holder}: {error}") from error
    elif where is not None:
        root = where(pl_module)
    if not isinstance(root, nn.Module):
        raise DePassError(f"model= leads to a {type(root).__name__}; it must lead to a torch module")
    found = _outermost_models(root)
    if len(found) == 1:
        return next(iter(found.values()))
    inside = f"inside {type(root).__name__}"
    if not found:
        raise DePassError(
            f"there is no causal language model of transformers {inside}; hold one as a submodule, or "
            "name it with DePassCallback(model='path.to.it')"
        )
    paths = ", ".join(repr(path) for path in found)
    raise DePassError(
        f"there are {len(found)} language models {inside}: {paths}; choose with DePassCallback(model=...)"
    )


def find_tokenizer(
    trainer: Trainer,
    pl_module: LightningModule,
    model: PreTrainedModel,
    given: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """Find the tokenizer: the given one, the module's, the data module's, or that of the model's own name.

    Raises:
        DePassError: where there is none.
    """
    datamodule = getattr(trainer, "datamodule", None)
    for holder in (given, getattr(pl_module, "tokenizer", None), getattr(datamodule, "tokenizer", None)):
        if holder is not None:
            return holder
    name = model.config._name_or_path
    reason: object = "the model's configuration does not say where it came from"
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except Exception as error:  # whatever the hub, the disk or the file's parser raised
            reason = error
    raise DePassError(
        f"the probes need the tokenizer of {name or type(model).__name__}, which could not be loaded "
        f"({reason}); give DePassCallback(tokenizer=...), or set `tokenizer` on the LightningModule or its "
        "data module"
    )


def _probe(set_name: str, index: int, item: Any) -> Probe:
    """Turn one entry of a set into a probe."""
    if isinstance(item, Example):
        return Probe(item.id, item.prompt, item.target(), tuple(item.evidence_ranges()))
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str):
        return Probe(f"{set_name}-{index}", item[0], item[1])
    raise DePassError(f"probe {index} of {set_name!r} is {item!r}; give (prompt, target), or an Example")


def _is_file(probes: str | Path) -> bool:
    return isinstance(probes, Path) or Path(probes).suffix in {".json", ".jsonl"}


def _outermost_models(root: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the language models with a head, by path, that stand in no other such model."""
    found: dict[str, PreTrainedModel] = {}
    for path, module in root.named_modules():
        inner = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if not inner and isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            found[path] = module
    return found
