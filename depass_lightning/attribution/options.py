"""The keyword arguments that the methods of `DePass` share, for type checkers, and the values they take."""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

from depass_lightning.engine.rules import AttentionPath, RuleName
from depass_lightning.errors import DePassError
from depass_lightning.prompts import IdsLike
from depass_lightning.sources import Source

BiasMode = Literal["component", "drop"]
Engine = Literal["auto", "propagate", "adjoint"]

CHOICES: dict[str, tuple[str | None, ...]] = {
    "bias": get_args(BiasMode),
    "compat": (None, "paper_code"),
    "engine": get_args(Engine),
    "attention_path": get_args(AttentionPath),
}


class RuleOptions(TypedDict, total=False):
    """How neurons are shared, what becomes of constants, and how scores are computed."""

    rule: RuleName
    temperature: float
    bias: BiasMode
    engine: Engine
    attention_path: AttentionPath


class AttributeOptions(RuleOptions, total=False):
    """The keyword arguments that every call which returns scores takes."""

    compat: Literal["paper_code"] | None
    batch_size: int
    progress: bool
    input_ids: IdsLike | None
    attention_mask: IdsLike | None


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse a list of sources that is empty or contains anything else.

    Args:
        sources: the sources of a call.

    Raises:
        DePassError: the list is empty, or an entry is not a source.
    """
    if not sources:
        raise DePassError("the list of sources is empty; pass at least one, such as Tokens()")
    for source in sources:
        if not isinstance(source, Source):
            raise DePassError(f"source {source!r} is a {type(source).__name__}; pass Tokens(), Heads(), ...")


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
