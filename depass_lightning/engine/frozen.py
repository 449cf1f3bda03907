"""What one plain pass leaves of each sublayer: everything that is not linear, held at its true value.

With these fixed, norms and attention act linearly on the residual stream's components, and an MLP is left
with one question, how each neuron's value is shared (`engine/rules.py`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from depass_lightning.engine.mixture import Mixture
from depass_lightning.engine.norms import FrozenNorm, past
from depass_lightning.models.affine import AffineMap, Projection
from depass_lightning.models.block import Block
from depass_lightning.models.experts import ExpertsUp
from depass_lightning.models.mixers.base import convolved


@dataclass(frozen=True)
class AttentionCall:
    """How the model called a block's attention, so that `engine/control.py` can call it again.

    Args:
        block: the block.
        arguments: what attention was called with.
        keywords: the same by name.
        norm: the norm of the state in these.
        post_norm: the norm after it, if any.
    """

    block: Block
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    norm: FrozenNorm
    post_norm: FrozenNorm | None

    def before_post_norm(self, output: Float[Tensor, "batch position hidden"]) -> Tensor:
        """Propagate a derivative with respect to what is added to the residual stream back through a norm."""
        if self.post_norm is not None:
            output = self.post_norm.transposed(output, self.post_norm.scale)
        return output * self.block.factor(self.block.attention)


@dataclass(frozen=True)
class FrozenConvolution:
    """What happens to values before they are mixed: a causal convolution between two factors.

    Args:
        before: factors of the values; None for none.
        taps: each channel's weights, the position itself last.
        slopes: factors after the convolution; None for none.
    """

    before: Float[Tensor, "batch position channel"] | None
    taps: Float[Tensor, "channel tap"]
    slopes: Float[Tensor, "batch position channel"] | None

    def __call__(self, values: Float[Tensor, "batch position component channel"], first: int = 0) -> Tensor:
        """Convolve components' values.

        Args:
            values: what is convolved.
            first: the position where the values begin; they are zero before.
        """
        if self.before is not None:
            values = values * self.before[:, first:, None]
        values = convolved(values, self.taps)
        return values if self.slopes is None else values * self.slopes[:, first:, None]

    def transposed(
        self, gradient: Float[Tensor, "batch position channel"]
    ) -> Float[Tensor, "batch position channel"]:
        """Propagate a derivative with respect to the result back to the values."""
        if self.slopes is not None:
            gradient = gradient * self.slopes
        gradient = convolved(gradient.flip(1), self.taps).flip(1)
        return gradient if self.before is None else gradient * self.before

    def reach(self, seen: Bool[Tensor, "batch query key"]) -> Bool[Tensor, "batch query key"]:
        """Which positions' values each query sees, from those whose convolved values it sees."""
        reached = seen.clone()
        for back in range(1, min(self.taps.shape[1], seen.shape[2])):
            reached[:, :, :-back] |= seen[:, :, back:]
        return reached


