"""A call's arguments, and the settings of the pass that they define, or an error."""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Unpack, get_args

import torch
from pydantic import StringConstraints
from torch.distributed import ProcessGroup

from depass_lightning.attribution.automatic_rule import AUTO, Automatic, automatic_rule
from depass_lightning.engine.linear_rules import CalibratedRule, LinearPaths
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.parallel import ComponentParallel, ParallelRule
from depass_lightning.engine.rule_files import SUFFIX, check_rule
from depass_lightning.engine.rules import AttentionPath, CompetingRule, Rule, RuleName, goes_back, rule_named
from depass_lightning.engine.variants.paper_code import paper_code_rule
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Source, SplitContext
from depass_lightning.sources.base import is_whole
from depass_lightning.targets import LogitReading
from depass_lightning.utils.chat_templates import conversations_of

BiasMode = Literal["component", "drop"]
RulePath = Annotated[str, StringConstraints(pattern=rf"{re.escape(SUFFIX)}$")]
Engine = Literal["auto", "propagate", "adjoint"]


class RuleOptions(TypedDict, total=False):
    """How neurons are shared, what becomes of constants, and how scores are computed."""

    rule: Automatic | RuleName | RulePath
    temperature: float
    score_weight: float
    bias: BiasMode
    engine: Engine
    attention_path: AttentionPath


DEFAULTS = RuleOptions(
    rule="softmax",
    temperature=0.1,
    score_weight=0.5,
    bias="component",
    engine="auto",
    attention_path="content",
)
CHOICES: dict[str, tuple[str | None, ...]] = {
    "bias": get_args(BiasMode),
    "compat": (None, "paper_code"),
    "engine": get_args(Engine),
    "target": get_args(LogitReading),
    "attention_path": get_args(AttentionPath),
}


@dataclass(frozen=True)
class Settings:
    """How a pass is made: the same for every prompt of a call.

    Args:
        sources: what the state is split into, each source by itself.
        rule: how neurons are shared.
        rule_name: the rule's name.
        bias_mode: what becomes of constants: component, drop, or none where the model has none.
        keeps_constants: whether the call asked for a bias component.
        rounding: whether the model's own rounding has a component.
        compat: `paper_code` for the published code's behaviour, else None.
        adjoint: compute scores by a backward pass instead of propagating components.
        attention_path: content, or control for what is added when attention's probabilities are not held
            fixed.
        budget: the engine's memory.
        parallel: the processes that share the components, if several do.

    Raises:
        DePassError: a source approximates what this pass computes exactly, or does not have.
    """

    sources: tuple[Source, ...]
    rule: Rule
    rule_name: str
    bias_mode: str
    keeps_constants: bool
    rounding: bool
    compat: str | None
    adjoint: bool
    attention_path: str
    budget: Budget
    parallel: ComponentParallel | None = None

    def __post_init__(self) -> None:
        softmax = self.rule_name == "softmax" and self.compat is None and self.bias_mode != "drop"
        if not softmax and any(source.top is not None for source in self.sources):
            raise DePassError(
                "Neurons(top=) approximates rule='softmax' with every constant propagated (bias='component', "
                "no compat); leave top out"
            )

    @property
    def bias(self) -> bool:
        """Whether constants have a component of their own."""
        return self.bias_mode == "component"

    @property
    def constant_names(self) -> list[str]:
        """The components that follow a source's own in each group."""
        return ["bias"] * self.bias + ["rounding"] * self.rounding

    @property
    def complete(self) -> bool:
        """Whether scores must sum to the value."""
        exact = self.attention_path == "content" and self.compat is None and self.rule.complete
        return exact and self.keeps_constants

    @property
    def effective_rule(self) -> Rule | ParallelRule:
        """The rule, by which several processes share the components where they do."""
        if self.parallel is None or not isinstance(self.rule, CompetingRule):
            return self.rule
        return ParallelRule(self.rule, self.parallel)

    def with_constants(self, constants: Iterable[float]) -> "Settings":
        """Add the bias component for targets with a constant of their own, such as a probe's intercept."""
        return replace(self, bias_mode="component") if self.keeps_constants and any(constants) else self

    def split_context(self, prompts: Sequence[Prompt]) -> SplitContext:
        """Collect what sources must know of a batch's pass."""
        return SplitContext(
            prompts,
            bias=self.bias,
            competing=not isinstance(self.rule, LinearPaths),
            release=self.compat == "paper_code",
            budget=self.budget,
            spread=self.parallel,
        )


