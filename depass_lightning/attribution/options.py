"""The keyword arguments that the methods of `DePass` share, for type checkers, and how sources are read."""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

from depass_lightning.engine.rules import Path, RuleName
from depass_lightning.errors import DePassError
from depass_lightning.prompts import IdsLike
from depass_lightning.sources import Source, Tokens

BiasMode = Literal["component", "drop"]
Engine = Literal["auto", "propagate", "adjoint"]

CHOICES: dict[str, tuple[str | None, ...]] = {
    "bias": get_args(BiasMode),
    "compat": (None, "release"),
    "engine": get_args(Engine),
    "path": get_args(Path),
}


class RuleOptions(TypedDict, total=False):
    """How neurons are shared, and what becomes of constants."""

    rule: RuleName
    temperature: float
    bias: BiasMode


class WayOptions(RuleOptions, total=False):
    """And on which way scores are found."""

    engine: Engine
    path: Path


class PassOptions(RuleOptions, total=False):
    """Of every call."""

    compat: Literal["release"] | None
    batch_size: int
    input_ids: IdsLike | None
    attention_mask: IdsLike | None


class ScoreOptions(PassOptions, WayOptions, total=False):
    """Of a call that gives scores."""

    progress: bool


class AttributeOptions(ScoreOptions, total=False):
    """Of a call that gives the scores of one source."""

    source: Source | None


class StatesOptions(PassOptions, total=False):
    """Of a call that gives states."""

    source: Source | None


class DecomposeOptions(StatesOptions, total=False):
    """Of a call that gives one layer's states."""

    to_layer: int | None


def as_sources(source: Source | Sequence[Source] | None) -> tuple[Source, ...]:
    """Return one source or several as a tuple, `Tokens()` where none is given.

    Args:
        source: what a call was given.

    Raises:
        DePassError: the list is empty, or something in it is no source.
    """
    sources = (Tokens(),) if source is None else (source,) if isinstance(source, Source) else tuple(source)
    for own in sources:
        if not isinstance(own, Source):
            raise DePassError(f"source {own!r} is a {type(own).__name__}; pass Tokens(), Heads(), ...")
    if not sources:
        raise DePassError("the list of sources is empty")
    return sources


def check_choices(**settings: str | None) -> None:
    """Refuse a value that a setting does not have, which no type checker has seen.

    Args:
        settings: values by the names in `CHOICES`.

    Raises:
        DePassError: there is none of that name.
    """
    for name, value in settings.items():
        if value not in CHOICES[name]:
            known = " or ".join(map(repr, CHOICES[name]))
            raise DePassError(f"{name}={value!r} is unknown; choose {known}")
