"""Finds the language model and its tokenizer in the module that is trained."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import device_of
from depass_lightning.models.families import families_of_class
from depass_lightning.models.output_heads import has_head
from depass_lightning.models.sharding import check_shards, is_sharded, opened

ModelFinder = str | Callable[[Any], nn.Module]


def find_model(
    module: nn.Module, where: ModelFinder | None = None, trained: Collection[nn.Parameter] = ()
) -> nn.Module:
    """Return the causal language model or classifier inside a module, also a compiled or LoRA-wrapped one.

    Args:
        module: the module that is trained.
        where: the path of an attribute ("policy.model"), or a function that takes the module and returns the
            model; None to search.
        trained: the parameters that are trained: of several models, the one that has them is taken, rather
            than a reference or an average.

    Raises:
        DePassError: there is no model, or more than one.
    """
    root: Any = module
    if isinstance(where, str):
        try:
            root = attrgetter(where)(module)
        except AttributeError as error:
            holder = type(module).__name__
            raise DePassError(f"model={where!r} is no attribute of {holder}: {error}") from error
    elif where is not None:
        root = where(module)
    if not isinstance(root, nn.Module):
        raise DePassError(f"model= leads to a {type(root).__name__}; it must lead to a torch module")
    models = _outermost_models(root)
    if len(models) > 1:
        ids = {id(parameter) for parameter in trained}
        held = {
            path: model
            for path, model in models.items()
            if any(id(parameter) in ids for parameter in model.parameters())
        }
        models = held if len(held) == 1 else models
    if len(models) == 1:
        return next(iter(models.values()))
    inside = f"inside {type(root).__name__}"
    if not models:
        raise DePassError(
            f"there is no causal language model of transformers or of a declared class, and no classifier, "
            f"{inside}; hold one as a submodule, name it with model='path.to.it', or declare its class "
            "(docs/your-own-model.md)"
        )
    paths = ", ".join(repr(path) for path in models)
    raise DePassError(f"there are {len(models)} language models {inside}: {paths}; choose with model=...")


class TrackedModel:
    """The language model inside a module, which may be replaced, or have parts of it replaced.

    Args:
        module: the module that is trained.
        where: see `find_model`.
        trained: see `find_model`.

    Raises:
        DePassError: there is no model, or more than one, or its weights are sharded other
            than by FSDP2.
    """

    def __init__(
        self, module: nn.Module, where: ModelFinder | None = None, trained: Collection[nn.Parameter] = ()
    ) -> None:
        self._find = lambda: find_model(module, where, trained)
        self._module = module
        self.model = self._find()
        check_shards(self.model)
        self._modules = list(self.model.modules())

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return device_of(self.model)

    @property
    def sharded(self) -> bool:
        """Whether every rank must run every probe, because all ranks gather the weights together."""
        return is_sharded(self.model)

    def opened(self) -> AbstractContextManager[None]:
        """Gather the sharded weights outside of the blocks inside the context."""
        return opened(self.model, around=self._module)

    def replaced(self) -> bool:
        """Find the model again, and return whether a module of it is another one than last time.

        Raises:
            DePassError: there is no model any more, or more than one.
        """
        self.model, before = self._find(), self._modules
        self._modules = list(self.model.modules())
        return list(map(id, before)) != list(map(id, self._modules))


def find_tokenizer(
    model: nn.Module, tokenizers: Sequence[Any] = (), needed: bool = True
) -> PreTrainedTokenizerBase | None:
    """Return the first tokenizer that there is, or the one of the model's name.

    Args:
        model: the language model.
        tokenizers: where a tokenizer may be, by priority: None, a tokenizer, or a processor that has one.
        needed: whether probes are text; ids need no tokenizer, and are then displayed as numbers.

    Raises:
        DePassError: there is none, but one is needed, or it is not a tokenizer of transformers.
    """
    for candidate in tokenizers:
        if isinstance(candidate, ProcessorMixin):
            candidate = getattr(candidate, "tokenizer", None)
        if candidate is not None and (needed or isinstance(candidate, PreTrainedTokenizerBase)):
            return _checked(candidate)
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
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
        f"({reason}); give tokenizer=..., or set `tokenizer` on the module that is trained or its data module"
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
        f"the probes need a tokenizer of transformers, but `tokenizer` is a {kind}: give tokenizer=...{wrap}"
    )


def _outermost_models(root: nn.Module) -> dict[str, nn.Module]:
    """Return the language models and classifiers, by path, that are not inside another one."""
    models: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        inner = any(path.startswith(f"{outer}." if outer else "") for outer in models)
        with_head = isinstance(module, PreTrainedModel) and has_head(module)
        if not inner and (with_head or families_of_class(module)):
            models[path] = module
    return models
