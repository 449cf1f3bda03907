"""Neurons under the softmax rule: the largest carried exactly, the bulk of them to first order.

No neuron of the bulk changes a softmax much by itself. With `g` a component's part of a later neuron's
pre-activation and `mu` the mean of `g / T` over the `M` components of the bulk at a position, their
exponentials are `exp(g / T) = exp(mu) (1 + g / T - mu)` to first order, and these sum to `M exp(mu)`:

1. Choose the neurons that are largest relative to the residual stream; propagate them and the rest of the
   state, the bias component too, exactly (`engine/propagate.py`).
2. Gates are linear and all components sum to the state, so the bulk's gates sum to the true pre-activation
   less the gates of those that are carried. That gives `mu`, and with it the softmax's denominator
   `Z = sum_carried exp(g / T) + M exp(mu)`, without carrying any of the bulk.
3. A neuron of the bulk then takes `exp(mu) (1 - mu) / Z + g exp(mu) / (T Z)` of a later neuron's value: a
   constant, and a slope in its state. One backward pass (`engine/adjoint.py`) with these slopes gives the
   derivative with respect to every state of the bulk; what the constants add along it is summed up on the
   way.

Neurons that are exactly zero at a position and at all positions that it has seen take no share there, as in
the exact pass. Shares sum to one by construction, so scores sum to the target's value however good or bad
the approximation is: completeness does not measure it. It is made twice, with `top` and twice as many, and
their difference is reported with the latter's scores. That is the order of the error that is left, not a
bound, for none is known: between a tenth and twelve times the error on `tiny` and on SmolLM2-135M, whose
error is largest in the first layer (1e-2 with 64 of 1536 neurons) and least in late ones (4e-4).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.adjoint import TargetGradient, backward
from depass_lightning.engine.attention import propagate_attention
from depass_lightning.engine.component_groups import NeuronGroup
from depass_lightning.engine.frozen import FrozenAttention, FrozenMLP
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.mlp import MLPStep, nonzero
from depass_lightning.engine.propagate import Injection
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import SoftmaxRule
from depass_lightning.engine.state import DecomposedState
from depass_lightning.engine.variants.rounding import summed_gates


@dataclass(frozen=True)
class ApproximationError:
    """How far scores with `top` neurons carried exactly are from those with half as many, for one prompt.

    Args:
        top: how many neurons were carried exactly.
        relative_change: the distance of all neurons' scores from those with half as many, relative to them.
        spearman: the rank correlation of both.
    """

    top: int
    relative_change: float
    spearman: float


@dataclass(frozen=True)
class TopNeuronApproximation:
    """One group of neurons whose scores for a target are wanted.

    Args:
        recording: the recorded pass.
        split: begins carries.
        group: the neurons, the bias component in front where there is one, and the rest of the state.
        rule: the softmax rule.
        derivative: the target's derivative where it is read.
        reads: the positions at which each prompt's target is read, and the derivative with respect to the
            state at each.
        layer: the block that the group enters.
        stop: the layer where the target is read, at least two layers further on.
    """

    recording: Recording
    split: Injection
    group: NeuronGroup
    rule: SoftmaxRule
    derivative: TargetGradient
    reads: tuple[Int[Tensor, "batch read"], Float[Tensor, "batch read hidden"]]
    layer: int
    stop: int

    def estimate(self, top: int) -> tuple[Float[Tensor, "batch component"], list[ApproximationError]]:
        """Scores with `2 * top` neurons carried exactly, and for each prompt how they differ from `top`."""
        count, before = self.group.values.shape[2], self.group.base.shape[1]
        doubled = min(2 * top, count)
        better = self.scores(doubled)
        once = better if top >= count else self.scores(top)
        estimates = [
            ApproximationError(doubled, _relative_change(one, other), _spearman(one, other))
            for one, other in zip(once[:, before:], better[:, before:], strict=True)
        ]
        return better, estimates

    def scores(self, top: int) -> Float[Tensor, "batch component"]:
        """Every component's score; constants that join after the components start are not counted."""
        chosen = self._largest(top)
        exact, forward = self._forward(chosen)
        before = self.group.base.shape[1]
        scores = torch.cat([exact[:, :before], self._backward(forward)], 1)
        return scores.scatter(1, chosen + before, exact[:, before:])

    def _largest(self, top: int) -> Int[Tensor, "batch chosen"]:
        """The neurons that write most up to the target, relative to the residual stream's size."""
        state = self.recording.state(self.layer)
        last = self.reads[0].amax(1, keepdim=True)
        real = torch.arange(state.shape[1], device=state.device) <= last
        size = state.square().mean(-1).sqrt()
        written = self.group.values.abs() / torch.where(real, size, math.inf)[..., None]
        return (written.amax(1) * self.group.columns.norm(dim=2)).topk(top, dim=1).indices

    def _forward(
        self, chosen: Int[Tensor, "batch chosen"]
    ) -> tuple[Float[Tensor, "batch carried"], "list[_Coefficients]"]:
        """Step 2: propagate the chosen neurons; their scores, and how the bulk shares each block's."""
        values, group = self.group.values, self.group.select(chosen)
        bulk = torch.ones_like(values[:, 0], dtype=torch.bool).scatter_(1, chosen, False)
        present = (values != 0) & bulk[:, None]
        batch, positions, _ = values.shape
        everywhere = torch.arange(positions, device=values.device).expand(batch, -1)
        state = self.split.begin(self.recording, group, everywhere)
        (read_at, directions), coefficients = self.reads, []
        rounded = torch.zeros_like(self.recording.state(self.layer))
        for index in range(self.layer, self.stop):
            block = self.recording.block(index)
            z = block.mlp.pre_activations
            if self.recording.decoder.rounds:
                z, rounded = summed_gates(block, rounded, self.rule)
            if block.parallel:
                state.mlp_input = state.rows.clone()
            if index == self.stop - 1:
                state = propagate_attention(state, block.attention, read_at)
            else:
                propagate_attention(state, block.attention)
            present = _reached(block.attention, present, bulk)
            slopes, constants = share_with_bulk(state, block.mlp, self.rule, present.sum(2), z)
            slopes, constants = (_scatter(state, values, positions) for values in (slopes, constants))
            coefficients.append(_Coefficients(present, slopes, constants))
        return torch.einsum("bmrd,brd->bm", state.dense(), directions), coefficients

    def _backward(self, forward: "list[_Coefficients]") -> Float[Tensor, "batch neuron"]:
        """Step 3: every neuron's score as one of the bulk."""
        rule = _FirstOrder(block.slopes for block in reversed(forward))
        scores = torch.zeros_like(self.group.values[:, 0])
        entry = self.derivative
        targets = [self.derivative]
        for (gradients,) in backward(self.recording, rule, targets, layer=self.stop, first=self.layer):
            coefficients = forward[gradients.block.index - self.layer]
            added = (gradients.activations * coefficients.constants).sum(2)
            scores += (added[:, None] @ coefficients.present.to(added))[:, 0]
            entry = gradients.resid_pre
        return scores + (self.group.values * self.group.gradient_of_values(entry.states)).sum(1)