def settings_of(
    decoder: Decoder,
    sources: Sequence[Source],
    *,
    compat: str | None = None,
    memory_budget: int | None = None,
    process_group: ProcessGroup | None = None,
    **options: Unpack[RuleOptions],
) -> Settings:
    """Check a call's arguments together.

    Args:
        decoder: the model.
        sources: what states are split into; all under one rule.
        compat: `paper_code` for the published code's behaviour.
        memory_budget: bytes of working memory; None chooses them for the device.
        process_group: processes that share the components; a backward pass has none to share.
        options: those of `DEFAULTS` that differ.

    Raises:
        DePassError: a setting is unknown, or two of them exclude each other.
    """
    if unknown := sorted(options.keys() - DEFAULTS.keys()):
        raise DePassError(f"there is no setting {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    _check_sources(sources)
    chosen: dict[str, Any] = {**DEFAULTS, **options}
    engine, bias, path = chosen["engine"], chosen["bias"], chosen["attention_path"]
    check_choices(bias=bias, compat=compat, engine=engine, attention_path=path)
    if (name := chosen["rule"]) == AUTO:
        (name,) = {automatic_rule(decoder, source, compat, engine, path) for source in sources}
    rule = rule_named(name, chosen["temperature"], chosen["score_weight"])
    if isinstance(rule, CalibratedRule):
        check_rule(rule, decoder)
        name = rule.name
    adjoint = goes_back(rule, engine=engine, compat=compat, attention_path=path)
    for source in sources:
        source.layers(len(decoder.blocks))
    if compat == "paper_code":
        rule = paper_code_rule(rule, remainder=sources[0].positional)
    parallel = None if adjoint or process_group is None else ComponentParallel(process_group)
    if parallel is not None:
        _check_parallel(decoder, sources, compat)
    drops = compat == "paper_code" or bias == "drop"
    by_score = isinstance(rule, LinearPaths) and rule.uniform > 0 and decoder.adds_to_scores
    return Settings(
        sources=tuple(sources),
        rule=rule,
        rule_name=name,
        bias_mode="none" if not (decoder.has_biases or by_score) else "drop" if drops else "component",
        keeps_constants=bias == "component",
        # Rounding error can only be separated when the scores are complete.
        rounding=decoder.rounds and compat is None and rule.complete and path == "content",
        compat=compat,
        adjoint=adjoint,
        attention_path=path,
        budget=Budget.default(decoder.device, memory_budget),
        parallel=parallel,
    )


def check_choices(**settings: str | None) -> None:
    """Refuse a value that a setting does not have, which no type checker has seen.

    Args:
        settings: values by the names in `CHOICES`.

    Raises:
        DePassError: a setting has no such value.
    """
    for name, value in settings.items():
        if value not in CHOICES[name]:
            known = " or ".join(map(repr, CHOICES[name]))
            raise DePassError(f"{name}={value!r} is unknown; choose {known}")


def _check_sources(sources: Sequence[Source]) -> None:
    """Refuse a list of sources that is empty or contains anything else."""
    if not sources:
        raise DePassError("the list of sources is empty; pass at least one, such as Tokens()")
    for source in sources:
        if not isinstance(source, Source):
            raise DePassError(f"source {source!r} is a {type(source).__name__}; pass Tokens(), Heads(), ...")


def _check_parallel(decoder: Decoder, sources: Sequence[Source], compat: str | None) -> None:
    """Refuse what several processes cannot share: components that begin at every position, or experts."""
    for source in sources:
        if not source.positional:
            raise DePassError(
                f"the components of {source.kind!r} cannot be shared by processes; take Tokens() or Spans(), "
                "or give each process prompts of its own"
            )
    if compat is not None:
        raise DePassError(f"compat={compat!r} runs in one process only; leave process_group out")
    if any(block.mlp.experts is not None for block in decoder.blocks):
        raise DePassError(
            "the components of a model with a mixture of experts cannot be shared by processes; give each "
            "process prompts of its own"
        )


# The types that public calls declare, checked when they are called.

Call = TypeVar("Call", bound=Callable[..., Any])
Kind = tuple[str, Callable[[Any], bool]]


def _is_list(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _none_or(kind: Kind) -> Kind:
    name, fits = kind
    return f"{name} or None", lambda value: value is None or fits(value)


TEXT: Kind = ("a text", lambda value: isinstance(value, str))
WHOLE: Kind = ("a whole number", is_whole)
COUNT: Kind = ("a whole number of at least 1", lambda value: is_whole(value) and value >= 1)
NUMBER: Kind = ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool))
FLAG: Kind = ("True or False", lambda value: isinstance(value, bool))
DTYPE: Kind = ("a torch.dtype or its name", lambda value: isinstance(value, str | torch.dtype))
IDS: Kind = ("a tensor of whole numbers", lambda value: isinstance(value, torch.Tensor) or _is_list(value))
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
        ("a text or a list of texts", lambda value: isinstance(value, str) or _is_list(value))
    ),
    "source": _none_or(("a source or its name", lambda value: isinstance(value, Source | str))),
    "sources": ("a list of sources", lambda value: isinstance(value, Sequence)),
    "rule": TEXT,
    "temperature": NUMBER,
    "rule_temperature": NUMBER,
    "score_weight": NUMBER,
    "bias": TEXT,
    "compat": _none_or(TEXT),
    "engine": TEXT,
    "attention_path": TEXT,
    "to_layer": _none_or(WHOLE),
    "batch_size": COUNT,
    "progress": FLAG,
    "by_position": FLAG,
    "max_new_tokens": COUNT,
    "input_ids": _none_or(IDS),
    "attention_mask": _none_or(IDS),
}


