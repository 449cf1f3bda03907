"""The published code's way of sharing neurons, with its quirks, for comparing with numbers made by it.

It differs from `engine/rules.py` in these steps, in its own order:

1. the first token's gates are set to zero after its own position (`exclude_first`; the layout does it);
2. the first component's gates at the first position are set to one, whatever the components are;
3. gates of the last component below 1e-5 in size are set to zero;
4. a neuron for which all gates are zero goes to the last component.

A gate that is then exactly zero counts as absent, neuron by neuron. Among positions the last component is a
remainder that starts at zero and is left out of the result, so there step 3 does nothing and step 4 loses the
neuron. `relu` and `linear` add 1e-6 to their denominators, `taylor` adds 1e-8 to the pre-activation, and
`linear` overflows where a component is absent: then a single present component takes all, and two or more
take nothing. None of these sums to the model's state in general; biases are lost (`bias="drop"`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.linear_rules import TaylorRule
from depass_lightning.engine.rules import (
    CompetingRule,
    Gates,
    LinearRule,
    MaxRule,
    Present,
    ReluRule,
    Rule,
    SoftmaxRule,
    Summary,
)


@dataclass(frozen=True)
class _Quirks(CompetingRule):
    """Steps 2 to 4.

    Args:
        remainder: the last component is a remainder that is not carried here.
    """

    complete: ClassVar[bool] = False
    remainder: bool = True

    @override
    def prepare(self, gates: Gates, present: Present, at_origin: Tensor) -> tuple[Gates, Tensor]:
        gates[:, 0] = torch.where(at_origin[:, None], 1, gates[:, 0])
        if not self.remainder:
            last = gates[:, -1]
            last = torch.where(last.abs() < 1e-5, 0, last)
            gates[:, -1] = last
            gates[:, -1] = torch.where((gates == 0).all(1), 1, last)
        return gates, gates != 0

    @override
    def shares(self, gates: Gates, present: Present, *, all_present: bool = False) -> Gates:
        # Whole components may all be present while single gates are not.
        return super().shares(gates, present)


@dataclass(frozen=True)
class PaperCodeSoftmaxRule(_Quirks, SoftmaxRule):
    """Softmax over the gates that are not exactly zero."""


@dataclass(frozen=True)
class PaperCodeMaxRule(_Quirks, MaxRule):
    """The greatest of the gates that are not exactly zero."""


@dataclass(frozen=True)
class PaperCodeReluRule(_Quirks, ReluRule):
    """`relu(g) / (sum relu(g) + 1e-6)`: nothing where no gate is positive."""

    @override
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        return gates.clamp_min(0) / (summary[0] + 1e-6)


@dataclass(frozen=True)
class PaperCodeLinearRule(_Quirks, LinearRule):
    """`(g - min) / (sum (g - min) + 1e-6)` where no component is absent; else 1 for one alone, and 0."""

    @override
    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        smallest, sums, count = summary
        alone = (present & (count == 1)).to(gates.dtype)
        if self.remainder:
            return alone
        return torch.where(count == gates.shape[1], (gates - smallest) / (sums + 1e-6), alone)


@dataclass(frozen=True)
class PaperCodeTaylorRule(TaylorRule):
    """`g / (z + 1e-8)`."""

    @override
    def slopes(self, factor: Tensor, neurons: Tensor) -> Tensor:
        return neurons / (factor + 1e-8)


def paper_code_rule(rule: Rule, *, remainder: bool) -> Rule:
    """The published code's version of a rule.

    Args:
        rule: the rule.
        remainder: the components are positions, whose remainder is left out.
    """
    match rule:
        case SoftmaxRule(temperature):
            return PaperCodeSoftmaxRule(temperature=temperature, remainder=remainder)
        case MaxRule():
            return PaperCodeMaxRule(remainder=remainder)
        case ReluRule():
            return PaperCodeReluRule(remainder=remainder)
        case LinearRule():
            return PaperCodeLinearRule(remainder=remainder)
        case _:
            return PaperCodeTaylorRule()
