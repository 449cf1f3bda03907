"""Rules that are linear in the components: how much each path through a block counts (docs/method.md)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class LinearPaths:
    """A rule that is linear in the components: how much each path through a block counts.

    An MLP of one factor has only the path through its pre-activation, which takes both weights.

    Args:
        gate: weight of a neuron's path through its pre-activation, with the up map's value held fixed.
        up: weight of a neuron's path through the up map, with the activation held fixed.
        value: weight of attention's values, mixed by the recorded probabilities.
        control: weight of attention's queries, and again of its keys, with the values held fixed
            (`engine/control.py`).
        uniform: weight of attention's values, mixed evenly over the visible positions. Where it is not zero,
            the control paths take the softmax's mean derivative on the line from zero scores to the recorded
            ones (`engine/score_path.py`), which accounts for the difference between both mixtures.
    """

    gate: float
    up: float
    value: float
    control: float
    uniform: float = 0.0
    name: ClassVar[str]

    @property
    def forward(self) -> bool:
        """Whether components can be propagated forward by it too, as `engine/state.py` does."""
        return not (self.control or self.uniform)

    @property
    def complete(self) -> bool:
        """Whether the parts of every sublayer's output sum to it exactly, not only up to quadrature."""
        return math.isclose(self.gate + self.up, 1) and self.value == 1 and self.forward

    def for_block(self, index: int) -> "LinearPaths":  # noqa: ARG002
        """Return the weights in one block."""
        return self

    def slopes(self, factor: Tensor, neurons: Tensor) -> Tensor:
        """What is multiplied with a factor (`z`, or the up map's value) to give `a`; zero where it is."""
        return torch.where(factor != 0, neurons / factor, 0)


@dataclass(frozen=True)
class TaylorRule(LinearPaths):
    """Each component keeps its part of the pre-activation times the neuron's frozen slope.

    Nothing competes. The share is `g / z` with `z` the true pre-activation, so that a component's part of
    the neuron's value `a` is `g * a / z`. A neuron with `z = 0` has no slope of its own here and is left
    out: `a` is zero as well.
    """

    gate: float = 1.0
    up: float = 0.0
    value: float = 1.0
    control: float = 0.0
    name: ClassVar[str] = "taylor"


@dataclass(frozen=True)
class HalfRule(LinearPaths):
    """Both factors of a gated MLP, half each (RelP, arXiv 2508.21258; AttnLRP, arXiv 2402.05602).

    With `x` a component after the frozen norm and the true `z = W_gate x̂`, `u = W_up x̂`, a neuron
    `a = act(z) u` gives it `1/2 (act(z) / z) u W_gate x + 1/2 act(z) W_up x`. Over all components each half
    sums to `a / 2`, so scores are complete. Attention gives it `sum_k A[n,k] W_V x[k]`, as under `taylor`;
    on an MLP of one factor the two rules are the same.

    Experts' routing weights are held fixed. A constant that a model adds to the second factor (gpt-oss
    multiplies with `u + 1`) belongs to the bias component.
    """

    gate: float = 0.5
    up: float = 0.5
    value: float = 1.0
    control: float = 0.0
    name: ClassVar[str] = "half"


@dataclass(frozen=True)
class ShapRule(LinearPaths):
    """MLPs as under `half`; attention's values, and the scores that decide how they are mixed.

    With `U` the even mixture over the positions that a query sees and `w` the weight, values get
    `(1 - w) A + w U`. Scores `s` get `w` times the softmax's mean derivative on the line from zero scores to
    the recorded ones, `integral of J(t s) dt` over [0, 1] by Gauss-Legendre quadrature, half each to the
    query and the key (integrated gradients of the softmax, from even attention). Since the integral times `s`
    is `A - U`, the parts sum to `A v`: scores are complete up to the quadrature's error, which `completeness`
    reports.

    Scores are products of queries and keys, with rotary positions and soft caps (their ratio of output to
    input) held fixed, and so are norms on queries and keys. ALiBi's slopes and attention sinks are constants
    and belong to the bias component; a sink counts as one more visible position.
    """

    gate: float = 0.5
    up: float = 0.5
    value: float = 0.5
    control: float = 0.25
    uniform: float = 0.5
    name: ClassVar[str] = "shap"

    @classmethod
    def weighted(cls, weight: float) -> "ShapRule":
        """The rule that gives scores this weight.

        Args:
            weight: `w`, from 0 (which is `half`) to 1.
        """
        return cls(value=1 - weight, control=weight / 2, uniform=weight)