def checked(call: Call) -> Call:
    """Refuse arguments of a call that are not of the type that `KINDS` declares for their name.

    A call that takes a prompt takes `messages=` in its place: a conversation, or several.

    Args:
        call: a function or method; what it takes as `**options` is checked, as `**arguments` it is not.

    Raises:
        DePassError: by the call, naming the argument, what it is and what it must be.
    """
    names = list(inspect.signature(call).parameters)
    known = KINDS if "options" in names else {name: KINDS[name] for name in names if name in KINDS}

    @functools.wraps(call)
    def checking(*args: Any, messages: Any = None, **kwargs: Any) -> Any:
        if messages is not None:
            args, kwargs = _with_conversations(names, args, kwargs, messages)
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in known and not known[name][1](value):
                raise DePassError(
                    f"{name} is {value!r:.80}, a {type(value).__name__}; it must be {known[name][0]}"
                )
        return call(*args, **kwargs)

    return checking  # type: ignore[return-value]


def _with_conversations(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], messages: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with conversations as its prompts."""
    if "prompt" not in names:
        raise DePassError("this call takes no messages; leave them out")
    passed = dict(zip(names, args, strict=False)) | kwargs
    if any(passed.get(name) is not None for name in ("prompt", "input_ids")):
        raise DePassError("pass one of messages, prompts and input_ids")
    place = names.index("prompt")
    prompts = conversations_of(messages)
    if place < len(args):
        return (*args[:place], prompts, *args[place + 1 :]), kwargs
    return args, kwargs | {"prompt": prompts}
