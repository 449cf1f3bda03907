"""All scores of a linear rule from one backward pass (the transpose of `engine/state.py`).

A rule that is linear in the components makes the whole frozen pass linear, so a target's score of any
component is the component times the target's derivative there. From the last block to the first:

1. the MLP, backwards: through the down map, the neurons' frozen slopes and the gate map, and the norm;
2. attention, backwards: through the output map, the probabilities transposed and the value map, and the norm;
3. on the way, what biases add to the target is counted, so that scores still sum to the target's value.

Four products a block and no automatic differentiation: about the cost of the plain pass. A rule may also
go through the up map, and through queries and keys (`engine/control.py`); its weights scale them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.engine.control import through_scores
from depass_lightning.engine.frozen import FrozenAttention, FrozenBlock, FrozenMLP
from depass_lightning.engine.isolation import exact
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.mlp import linear_paths
from depass_lightning.engine.norms import FrozenNorm
from depass_lightning.engine.record import Recording
from depass_lightning.models.decoder import AffineMap, Decoder


@dataclass(frozen=True)
class TargetGradient:
    """A target's derivative by the residual stream at one place.

    Args:
        states: `[batch, position, hidden]` the derivative.
        constants: `[batch]` what biases after this place add to the target.
    """

    states: Float[Tensor, "batch position hidden"]
    constants: Float[Tensor, "batch"]

    def plus(self, other: "TargetGradient") -> "TargetGradient":
        """The sum of two, as along two ways to the target."""
        return TargetGradient(self.states + other.states, self.constants + other.constants)

    def of(self, components: Float[Tensor, "batch component position hidden"]) -> Tensor:
        """The scores `[batch, component]` of components that begin here."""
        return torch.einsum("bmnd,bnd->bm", components, self.states)


@dataclass(frozen=True)
class BlockGradients:
    """A target's derivatives at one block.

    Args:
        block: the frozen block.
        resid_pre: by the state that enters it.
        resid_mid: by the state between its attention and its MLP.
        resid_post: by the state that leaves it.
        mlp_input: through the MLP of a parallel block, by the state that enters it; None in other blocks.
        heads: by each head's mixed values, `[batch, position, head, size]`.
        activations: by each neuron's value.
    """

    block: FrozenBlock
    resid_pre: TargetGradient
    resid_mid: TargetGradient
    resid_post: TargetGradient
    mlp_input: Float[Tensor, "batch position hidden"] | None
    heads: Float[Tensor, "batch position head size"]
    activations: Float[Tensor, "batch position neuron"]


def read_directions(
    recording: Recording,
    positions: Int[Tensor, "batch read"],
    vectors: Float[Tensor, "batch read hidden"],
    *,
    normed: bool,
) -> Float[Tensor, "batch read hidden"]:
    """Return the derivative of what is read at some positions by the state there.

    Args:
        recording: the recorded pass.
        positions: where each prompt's state is read.
        vectors: what it is multiplied with.
        normed: the state is read after the final norm.
    """
    if not normed:
        return vectors
    norm, batch = recording.final_norm, torch.arange(len(positions), device=vectors.device)
    scale = norm.scale[batch[:, None], positions].flatten()
    return norm.transposed(vectors.flatten(0, 1), scale).view(vectors.shape)


def at_readout(
    recording: Recording,
    positions: Int[Tensor, "batch read"],
    vectors: Float[Tensor, "batch read hidden"],
    constants: Float[Tensor, "batch"],
    *,
    normed: bool,
) -> TargetGradient:
    """Return the derivative of a target, the sum of what is read at some positions.

    Args:
        recording: the recorded pass.
        positions: where each prompt's state is read; may repeat.
        vectors: what it is multiplied with.
        constants: what is added.
        normed: the state is read after the final norm.
    """
    batch = torch.arange(len(positions), device=vectors.device)
    states = torch.zeros_like(recording.final_state)
    bias = recording.final_norm.probe.bias if normed else None
    if bias is not None:
        constants = constants + vectors.sum(1) @ bias
    directions = read_directions(recording, positions, vectors, normed=normed)
    states.index_put_((batch[:, None], positions), directions, accumulate=True)
    return TargetGradient(states, constants)


def backward(
    recording: Recording, rule: LinearPaths, derivative: TargetGradient, *, layer: int, first: int
) -> Iterator[BlockGradients]:
    """Take a target's derivative back, block by block.

    Args:
        recording: the recorded pass.
        rule: the linear rule: how much each path counts.
        derivative: the target's derivative by the state that enters block `layer`.
        layer: where the target is read; `recording.layers` is after the last block.
        first: the first block that is wanted.

    Yields:
        The derivatives of block `layer - 1`, and so on down to block `first`.
    """
    for index in range(layer - 1, first - 1, -1):
        with exact(derivative.states.device):
            block = recording.block(index)
            neurons = derivative.states @ block.mlp.down.weight
            paths = rule.for_block(index)
            read = _through_mlp(block.mlp, paths, derivative, neurons)
            skipped = _before_skip(block.mlp.skip, derivative)
            middle = skipped.plus(read)
            mlp_input = None
            if block.parallel:  # the MLP reads what enters the block
                mlp_input, middle = read.states, TargetGradient(skipped.states, middle.constants)
            heads = (middle.states @ block.attention.output.weight).unflatten(2, (block.attention.heads, -1))
            attended = _through_attention(recording.decoder, block.attention, paths, middle, heads)
            entry = _before_skip(block.attention.skip, middle).plus(attended)
            if mlp_input is not None:
                entry = TargetGradient(entry.states + mlp_input, entry.constants)
        gradients = BlockGradients(block, entry, middle, derivative, mlp_input, heads, neurons)
        del block  # whoever takes the gradients holds its weights
        yield gradients
        del gradients
        derivative = entry


def _through_mlp(mlp: FrozenMLP, rule: LinearPaths, after: TargetGradient, neurons: Tensor) -> TargetGradient:
    """Take a derivative from the MLP's output to its input."""
    normed, constants = torch.zeros_like(after.states), torch.zeros_like(after.constants)
    for linear, slopes in linear_paths(mlp, rule):
        states, added = _through(linear, mlp.norm, neurons * slopes)
        normed, constants = normed + states, constants + added
    return TargetGradient(_before_norm(mlp.norm, normed), constants + _of_constants(after, mlp.bias_terms))