@dataclass(frozen=True)
class _Coefficients:
    """How the bulk shares one block's neurons.

    Args:
        present: which of the bulk live where.
        slopes: of a share in the component's gate, times the neuron's value.
        constants: the share of a component whose gate is zero, times the neuron's value.
    """

    present: Bool[Tensor, "batch position component"]
    slopes: Float[Tensor, "batch position neuron"]
    constants: Float[Tensor, "batch position neuron"]


class _FirstOrder(LinearPaths):
    """The bulk's shares as a rule for the backward pass: slopes of its own, asked for block by block."""

    name: ClassVar[str] = "softmax, first order"

    def __init__(self, slopes: Iterator[Tensor]) -> None:
        super().__init__(gate=1.0, up=0.0, value=1.0, control=0.0)
        object.__setattr__(self, "_slopes", slopes)

    @override
    def slopes(self, factor: Tensor, neurons: Tensor) -> Tensor:
        return next(self._slopes)  # type: ignore[attr-defined]


def share_with_bulk(
    state: DecomposedState,
    mlp: FrozenMLP,
    rule: SoftmaxRule,
    count: Int[Tensor, "batch position"],
    gates_sum: Float[Tensor, "batch position neuron"],
) -> tuple[Float[Tensor, "at neuron"], Float[Tensor, "at neuron"]]:
    """Give the propagated components their share of an MLP's neurons, and return what is left for the rest.

    Args:
        state: what is carried exactly.
        mlp: the MLP.
        rule: the softmax rule.
        count: how many of the bulk live at each of the prompts' positions.
        gates_sum: what the gates of all components sum to there.

    Returns:
        The slopes and constants of the bulk's shares, times the neurons' values, at the state's positions.
    """
    state.skip_mlp(mlp)
    step = MLPStep.of(state, mlp)
    z, many = state.at_positions(gates_sum), state.at_positions(count)[:, None, None]
    slopes, constants = torch.zeros_like(z), torch.zeros_like(z)
    for chunk in state.layout.chunks(step.limit):
        whole = slice(0, len(chunk.row_places))
        gates = step.gates(chunk, whole)
        for run in chunk.runs:
            table = gates[run.rows].unflatten(0, (run.segments.stop - run.segments.start, -1))
            present = nonzero(gates[run.rows]).view(*table.shape[:2], 1)
            places = chunk.places[run.segments]
            bulk = (z[places] - table.sum(1))[:, None] / rule.temperature
            shares, slope, constant = _shares(table / rule.temperature, present, bulk, many[places])
            values = step.neurons[places]
            torch.mul(shares, values[:, None], out=table)
            slopes[places] = slope[:, 0] / rule.temperature * values
            constants[places] = constant[:, 0] * values
        step.add_down(chunk, whole, gates)
    state.mlp_input = None
    return slopes, constants