@dataclass(frozen=True)
class FrozenAttention:
    """Attention with its probabilities held fixed: a linear map over positions.

    Grouped queries follow from the shapes: `heads * head_dim` is the output map's width, `key-value heads *
    head_dim` the value map's height. A norm after attention, its scale held fixed, is part of it: its
    weights are in the output map, its scale multiplies what each query mixes.

    Args:
        norm: what it reads the residual stream through.
        mixture: how positions are mixed, before any norm after attention; rows need not sum to one.
        value: the value map.
        output: the output map, without its bias.
        bias_terms: what biases add at each position.
        call: how the model called it.
        skip: the norm that the residual stream itself goes through past it, whose bias is among `bias_terms`;
            None where the stream passes unchanged.
        gates: factors of the heads' mixed values, side by side; None for none.
        convolution: what happens to values before they are mixed, in a linear mixer or by a norm of each
            head's values. A mixer's matrix is in `mixture`, and its constants are among `bias_terms`.
    """

    norm: FrozenNorm
    mixture: Mixture
    value: AffineMap
    output: AffineMap
    bias_terms: Float[Tensor, "batch position hidden"] | None
    call: AttentionCall
    skip: FrozenNorm | None = None
    gates: Float[Tensor, "batch position channel"] | None = None
    convolution: FrozenConvolution | None = None

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.mixture.heads

    @property
    def has_scores(self) -> bool:
        """Whether queries and keys determine the mixture; in a linear mixer they do not."""
        return self.call.block.attention.mixer is None

    @cached_property
    def probabilities(self) -> Float[Tensor, "batch head query key"]:
        """The whole matrix of each key's weight for each query, times the scale of a norm after attention."""
        post_norm, whole = self.call.post_norm, self.mixture.whole()
        return whole if post_norm is None else whole * post_norm.scale[:, None, :, None]

    @cached_property
    def factors(self) -> Float[Tensor, "batch position channel"] | None:
        """What the heads' mixed values are multiplied by: gates, and the scale of a norm after attention."""
        post_norm, gates = self.call.post_norm, self.gates
        if post_norm is None:
            return gates
        scale = post_norm.scale[..., None]
        return scale.expand(-1, -1, self.output.weight.shape[1]) if gates is None else gates * scale

    @property
    def head_size(self) -> int:
        """The size of one head's value."""
        return self.output.weight.shape[1] // self.heads

    @property
    def key_value_heads(self) -> int:
        """The number of value heads, each shared by a group of query heads."""
        return self.value.weight.shape[0] // self.head_size

    def head_values(
        self, states: Float[Tensor, "batch position hidden"]
    ) -> tuple[Float[Tensor, "batch position head size"], Float[Tensor, "batch position head size"] | None]:
        """Each head's mixed values of a state, and what value biases add to them.

        Args:
            states: `[batch, position, hidden]`, not normed.
        """
        batch, positions, _ = states.shape
        scale = self.norm.scale.flatten()
        values = (self.norm(states.flatten(0, 1), scale) @ self.value.weight.T).view(batch, positions, -1)
        constant = self.norm.constant_through(self.value)
        constants = None if constant is None else self.mixed(self.convolved(constant.expand_as(values)))
        return self.mixed(self.convolved(values)), constants

    def convolved(
        self, values: Float[Tensor, "batch position channel"]
    ) -> Float[Tensor, "batch position channel"]:
        """What is mixed of the value heads' values, which are side by side."""
        return values if self.convolution is None else self.convolution(values[:, :, None])[:, :, 0]

    def mixed(
        self, values: Float[Tensor, "batch position channel"]
    ) -> Float[Tensor, "batch position head size"]:
        """Mix values over positions, and multiply the result by gates and a norm's scale.

        Args:
            values: the value heads' values side by side, convolved where a mixer does that.
        """
        table = values.unflatten(2, (self.key_value_heads, -1)).transpose(1, 2)
        mixed = self.mixture.mixed(table).transpose(1, 2)
        return mixed if self.factors is None else mixed * self.factors.unflatten(2, (self.heads, -1))

    def transposed(
        self, heads: Float[Tensor, "target batch position head size"], mixture: Mixture
    ) -> Float[Tensor, "target batch position channel"]:
        """Propagate derivatives with respect to mixed values back to the concatenated value heads' values.

        Args:
            heads: the derivatives of several targets.
            mixture: what mixed the values.
        """
        if self.factors is not None:
            heads = heads * self.factors.unflatten(2, (self.heads, -1))
        targets = len(heads)
        # [batch, head, query, target * size] -> [batch, value head, key, target * size]
        values = mixture.transposed(heads.permute(1, 3, 2, 0, 4).flatten(3), self.key_value_heads)
        values = values.unflatten(3, (targets, -1)).permute(3, 0, 2, 1, 4).flatten(3)
        if self.convolution is None:
            return values
        return torch.stack([self.convolution.transposed(of_target) for of_target in values])

    @property
    def sees(self) -> Bool[Tensor, "batch query key"]:
        """Which positions' states any head reads at each position."""
        seen = (self.probabilities != 0).any(1)
        return seen if self.convolution is None else self.convolution.reach(seen)

    def head_outputs(
        self, values: Float[Tensor, "batch position head size"]
    ) -> Float[Tensor, "batch head position hidden"]:
        """Project each head's values out by itself.

        Args:
            values: `[batch, position, head, size]`, as `head_values` gives them.
        """
        output = self.output.weight.view(-1, self.heads, self.head_size)
        return torch.einsum("bnhi,dhi->bhnd", values, output)


