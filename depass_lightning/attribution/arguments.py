"""The declared types of the public calls' arguments, checked in one place before anything is computed."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch

from depass_lightning.errors import DePassError
from depass_lightning.sources import Source
from depass_lightning.sources.base import is_whole

Call = TypeVar("Call", bound=Callable[..., Any])
Kind = tuple[str, Callable[[Any], bool]]


def _several(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _none_or(kind: Kind) -> Kind:
    told, fits = kind
    return f"{told} or None", lambda value: value is None or fits(value)


TEXT: Kind = ("a text", lambda value: isinstance(value, str))
WHOLE: Kind = ("a whole number", is_whole)
COUNT: Kind = ("a whole number of at least 1", lambda value: is_whole(value) and value >= 1)
NUMBER: Kind = ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool))
FLAG: Kind = ("True or False", lambda value: isinstance(value, bool))
DTYPE: Kind = ("a torch.dtype or its name", lambda value: isinstance(value, str | torch.dtype))
IDS: Kind = ("a tensor of whole numbers", lambda value: isinstance(value, torch.Tensor) or _several(value))
KINDS: dict[str, Kind] = {
    "name": TEXT,
    "revision": _none_or(TEXT),
    "device": _none_or(
        ("a device or its name", lambda value: isinstance(value, str | torch.device) or is_whole(value))
    ),
    "trust_remote_code": FLAG,
    "dtype": DTYPE,
    "compute_dtype": _none_or(DTYPE),
    "memory_budget": _none_or(COUNT),
    "max_positions": _none_or(COUNT),
    "tokenizer": _none_or(("a tokenizer", callable)),
    "prompt": _none_or(
        ("a text or a list of texts", lambda value: isinstance(value, str) or _several(value))
    ),
    "source": _none_or(("one source, such as Tokens()", lambda value: isinstance(value, Source))),
    "sources": ("a list of sources", lambda value: isinstance(value, Sequence)),
    "rule": TEXT,
    "temperature": NUMBER,
    "rule_temperature": NUMBER,
    "bias": TEXT,
    "compat": _none_or(TEXT),
    "engine": TEXT,
    "attention_path": TEXT,
    "to_layer": _none_or(WHOLE),
    "batch_size": COUNT,
    "progress": FLAG,
    "max_new_tokens": COUNT,
    "input_ids": _none_or(IDS),
    "attention_mask": _none_or(IDS),
}


def checked(call: Call) -> Call:
    """Refuse arguments of a call that are not of the type that `KINDS` declares for their name.

    Args:
        call: a function or method; what it passes on under `options` is checked, under `arguments` not.

    Raises:
        DePassError: by the call, naming the argument, what it is and what it must be.
    """
    names = list(inspect.signature(call).parameters)
    known = KINDS if "options" in names else {name: KINDS[name] for name in names if name in KINDS}

    @functools.wraps(call)
    def checking(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in known and not known[name][1](value):
                raise DePassError(
                    f"{name} is {value!r:.80}, a {type(value).__name__}; it must be {known[name][0]}"
                )
        return call(*args, **kwargs)

    return checking  # type: ignore[return-value]
