"""Finds the language model and its tokenizer in the LightningModule that is trained."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from depass_lightning.errors import DePassError

ModelFinder = str | Callable[[LightningModule], nn.Module]


def find_model(pl_module: LightningModule, where: ModelFinder | None = None) -> PreTrainedModel:
    """Return the causal language model inside a LightningModule, also a compiled or LoRA-wrapped one.

    Args:
        pl_module: the module that is trained.
        where: the path of an attribute ("policy.model"), or a function that takes the module and returns the
            model; None to search.

    Raises:
        DePassError: there is no model, or more than one.
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
    models = _outermost_models(root)
    if len(models) == 1:
        return next(iter(models.values()))
    inside = f"inside {type(root).__name__}"
    if not models:
        raise DePassError(
            f"there is no causal language model of transformers {inside}; hold one as a submodule, or "
            "name it with DePassCallback(model='path.to.it')"
        )
    paths = ", ".join(repr(path) for path in models)
    raise DePassError(
        f"there are {len(models)} language models {inside}: {paths}; choose with DePassCallback(model=...)"
    )


def find_tokenizer(
    trainer: Trainer,
    pl_module: LightningModule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    needed: bool = True,
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer: the callback's, the module's, the data module's, or the one of the model's name.

    Args:
        trainer: may have a data module.
        pl_module: the module that is trained.
        model: the language model in it.
        tokenizer: the callback's argument.
        needed: whether probes are text; ids need no tokenizer, and are then displayed as numbers.

    Raises:
        DePassError: there is none, but one is needed, or it is not a tokenizer of transformers.
    """
    datamodule = getattr(trainer, "datamodule", None)
    for candidate in (
        tokenizer,
        getattr(pl_module, "tokenizer", None),
        getattr(datamodule, "tokenizer", None),
    ):
        if candidate is not None and (needed or isinstance(candidate, PreTrainedTokenizerBase)):
            return _checked(candidate)
    name = model.config._name_or_path
    reason: object = "the model's configuration does not name its origin"
    if name:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # None would ask
        except Exception as error:  # of the hub, the disk or the parser
            reason = error
    if not needed:
        return None
    raise DePassError(
        f"the probes need the tokenizer of {name or type(model).__name__}, which could not be loaded "
        f"({reason}); give DePassCallback(tokenizer=...), or set `tokenizer` on the LightningModule or its "
        "data module"
    )


def _checked(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Reject another library's tokenizer, with which every probe would fail."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    kind = f"{type(tokenizer).__module__.partition('.')[0]}.{type(tokenizer).__name__}"
    wrap = (
        "; PreTrainedTokenizerFast(tokenizer_object=...) wraps it" if kind == "tokenizers.Tokenizer" else ""
    )
    raise DePassError(
        f"the probes need a tokenizer of transformers, but `tokenizer` is a {kind}: give "
        f"DePassCallback(tokenizer=...){wrap}"
    )


def _outermost_models(root: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the language models with a head, by path, that are not inside another one."""
    models: dict[str, PreTrainedModel] = {}
    for path, module in root.named_modules():
        inner = any(path.startswith(f"{outer}." if outer else "") for outer in models)
        if not inner and isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            models[path] = module
    return models