@dataclass(frozen=True)
class Expert:
    """One expert of a mixture, as a part of one wide MLP.

    Args:
        neurons: which of the neurons are its own.
        active: the positions that were routed to it.
    """

    neurons: slice
    active: Bool[Tensor, "batch position"]


@dataclass(frozen=True)
class FrozenMLP:
    """An MLP with its neurons' values held fixed; components share each of them.

    The neurons of a mixture of experts are ordered by expert, those of experts that a position
    was not routed to at zero and all others times their expert's weight. A norm after the MLP, its scale
    held fixed, is part of it: its weights are in the down map, its scale at each position in the neurons.

    Args:
        norm: what it reads the residual stream through.
        gate: the map to the pre-activations.
        up_projection: the map to the second factor, read when `up` is asked for; None if there is none.
        down: the map from the neurons' values, without its bias.
        bias_terms: what biases add at each position.
        pre_activations: the activation's true input, biases included.
        activations: the neurons' true values, which the down map reads.
        normed: what gate and up map read, in the model's precision.
        experts: where it is a mixture, its experts, a shared one among them.
        skip: the norm that the residual stream itself goes through past it, as for attention.
    """

    norm: FrozenNorm
    gate: AffineMap
    up_projection: Projection | ExpertsUp | None
    down: AffineMap
    bias_terms: Float[Tensor, "batch position hidden"] | None
    pre_activations: Float[Tensor, "batch position neuron"]
    activations: Float[Tensor, "batch position neuron"]
    normed: Float[Tensor, "batch position hidden"]
    experts: tuple[Expert, ...] | None = None
    skip: FrozenNorm | None = None

    @cached_property
    def up(self) -> AffineMap | None:
        """The map to the second factor, read when it is asked for: most rules do not need it."""
        return None if self.up_projection is None else self.up_projection.linear(self.activations.dtype)

    @cached_property
    def up_values(self) -> Float[Tensor, "batch position neuron"]:
        """The second factor's values, in the precision that the recorded activations were computed in.

        In a higher one the factor could be near zero where the activation is not, and their ratio arbitrary.
        """
        assert self.up is not None
        normed, dtype = self.normed, self.activations.dtype
        if self.experts is not None:  # their activations are computed from the routing, in this precision
            normed = normed.to(dtype)
        bias = None if self.up.bias is None else self.up.bias.to(normed.dtype)
        return torch.nn.functional.linear(normed, self.up.weight.to(normed.dtype), bias).to(dtype)


@dataclass(frozen=True)
class FrozenBlock:
    """One block of the recorded pass.

    Args:
        index: the block's number.
        resid_pre: the residual stream that enters it.
        resid_post: the residual stream that leaves it.
        attention: its first sublayer.
        mlp: its second sublayer.
        parallel: attention and MLP both read the block's input.
    """

    index: int
    resid_pre: Float[Tensor, "batch position hidden"]
    resid_post: Float[Tensor, "batch position hidden"]
    attention: FrozenAttention
    mlp: FrozenMLP
    parallel: bool

    @cached_property
    def attention_output(self) -> Float[Tensor, "batch position hidden"]:
        """What attention adds to the residual stream, biases included."""
        values, constants = self.attention.head_values(self.resid_pre)
        total = values if constants is None else values + constants
        return _plus(total.flatten(2) @ self.attention.output.weight.T, self.attention.bias_terms)

    @cached_property
    def resid_mid(self) -> Float[Tensor, "batch position hidden"]:
        """The residual stream after attention."""
        return past(self.attention.skip, self.resid_pre) + self.attention_output

    @cached_property
    def mlp_output(self) -> Float[Tensor, "batch position hidden"]:
        """What the MLP adds to the residual stream, biases included."""
        return _plus(self.mlp.activations @ self.mlp.down.weight.T, self.mlp.bias_terms)


def _plus(states: Tensor, added: Tensor | None) -> Tensor:
    return states if added is None else states + added
