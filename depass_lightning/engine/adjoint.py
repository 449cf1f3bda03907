"""All scores of a linear rule from one backward pass (the transpose of `engine/carry.py`).

A rule that is linear in the components makes the whole frozen pass linear, so a target's score of any
component is the component times the target's derivative there. From the last block to the first:

1. the MLP, backwards: through the down map, the neurons' frozen slopes and the gate map, and the norm;
2. attention, backwards: through the output map, the probabilities transposed and the value map, and the norm;
3. on the way, what biases add to the target is counted, so that scores still sum to the target's value.

Four products a block and no automatic differentiation: about the cost of the plain pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.engine.frozen import FrozenAttention, FrozenBlock, FrozenMLP, FrozenNorm
from depass_lightning.engine.record import Recording, exact
from depass_lightning.engine.rules import Taylor


@dataclass(frozen=True)
class Derivative:
    """A target's derivative by the residual stream at one place.

    Args:
        states: `[batch, position, hidden]` the derivative.
        constants: `[batch]` what biases behind this place add to the target.
    """

    states: Float[Tensor, "batch position hidden"]
    constants: Float[Tensor, "batch"]

    def of(self, components: Float[Tensor, "batch component position hidden"]) -> Tensor:
        """The scores `[batch, component]` of components that begin here."""
        return torch.einsum("bmnd,bnd->bm", components, self.states)


@dataclass(frozen=True)
class BlockDerivatives:
    """A target's derivatives at one block.

    Args:
        block: the frozen block.
        entry: at its entry.
        middle: between its attention and its MLP.
        after: behind its MLP.
        heads: by each head's mixed values, `[batch, position, head, size]`.
        neurons: by each neuron's value.
    """

    block: FrozenBlock
    entry: Derivative
    middle: Derivative
    after: Derivative
    heads: Float[Tensor, "batch position head size"]
    neurons: Float[Tensor, "batch position neuron"]


def at_readout(
    recording: Recording,
    positions: Int[Tensor, "batch"],
    vectors: Float[Tensor, "batch hidden"],
    constants: Float[Tensor, "batch"],
    *,
    normed: bool,
) -> Derivative:
    """The derivative where a target is read, one position a prompt.

    Args:
        recording: the recorded pass.
        positions: where each prompt's target stands.
        vectors: what the state is multiplied with.
        constants: what is added.
        normed: the state is read behind the final norm.
    """
    batch = torch.arange(len(positions), device=vectors.device)
    states = torch.zeros_like(recording.final_state)
    if normed:
        norm = recording.final_norm
        if norm.probe.bias is not None:
            constants = constants + vectors @ norm.probe.bias
        vectors = norm.transposed(vectors, norm.scale[batch, positions])
    states[batch, positions] = vectors
    return Derivative(states, constants)


def pull_back(
    recording: Recording, rule: Taylor, derivative: Derivative, *, layer: int, first: int
) -> Iterator[BlockDerivatives]:
    """Carry a target's derivative back, block by block.

    Args:
        recording: the recorded pass.
        rule: the linear rule whose slopes stand for the MLPs.
        derivative: the target's derivative by the state that enters block `layer`.
        layer: where the target is read; `recording.layers` is behind the last block.
        first: the first block that is wanted.

    Yields:
        The derivatives of block `layer - 1`, and so on down to block `first`.
    """
    for index in range(layer - 1, first - 1, -1):
        with exact(derivative.states.device):
            block = recording.block(index)
            neurons = derivative.states @ block.mlp.down.weight
            middle = _through_mlp(block.mlp, rule, derivative, neurons)
            heads = (middle.states @ block.attention.output.weight).unflatten(2, (block.attention.heads, -1))
            entry = _through_attention(block.attention, middle, heads)
        yield BlockDerivatives(block, entry, middle, derivative, heads, neurons)
        derivative = entry


def _through_mlp(mlp: FrozenMLP, rule: Taylor, after: Derivative, neurons: Tensor) -> Derivative:
    """From behind the MLP to before it."""
    gates = neurons * rule.slopes(mlp.pre_activations, mlp.neurons)
    constants = after.constants
    if mlp.down.bias is not None:
        constants = constants + after.states.sum(1) @ mlp.down.bias
    added = mlp.norm.constant_through(mlp.gate)
    if added is not None:
        constants = constants + gates.sum(1) @ added
    return Derivative(after.states + _before_norm(mlp.norm, gates @ mlp.gate.weight), constants)


def _through_attention(attention: FrozenAttention, middle: Derivative, heads: Tensor) -> Derivative:
    """From behind attention to before it."""
    values = attention.probabilities.transpose(2, 3) @ heads.transpose(1, 2)
    values = values.unflatten(1, (attention.key_value_heads, -1)).sum(2).transpose(1, 2).flatten(2)
    constants = middle.constants
    if attention.output.bias is not None:
        constants = constants + middle.states.sum(1) @ attention.output.bias
    added = attention.norm.constant_through(attention.value)
    if added is not None:
        constants = constants + values.sum(1) @ added
    back = _before_norm(attention.norm, values @ attention.value.weight)
    return Derivative(middle.states + back, constants)


def _before_norm(norm: FrozenNorm, states: Float[Tensor, "batch position hidden"]) -> Tensor:
    return norm.transposed(states.flatten(0, 1), norm.scale.flatten()).view(states.shape)
