"""How a neuron's value is shared among the components: the rules for the MLP (Hong et al., section 3).

Each competing rule is three pure functions over gates `[segment, component, neuron]`, where a segment is
one position of one prompt and `present` marks the components that take part:
1. `summarise` reduces the components to what normalises them,
2. `merge` joins the summaries of two sets of components, so that they may be cut into chunks,
3. `share` gives each component its part; over all components the parts sum to one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.linear_rules import (
    CalibratedRule,
    DualRule,
    HalfRule,
    LinearPaths,
    ShapRule,
    TaylorRule,
)
from depass_lightning.engine.rule_files import SUFFIX, read_rule
from depass_lightning.errors import DePassError, suggested

Gates = Float[Tensor, "segment component neuron"]
Present = Bool[Tensor, "segment component 1"]
PerNeuron = Float[Tensor, "segment 1 neuron"]
Summary = tuple[Tensor, ...]

RuleName = Literal["softmax", "max", "relu", "linear", "taylor", "half", "shap", "dual"]
AttentionPath = Literal["content", "control"]
LOWEST = 1e-30  # temperature: gates over a lower one leave float32


class CompetingRule(ABC):
    """A rule under which the components compete for each neuron; see the module's docstring."""

    name: ClassVar[str]
    # Whether a neuron without competing components goes to one component, so that nothing is lost.
    complete: ClassVar[bool] = True

    def prepare(self, gates: Gates, present: Present, at_origin: Tensor) -> tuple[Gates, Tensor]:  # noqa: ARG002
        """Change gates before they compete; only the published code's rules do.

        Args:
            gates: the components' parts of the pre-activation.
            present: which components are not exactly zero.
            at_origin: `[segment]` which segments are a prompt's first position and begin with its first
                component.
        """
        return gates, present

    def shares(self, gates: Gates, present: Present, *, all_present: bool = False) -> Gates:  # noqa: ARG002
        """Return each component's share of each neuron, from all components at once.

        Args:
            gates: the components' parts of the pre-activation; may be overwritten.
            present: which components take part; with `all_present` all of them do.
            all_present: see `present`.
        """
        return self.share(gates, present, self.summarise(gates, present))

    @abstractmethod
    def summarise(self, gates: Gates, present: Present, offset: int = 0) -> Summary:
        """Summarise some components, the first of which has number `offset`: what normalises the shares."""

    @abstractmethod
    def merge(self, first: Summary, second: Summary) -> Summary:
        """Join the summaries of two sets of components, the first of which comes before the second."""

    @abstractmethod
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        """Return the shares of components, the first of which is number `offset`, by the summary of all."""


@dataclass(frozen=True)
class SoftmaxRule(CompetingRule):
    """Share by a softmax over the components' gates (Hong et al., eq. 8).

    Args:
        temperature: what the gates are divided by; small values let the strongest component take all.
    """

    temperature: float = 0.1
    name: ClassVar[str] = "softmax"

    @override
    def shares(self, gates: Gates, present: Present, *, all_present: bool = False) -> Gates:
        """All at once, in one pass; a segment without any component present gives zeros."""
        scaled = gates.div_(self.temperature)
        if all_present:
            return scaled.softmax(1)
        return scaled.masked_fill_(~present, -math.inf).softmax(1).masked_fill_(~present, 0)

    @override
    def summarise(self, gates: Gates, present: Present, offset: int = 0) -> tuple[PerNeuron, PerNeuron]:
        """The greatest scaled gate and the sum of exponentials relative to it."""
        scaled = (gates / self.temperature).masked_fill_(~present, -math.inf)
        greatest = scaled.amax(1, keepdim=True)
        # Where no component takes part the greatest is -inf, and -inf - -inf is not a number.
        sums = scaled.sub_(greatest.clamp_min(torch.finfo(gates.dtype).min)).exp_().sum(1, keepdim=True)
        return greatest, sums

    @override
    def merge(self, first: Summary, second: Summary) -> Summary:
        greatest = torch.maximum(first[0], second[0])
        base = greatest.clamp_min(torch.finfo(greatest.dtype).min)
        return greatest, sum(sums * (top - base).exp() for top, sums in (first, second))  # type: ignore[return-value]

    @override
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        """`exp((g - max) / T) / sum`."""
        greatest, sums = summary
        # Not by one logarithm of the sum: added to a large maximum it would lose its digits.
        return (gates / self.temperature).sub_(greatest).exp_().div_(sums).masked_fill_(~present, 0)


@dataclass(frozen=True)
class MaxRule(CompetingRule):
    """The component with the greatest gate takes the whole neuron; the first of equals."""

    name: ClassVar[str] = "max"

    @override
    def summarise(self, gates: Gates, present: Present, offset: int = 0) -> tuple[PerNeuron, Tensor]:
        """The greatest gate and which component has it."""
        greatest, winner = gates.masked_fill(~present, -math.inf).max(1, keepdim=True)
        return greatest, winner + offset

    @override
    def merge(self, first: Summary, second: Summary) -> Summary:
        later = second[0] > first[0]
        return torch.where(later, second[0], first[0]), torch.where(later, second[1], first[1])

    @override
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        """1 for the winner, else 0."""
        return _one_hot(gates, summary[1] - offset).masked_fill_(~present, 0)


