"""All scores of a linear rule from one backward pass (the transpose of `engine/state.py`).

A rule that is linear in the components makes the whole frozen pass linear, so a target's score of any
component is the component times the target's derivative there. From the last block to the first:

1. the MLP, backwards: through the down map, the neurons' frozen slopes and the gate map, and the norm;
2. attention, backwards: through the output map, the probabilities transposed and the value map, and the norm;
3. on the way, what biases add to the target is counted, so that scores still sum to the target's value.

Four products a block and no automatic differentiation: about the cost of the plain pass. A rule may also
go through the up map, and through queries and keys (`engine/control.py`); its weights scale them.
Several targets are propagated together, so that a block is frozen and its probabilities are computed once.
"""

from collections.abc import Iterator, Sequence
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
    """A target's derivative with respect to the residual stream at one point.

    Args:
        states: `[batch, position, hidden]` the derivative.
        constants: `[batch]` what biases after this place add to the target.
    """

    states: Float[Tensor, "batch position hidden"]
    constants: Float[Tensor, "batch"]

    def of(self, components: Float[Tensor, "batch component position hidden"]) -> Tensor:
        """The scores `[batch, component]` of components that begin here."""
        return torch.einsum("bmnd,bnd->bm", components, self.states)


@dataclass(frozen=True)
class BlockGradients:
    """A target's derivatives at one block.

    Args:
        block: the frozen block.
        resid_pre: with respect to the state that enters it.
        resid_mid: with respect to the state between its attention and its MLP.
        resid_post: with respect to the state that leaves it.
        mlp_input: through the MLP of a parallel block, with respect to the state that enters it; None in
            other blocks.
        heads: with respect to each head's mixed values, `[batch, position, head, size]`.
        activations: with respect to each neuron's value.
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
    """Return the derivative of what is read at some positions with respect to the state there.

    Args:
        recording: the recorded pass.
        positions: where each prompt's state is read.
        vectors: what it is multiplied with.
        normed: the state is read after the final norm.
    """
    if not normed:
        return vectors
    norm, batch = recording.final_norm, torch.arange(len(positions), device=vectors.device)
    return norm.transposed(vectors, norm.scale[batch[:, None], positions])


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
    recording: Recording, rule: LinearPaths, targets: Sequence[TargetGradient], *, layer: int, first: int
) -> Iterator[list[BlockGradients]]:
    """Propagate the derivatives of several targets back together, block by block.

    Args:
        recording: the recorded pass.
        rule: the linear rule: how much each path counts.
        targets: each target's derivative with respect to the state that enters block `layer`.
        layer: where the targets are read; `recording.layers` is after the last block.
        first: the first block that is wanted.

    Yields:
        Each target's derivatives at block `layer - 1`, and so on down to block `first`.
    """
    after = _Gradients.stacked(targets)
    for index in range(layer - 1, first - 1, -1):
        with exact(after.states.device):
            block = recording.block(index)
            neurons = after.states @ block.mlp.down.weight  # [target, batch, position, neuron]
            paths = rule.for_block(index)
            read = _through_mlp(block.mlp, paths, after, neurons)
            skipped = _before_skip(block.mlp.skip, after)
            middle = skipped.plus(read)
            mlp_input = None
            if block.parallel:  # the MLP reads what enters the block
                mlp_input, middle = read.states, _Gradients(skipped.states, middle.constants)
            heads = (middle.states @ block.attention.output.weight).unflatten(-1, (block.attention.heads, -1))
            attended = _through_attention(recording.decoder, block.attention, paths, middle, heads)
            entry = _before_skip(block.attention.skip, middle).plus(attended)
            if mlp_input is not None:
                entry = _Gradients(entry.states + mlp_input, entry.constants)
        gradients = [
            BlockGradients(
                block,
                entry.of_target(target),
                middle.of_target(target),
                after.of_target(target),
                None if mlp_input is None else mlp_input[target],
                heads[target],
                neurons[target],
            )
            for target in range(len(targets))
        ]
        del block  # its weights live as long as the caller holds the gradients
        yield gradients
        del gradients
        after = entry


@dataclass(frozen=True)
class _Gradients:
    """The derivatives of several targets at one point of the residual stream."""

    states: Float[Tensor, "target batch position hidden"]
    constants: Float[Tensor, "target batch"]

    @classmethod
    def stacked(cls, targets: Sequence[TargetGradient]) -> "_Gradients":
        return cls(
            torch.stack([target.states for target in targets]),
            torch.stack([target.constants for target in targets]),
        )

    def of_target(self, target: int) -> TargetGradient:
        return TargetGradient(self.states[target], self.constants[target])

    def plus(self, other: "_Gradients") -> "_Gradients":
        """The sum of the derivatives along two paths to the targets."""
        return _Gradients(self.states + other.states, self.constants + other.constants)


def _through_mlp(mlp: FrozenMLP, rule: LinearPaths, after: _Gradients, neurons: Tensor) -> _Gradients:
    """Propagate derivatives from the MLP's output back to its input."""
    normed, constants = None, torch.zeros_like(after.constants) + _of_constants(after, mlp.bias_terms)
    for linear, slopes in linear_paths(mlp, rule):
        by_output = neurons * slopes
        constants = constants + _of_biases(linear, mlp.norm, by_output)
        states = by_output @ linear.weight
        normed = states if normed is None else normed.add_(states)
    assert normed is not None
    return _Gradients(mlp.norm.transposed(normed, mlp.norm.scale), constants)


def _through_attention(
    decoder: Decoder, attention: FrozenAttention, rule: LinearPaths, middle: _Gradients, heads: Tensor
) -> _Gradients:
    """Propagate derivatives from attention's output back to its input."""
    mixture, scores = attention.mixture, []
    if attention.has_scores:  # a linear mixer has no control path, only values
        if rule.control:
            outputs = list(rule.control * middle.states)
            scores = through_scores(decoder, attention, outputs, mean=rule.uniform > 0)
        if rule.value != 1:
            even = scores[0].uniform if scores else None
            mixture = mixture.weighted(rule.value, rule.uniform if scores else 0.0, even)
    values = attention.transposed(heads, mixture)
    constants = torch.zeros_like(middle.constants) + _of_constants(middle, attention.bias_terms)
    constants = constants + _of_biases(attention.value, attention.norm, values)
    states = attention.norm.transposed(values @ attention.value.weight, attention.norm.scale)
    entry = _Gradients(states, constants)
    if not scores:
        return entry
    norm = attention.call.norm
    normed = torch.stack([score.normed for score in scores])
    constants = torch.stack([score.constants for score in scores])
    if norm.probe.bias is not None:
        constants = constants + normed.sum(2) @ norm.probe.bias
    return entry.plus(_Gradients(norm.transposed(normed, norm.scale), constants))


def _of_constants(gradients: _Gradients, added: Tensor | None) -> Tensor | float:
    """What a sublayer's constants add to the targets."""
    return 0.0 if added is None else (gradients.states * added).sum((2, 3))


def _of_biases(
    linear: AffineMap, norm: FrozenNorm, by_output: Float[Tensor, "target batch position out"]
) -> Tensor | float:
    """What the biases of a map and of the norm before it add to the targets."""
    added = norm.constant_through(linear)
    return 0.0 if added is None else by_output.sum(2) @ added


def _before_skip(skip: FrozenNorm | None, after: _Gradients) -> _Gradients:
    """Propagate derivatives back along the residual stream, through a norm on it if there is one.

    The norm's bias is counted with the sublayer's other constants.
    """
    return after if skip is None else _Gradients(skip.transposed(after.states, skip.scale), after.constants)
