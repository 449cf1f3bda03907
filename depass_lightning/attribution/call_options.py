"""The keyword arguments of `DePass`'s calls, for type checkers."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from depass_lightning.attribution.automatic_rule import Automatic
from depass_lightning.attribution.settings import BiasMode, RuleOptions, RulePath
from depass_lightning.engine.rules import RuleName
from depass_lightning.prompts import IdsLike
from depass_lightning.sources import Source
from depass_lightning.utils.sections import Message


class SourcesOptions(RuleOptions, total=False):
    """The keyword arguments of a call that returns scores."""

    compat: Literal["paper_code"] | None
    batch_size: int
    progress: bool


class OnePrompt(TypedDict, total=False):
    """What a call takes in place of one prompt."""

    messages: Sequence[Message] | None


class SeveralPrompts(TypedDict, total=False):
    """What a call takes in place of several prompts."""

    messages: Sequence[Sequence[Message]] | None
    input_ids: IdsLike | None
    attention_mask: IdsLike | None


class SourcesOne(SourcesOptions, OnePrompt, total=False):
    """The keyword arguments of a call that returns several sources' scores of one prompt."""


class SourcesSeveral(SourcesOptions, SeveralPrompts, total=False):
    """The keyword arguments of a call that returns several sources' scores of several prompts."""


class AttributeOne(SourcesOne, total=False):
    """The keyword arguments of a call that returns the scores of one prompt or conversation."""

    source: Source | str | None


class AttributeSeveral(SourcesSeveral, total=False):
    """The keyword arguments of a call that returns the scores of several prompts."""

    source: Source | str | None


class EstimateOptions(RuleOptions, total=False):
    """The keyword arguments of a call that estimates what scores cost."""

    messages: Sequence[Message] | Sequence[Sequence[Message]] | None


class DecomposeOptions(TypedDict, total=False):
    """The keyword arguments of a call that returns states: those of `attribute` that are not about scores."""

    source: Source | str | None
    rule: Automatic | RuleName | RulePath
    temperature: float
    bias: BiasMode
    compat: Literal["paper_code"] | None


class DecomposeOne(DecomposeOptions, OnePrompt, total=False):
    """The keyword arguments of a call that returns the states of one prompt or conversation."""


class DecomposeSeveral(DecomposeOptions, SeveralPrompts, total=False):
    """The keyword arguments of a call that returns the states of several prompts."""

    batch_size: int