@dataclass(frozen=True)
class DualRule(LinearPaths):
    """AttnLRP (Achtibat et al., arXiv 2402.05602); Dual Path Attribution (Jantsch et al., arXiv 2603.19742).

    With `x` a component after the frozen norm and the true `z = W_gate x̂`, `u = W_up x̂`:

    - A neuron `a = act(z) u` gives it `1/2 act(z) W_up x` and `1/2 (act(z) / z) u W_gate x`. Over all
      components these sum to `a`.
    - Attention gives it `1/2 sum_k A[n,k] W_V x[k]` (content); and a target's derivative `d[n,k]`
      with respect to the scores `s[n,k]`, which is `A[n,k] (g[n] . v[k] - sum_j A[n,j] g[n] . v[j])` with `g`
      that for the head's output, is propagated with weight 1/4 to its query and 1/4 to its key (control).

    AttnLRP has the same parts as relevances: a product's relevance is divided equally between its factors,
    and a softmax passes on that of its Taylor expansion at the scores. As gradient times input (Arras et al.,
    arXiv 2502.15886) its weights are these.

    It is not complete: attention's content path stands for half of what attention adds, and its control
    path sums to `1/2 sum_k d[n,k] s[n,k]` instead of the other half, so scores do not sum to the target's
    value. `completeness` measures how far they are from it.

    Norms (on queries and keys too) are held fixed at their scale. Decided here: biases go to the bias
    component, each with its path's weight and those of the output and down maps whole; a neuron with `z` or
    `u` zero is left out on that path; an MLP of one factor gives the whole neuron by its pre-activation, and
    experts' routing weights are held fixed. Neurons are scored by the derivative after their MLP.
    """

    gate: float = 0.5
    up: float = 0.5
    value: float = 0.5
    control: float = 0.25
    name: ClassVar[str] = "dual"


@dataclass(frozen=True)
class CalibratedRule(LinearPaths):
    """Weights of their own for each block, fitted to true ablations (`studies/calibration`).

    In every block the two factors of a gated MLP share 1, and attention is that of `shap` with a weight for
    its scores, so that the rule is complete up to the quadrature.

    Args:
        gate: as in `half`, which the weights of the blocks replace.
        up: the same.
        value: the same.
        control: the same.
        blocks: the weights in each block.
        path: the file that they were read from.
        family: the model type that they were fitted to.
    """

    gate: float = 0.5
    up: float = 0.5
    value: float = 1.0
    control: float = 0.0
    blocks: tuple[LinearPaths, ...] = ()
    path: str = ""
    family: str = ""
    name: ClassVar[str] = "calibrated"

    @staticmethod
    def weights(gate: float, scores: float) -> LinearPaths:
        """Return one block's weights.

        Args:
            gate: of a gated MLP's path through its pre-activation; the up map has the rest.
            scores: of attention's scores, from 0 (as in `half`) to 1.
        """
        return LinearPaths(gate, 1 - gate, 1 - scores, scores / 2, scores)

    @property
    @override
    def forward(self) -> bool:
        return all(block.forward for block in self.blocks)

    @property
    @override
    def complete(self) -> bool:
        return all(block.complete for block in self.blocks)

    @override
    def for_block(self, index: int) -> LinearPaths:
        return self.blocks[index]