@dataclass(frozen=True)
class ReluRule(CompetingRule):
    """Share in proportion to positive gates; where none is positive, the greatest takes all."""

    name: ClassVar[str] = "relu"

    @override
    def summarise(
        self, gates: Gates, present: Present, offset: int = 0
    ) -> tuple[PerNeuron, PerNeuron, Tensor]:
        """The sum of positive gates, and as for `MaxRule`."""
        positive = gates.clamp_min(0).masked_fill_(~present, 0).sum(1, keepdim=True)
        return (positive, *MaxRule().summarise(gates, present, offset))

    @override
    def merge(self, first: Summary, second: Summary) -> Summary:
        return (first[0] + second[0], *MaxRule().merge(first[1:], second[1:]))

    @override
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        """`relu(g) / sum relu(g)`."""
        positive, _, winner = summary
        shares = gates.clamp_min(0) / torch.where(positive > 0, positive, 1)
        winners = _one_hot(gates, winner - offset)
        return torch.where(positive > 0, shares, winners).masked_fill_(~present, 0)


@dataclass(frozen=True)
class LinearRule(CompetingRule):
    """Share in proportion to the distance from the smallest gate; equally where all are equal."""

    name: ClassVar[str] = "linear"

    @override
    def summarise(
        self, gates: Gates, present: Present, offset: int = 0
    ) -> tuple[PerNeuron, PerNeuron, Tensor]:
        """The smallest gate, the sum of distances from it, and the number of components."""
        smallest = gates.masked_fill(~present, math.inf).amin(1, keepdim=True)
        sums = (gates - smallest).masked_fill_(~present, 0).sum(1, keepdim=True)
        return smallest, sums, present.sum(1, keepdim=True).to(gates.dtype)

    @override
    def merge(self, first: Summary, second: Summary) -> Summary:
        smallest = torch.minimum(first[0], second[0])
        # Moving the origin adds the same distance to each component; a set without any adds nothing.
        sums = sum(
            torch.where(count > 0, sums + count * (low - smallest), 0) for low, sums, count in (first, second)
        )
        return smallest, sums, first[2] + second[2]  # type: ignore[return-value]

    @override
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        """`(g - min) / sum (g - min)`."""
        smallest, sums, count = summary
        shares = (gates - smallest) / torch.where(sums > 0, sums, 1)
        return torch.where(sums > 0, shares, 1 / count).masked_fill_(~present, 0)


Rule = CompetingRule | LinearPaths


def rule_named(name: str, temperature: float = 0.1, score_weight: float = 0.5) -> Rule:
    """Find a rule.

    Args:
        name: softmax, max, relu, linear, taylor, half, shap or dual; or the path of a rule file, which ends
            with .json.
        temperature: for the softmax only.
        score_weight: for shap only.

    Raises:
        DePassError: there is no such rule or file, the temperature is not positive, too low, or infinite, or
            the weight of scores is not between 0 and 1.
    """
    if not LOWEST <= temperature < math.inf:
        bound = f"at least {LOWEST}" if 0 < temperature < LOWEST else "greater than zero, and finite"
        raise DePassError(f"temperature is {temperature}; it must be {bound} (rule='max' is its limit)")
    if not 0 <= score_weight <= 1:
        raise DePassError(f"score_weight is {score_weight}; it must be from 0 (as rule='half') to 1")
    if name.endswith(SUFFIX):
        return read_rule(name)
    competing = (SoftmaxRule(temperature), MaxRule(), ReluRule(), LinearRule())
    linear = (TaylorRule(), HalfRule(), ShapRule.weighted(score_weight), DualRule())
    rules: dict[str, Rule] = {rule.name: rule for rule in (*competing, *linear)}
    if name not in rules:
        raise DePassError(
            f"rule '{name}' is unknown{suggested(name, [*rules, 'auto'])}; "
            f"the path of a rule file ends with {SUFFIX}"
        )
    return rules[name]


def goes_back(rule: Rule, *, engine: str, compat: str | None, attention_path: str) -> bool:
    """Whether scores are taken back from the target, rather than components carried to it.

    Args:
        rule: the rule.
        engine: auto, propagate or adjoint.
        compat: paper_code, or None.
        attention_path: content or control.

    Raises:
        DePassError: these do not go together.
    """
    linear = isinstance(rule, LinearPaths) and compat is None
    back = linear and engine != "propagate"
    if compat is not None and isinstance(rule, HalfRule | ShapRule | CalibratedRule):
        raise DePassError(f"the published code has no rule '{rule.name}'; leave compat out")
    if engine == "adjoint" and not linear:
        raise DePassError(
            "engine='adjoint' needs a rule that is linear in the components: rule='taylor', 'half', 'shap' "
            "or 'dual', and no compat"
        )
    if attention_path == "control" and not (back and isinstance(rule, TaylorRule)):
        raise DePassError(
            "attention_path='control' needs rule='taylor', engine='auto' or 'adjoint', and no compat"
        )
    if isinstance(rule, LinearPaths) and not (back or rule.forward):
        raise DePassError(
            f"rule='{rule.name}' only goes back from a target: use attribute with engine='auto' and no "
            "compat, or rule='taylor' or 'half' to propagate components forward"
        )
    return back


def _one_hot(gates: Gates, winner: Tensor) -> Gates:
    """1 where a component is the winner; a winner outside this chunk has no entry."""
    components = torch.arange(gates.shape[1], device=gates.device)[None, :, None]
    return (components == winner).to(gates.dtype)
