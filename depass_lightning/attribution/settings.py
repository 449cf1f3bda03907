"""How a pass is made: what a call's arguments come to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch.distributed import ProcessGroup

from depass_lightning.attribution.options import check_choices, check_sources
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.parallel import ComponentParallel, ParallelRule
from depass_lightning.engine.rules import CompetingRule, LinearPaths, Rule, goes_back, rule_named
from depass_lightning.engine.variants.paper_code import paper_code_rule
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Neurons, Source, SplitContext


@dataclass(frozen=True)
class Settings:
    """How a pass is made: the same for every prompt of a call.

    Args:
        sources: what the state is split into, each by itself.
        rule: how neurons are shared.
        rule_name: what the rule is called.
        bias: whether constants have a component of their own.
        rounding: whether the model's own rounding has one.
        bias_mode: what becomes of constants: component, drop, or none where the model has none.
        compat: `paper_code` for the published code's behaviour, else None.
        adjoint: take scores back from the target instead of carrying components to it.
        attention_path: content, or control for what is added where attention's probabilities are not held
            fixed.
        budget: the engine's memory.
        keeps_constants: constants are scored, not dropped.
        layers: the model's number of blocks.
        spread: the processes that the components are spread over, if they are.

    Raises:
        DePassError: a source approximates what this pass has exact, or does not have.
    """

    sources: tuple[Source, ...]
    rule: Rule
    rule_name: str
    bias: bool
    rounding: bool
    bias_mode: str
    compat: str | None
    adjoint: bool
    attention_path: str
    budget: Budget
    keeps_constants: bool
    layers: int
    spread: ComponentParallel | None = None

    def __post_init__(self) -> None:
        softmax = self.rule_name == "softmax" and self.compat is None and self.bias_mode != "drop"
        tops = [source.top for source in self.sources if isinstance(source, Neurons)]
        if not softmax and any(top is not None for top in tops):
            raise DePassError(
                "Neurons(top=) approximates rule='softmax' with every constant carried (bias='component', no "
                "compat); leave top out"
            )

    @property
    def constant_names(self) -> list[str]:
        """The components that stand behind a source's own in each group."""
        return ["bias"] * self.bias + ["rounding"] * self.rounding

    @property
    def complete(self) -> bool:
        """Whether scores must sum to the value."""
        exact = self.attention_path == "content" and self.compat is None and self.rule_name != "dual"
        return exact and self.keeps_constants

    @property
    def last_source_layer(self) -> int:
        """The last block at or in which components begin."""
        return max(source.layers(self.layers)[-1] for source in self.sources)

    def with_constants(self, constants: Iterable[float]) -> "Settings":
        """Add the bias component for targets with a constant of their own, such as a probe's intercept.

        Args:
            constants: the targets' constants.
        """
        if not self.keeps_constants or not any(constants):
            return self
        return replace(self, bias=True, bias_mode="component")

    def split_context(self, prompts: Sequence[Prompt]) -> SplitContext:
        """What sources must know of a batch's pass.

        Args:
            prompts: the batch.
        """
        return SplitContext(
            prompts,
            bias=self.bias,
            competing=not isinstance(self.rule, LinearPaths),
            release=self.compat == "paper_code",
            budget=self.budget,
            spread=self.spread,
        )

    @property
    def effective_rule(self) -> Rule | ParallelRule:
        """How components are carried: by the rule, in one process or in several."""
        if self.spread is None or not isinstance(self.rule, CompetingRule):
            return self.rule
        return ParallelRule(self.rule, self.spread)


def settings_of(
    decoder: Decoder,
    sources: Sequence[Source],
    *,
    rule: str = "softmax",
    temperature: float = 0.1,
    bias: str = "component",
    compat: str | None = None,
    engine: str = "auto",
    attention_path: str = "content",
    memory_budget: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Settings:
    """Check a call's arguments and say what they come to.

    Args:
        decoder: the model.
        sources: what states are split into; the other arguments are those of `DePass.attribute`.
        memory_budget: as for `DePass`.
        process_group: as for `DePass`; a backward pass carries no components, and needs none.

    Raises:
        DePassError: a setting is unknown, or two of them do not go together.
    """
    chosen = rule_named(rule, temperature)
    check_choices(bias=bias, compat=compat, engine=engine, attention_path=attention_path)
    adjoint = goes_back(chosen, engine=engine, compat=compat, attention_path=attention_path)
    if isinstance(chosen, LinearPaths) and chosen.up and not decoder.gated:
        raise DePassError(
            f"rule='{rule}' is for gated MLPs, which not all of this model's are; take rule='taylor'"
        )
    check_sources(sources)
    for source in sources:
        source.layers(len(decoder.blocks))
    keeps_constants = bias == "component"
    if compat == "paper_code":
        bias = "drop"
        chosen = paper_code_rule(chosen, remainder=sources[0].positional)
    if not decoder.has_biases:
        bias = "none"
    spread = None if adjoint or process_group is None else ComponentParallel(process_group)
    if spread is not None:
        check_spread(decoder, sources, compat)
    return Settings(
        sources=tuple(sources),
        rule=chosen,
        rule_name=rule,
        bias=bias == "component",
        # What is off with a rule or a way that does not add up cannot be told from rounding.
        rounding=decoder.rounds and compat is None and rule != "dual" and attention_path == "content",
        bias_mode=bias,
        compat=compat,
        adjoint=adjoint,
        attention_path=attention_path,
        budget=Budget.default(decoder.device, memory_budget),
        keeps_constants=keeps_constants,
        layers=len(decoder.blocks),
        spread=spread,
    )


def check_spread(decoder: Decoder, sources: Sequence[Source], compat: str | None) -> None:
    """Refuse what cannot be spread over processes.

    Args:
        decoder: the model.
        sources: what its states are split into.
        compat: as for `DePass.attribute`.

    Raises:
        DePassError: a source's components are no places in the text, or the published code's behaviour is
            asked for, or the model has a mixture of experts.
    """
    for source in sources:
        if not source.positional:
            raise DePassError(
                f"the components of {source.kind!r} are not spread over processes; take Tokens() or Spans(), "
                "or give each process prompts of its own"
            )
    if compat is not None:
        raise DePassError(f"compat={compat!r} runs in one process only; leave process_group out")
    if any(block.mlp.experts is not None for block in decoder.blocks):
        raise DePassError(
            "the components of a model with a mixture of experts are not spread over processes; give each "
            "process prompts of its own"
        )