def _shares(
    scaled: Float[Tensor, "segment component neuron"],
    present: Bool[Tensor, "segment component 1"],
    bulk: Float[Tensor, "segment 1 neuron"],
    count: Int[Tensor, "segment 1 1"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of what is carried, and the bulk's slope in `g / T` and constant."""
    scaled.masked_fill_(~present, -math.inf)
    # Where the bulk is empty, its sum is only what rounding left.
    mean = torch.where(count > 0, bulk / count.clamp_min(1), 0)
    level = torch.where(count > 0, mean, -math.inf)
    greatest = torch.maximum(scaled.amax(1, keepdim=True), level)
    weights = scaled.sub_(greatest.clamp_min(torch.finfo(scaled.dtype).min)).exp_()
    weight = (level - greatest).exp()
    total = weights.sum(1, keepdim=True) + count * weight
    slope = weight / total
    return weights.div_(total), slope, slope * (1 - mean)


def _reached(
    attention: FrozenAttention,
    present: Bool[Tensor, "batch position component"],
    bulk: Bool[Tensor, "batch component"],
) -> Bool[Tensor, "batch position component"]:
    """Which of the bulk are present after an attention sublayer."""
    if bool((present == bulk[:, None]).all()):
        return present
    seen = attention.sees
    return present | ((seen.to(attention.probabilities) @ present.to(attention.probabilities)) > 0)


def _scatter(
    state: DecomposedState, values: Float[Tensor, "at neuron"], length: int
) -> Float[Tensor, "batch position neuron"]:
    """Write values at a state's positions to their places in the prompts; zero elsewhere."""
    scattered = values.new_zeros(len(state.positions), length, values.shape[1])
    batch = torch.arange(len(scattered), device=values.device)[:, None]
    scattered[batch, state.positions] = values.view(*state.positions.shape, -1)
    return scattered


def _relative_change(one: Float[Tensor, "neuron"], other: Float[Tensor, "neuron"]) -> float:
    return float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))


def _spearman(one: Float[Tensor, "neuron"], other: Float[Tensor, "neuron"]) -> float:
    """The rank correlation; 1 for fewer than two."""
    if len(one) < 2:
        return 1.0
    ranks = torch.stack([values.argsort(stable=True).argsort() for values in (one, other)]).double()
    return float(torch.corrcoef(ranks)[0, 1])
