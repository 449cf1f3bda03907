"""The published code's way of sharing neurons, with its quirks, for comparing with numbers made by it.

It differs from `engine/rules.py` in four steps (the numbers are those of its own order):

1. the first token's gates are set to zero behind its own position (`exclude_first`; the layout does it);
2. the first component's gates at the first position are set to one;
3. a gate that is exactly zero counts as absent, neuron by neuron;
4. a neuron for which nobody competes is lost to a remainder that the result leaves out.

`relu` and `linear` add 1e-6 to their denominators, `taylor` adds 1e-8 to the pre-activation, and `linear`
overflows where a component is absent: then a component that alone is present takes all, and two or more
take nothing. None of these sums to the model's state in general; biases are lost (`bias="drop"`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from depass_lightning.engine.rules import (
    CompetingRule,
    Gates,
    Linear,
    Max,
    Present,
    Relu,
    Rule,
    Softmax,
    Summary,
    Taylor,
)


class _Quirks(CompetingRule):
    complete: ClassVar[bool] = False

    def prepare(self, gates: Gates, present: Present, at_origin: Tensor) -> tuple[Gates, Tensor]:
        gates[:, 0] = torch.where(at_origin[:, None], 1, gates[:, 0])
        return gates, gates != 0

    def shares(self, gates: Gates, present: Present, *, everybody: bool = False) -> Gates:
        # Whole components may all be present while single gates are not.
        return super().shares(gates, present)


@dataclass(frozen=True)
class ReleaseSoftmax(_Quirks, Softmax):
    """Softmax over the gates that are not exactly zero."""


@dataclass(frozen=True)
class ReleaseMax(_Quirks, Max):
    """The greatest of the gates that are not exactly zero."""


@dataclass(frozen=True)
class ReleaseRelu(_Quirks, Relu):
    """`relu(g) / (sum relu(g) + 1e-6)`: nothing where no gate is positive."""

    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        return gates.clamp_min(0) / (summary[0] + 1e-6)


@dataclass(frozen=True)
class ReleaseLinear(_Quirks, Linear):
    """1 for a component that alone is present, else 0: some token is always absent, so this overflows."""

    def share(self, gates: Gates, present: Present, summary: Summary, offset: int = 0) -> Gates:
        return (present & (summary[2] == 1)).to(gates.dtype)


@dataclass(frozen=True)
class ReleaseTaylor(Taylor):
    """`g / (z + 1e-8)`."""

    def slopes(self, pre_activations: Tensor, neurons: Tensor) -> Tensor:
        return neurons / (pre_activations + 1e-8)


def release_rule(rule: Rule) -> Rule:
    """The published code's version of a rule."""
    match rule:
        case Softmax(temperature):
            return ReleaseSoftmax(temperature)
        case Max():
            return ReleaseMax()
        case Relu():
            return ReleaseRelu()
        case Linear():
            return ReleaseLinear()
        case _:
            return ReleaseTaylor()