def _through_attention(
    decoder: Decoder, attention: FrozenAttention, rule: LinearPaths, middle: TargetGradient, heads: Tensor
) -> TargetGradient:
    """Take a derivative from attention's output to its input."""
    probabilities, scores = attention.probabilities, None
    softmax = attention.convolution is None  # a linear mixer has no control path: all goes through its values
    if rule.control and softmax:
        output = rule.control * middle.states
        scores = through_scores(decoder, attention, output, mean=rule.uniform > 0)
    if rule.value != 1 and softmax:
        probabilities = rule.value * probabilities
    if scores is not None and scores.uniform is not None:
        probabilities = probabilities + rule.uniform * attention.mixture(scores.uniform)
    values = attention.transposed(heads, probabilities)
    normed, constants = _through(attention.value, attention.norm, values)
    constants = constants + _of_constants(middle, attention.bias_terms)
    entry = TargetGradient(_before_norm(attention.norm, normed), constants)
    if scores is None:
        return entry
    norm, constants = attention.call.norm, scores.constants
    if norm.probe.bias is not None:
        constants = constants + scores.normed.sum(1) @ norm.probe.bias
    return entry.plus(TargetGradient(_before_norm(norm, scores.normed), constants))


def _of_constants(derivative: TargetGradient, added: Tensor | None) -> Tensor | float:
    """What a sublayer's constants add to the target."""
    return 0.0 if added is None else (derivative.states * added).sum((1, 2))


def _through(
    linear: AffineMap, norm: FrozenNorm, derivative: Float[Tensor, "batch position out"]
) -> tuple[Float[Tensor, "batch position hidden"], Float[Tensor, "batch"]]:
    """Take a derivative from a map's output to the normed state; also what the biases of map and norm add."""
    added = norm.constant_through(linear)
    if added is None:
        return derivative @ linear.weight, derivative.new_zeros(len(derivative))
    return derivative @ linear.weight, derivative.sum(1) @ added


def _before_skip(skip: FrozenNorm | None, after: TargetGradient) -> TargetGradient:
    """Take a derivative back past a sublayer, through a norm on the residual stream where there is one.

    The norm's bias is counted with the sublayer's other constants.
    """
    return after if skip is None else TargetGradient(_before_norm(skip, after.states), after.constants)


def _before_norm(norm: FrozenNorm, states: Float[Tensor, "batch position hidden"]) -> Tensor:
    return norm.transposed(states.flatten(0, 1), norm.scale.flatten()).view(states.shape)
