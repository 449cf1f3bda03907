"""What one plain pass leaves of each sublayer: everything that is not linear, held at its true value.

With these fixed, norms and attention act linearly on the residual stream's components, and an MLP is left
with one question, how each neuron's value is shared (`engine/rules.py`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import AffineMap, Projection, device_of
from depass_lightning.models.block import Block
from depass_lightning.models.experts import ExpertsUp


@dataclass(frozen=True)
class NormParameters:
    """What a norm does besides scaling, learnt from the module itself by feeding it known vectors.

    So neither the name of its epsilon nor whether its weight is stored as `w` or `1 + w` matters.
    """

    weight: Float[Tensor, "hidden"]
    bias: Float[Tensor, "hidden"] | None
    centred: bool

    @classmethod
    def of(
        cls, norm: nn.Module, near: nn.Module, hidden: int, expects: torch.dtype, dtype: torch.dtype
    ) -> "NormParameters":
        """Probe a norm.

        Args:
            norm: the model's norm module.
            near: a module on the same device, for norms without weights.
            hidden: the size of what it norms.
            expects: the precision of its input.
            dtype: the precision of the result.
        """
        probes = torch.ones(1, 3, hidden, device=device_of(norm, near), dtype=expects)
        probes[0, 0] = 0
        probes[0, 2, 1::2] = -1
        at_zero, at_ones, at_signs = norm(probes)[0].to(dtype)
        signs = probes[0, 2].to(dtype)
        centred = bool((at_ones - at_zero).abs().max() < 1e-2 * (at_signs - at_zero).abs().max())
        if centred:
            signs = signs - signs.mean()
        bias = at_zero if bool(at_zero.any()) else None
        return cls((at_signs - at_zero) / signs, bias, centred)

    @classmethod
    def nothing(cls, hidden: int, device: torch.device, dtype: torch.dtype) -> "NormParameters":
        """What stands for a norm where a sublayer has none.

        Args:
            hidden: the size of the residual stream.
            device: where it is.
            dtype: its precision.
        """
        return cls(torch.ones(hidden, device=device, dtype=dtype), None, False)

    def direction(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The norm's linear part, before the per-position scale."""
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states * self.weight


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its per-position scale held fixed: `x -> scale * weight * (x - mean x) + bias`.

    The mean is subtracted by layer norms only.
    """

    probe: NormParameters
    scale: Float[Tensor, "batch position"]

    @classmethod
    def fit(cls, probe: NormParameters, states: Tensor, normed: Tensor, name: str) -> "FrozenNorm":
        """Fit the scale that maps a norm's recorded input to its recorded output.

        Args:
            probe: what the norm does besides scaling.
            states: `[batch, position, hidden]`, its input.
            normed: `[batch, position, hidden]`, its output.
            name: what the norm is called in an error.

        Raises:
            DePassError: no scale explains the output, so the module is no RMSNorm or LayerNorm.
        """
        dtype = probe.weight.dtype
        states, normed = states.to(dtype), normed.to(dtype)
        direction = probe.direction(states)
        if probe.bias is not None:
            normed = normed - probe.bias
        scale = (normed * direction).sum(-1) / direction.square().sum(-1).clamp_min(torch.finfo(dtype).tiny)
        residual = (normed - scale[..., None] * direction).norm() / normed.norm().clamp_min(
            torch.finfo(dtype).tiny
        )
        # Half-precision outputs are rounded to 2^-9; anything beyond is another kind of norm.
        if residual > 2e-2:
            raise DePassError(f"{name} is neither an RMSNorm nor a LayerNorm (misfit {residual:.1e})")
        return cls(probe, scale)

    @classmethod
    def nothing(cls, states: Float[Tensor, "batch position hidden"]) -> "FrozenNorm":
        """What stands for a norm where states are read as they are.

        Args:
            states: what is read, in the precision of the result.
        """
        probe = NormParameters.nothing(states.shape[-1], states.device, states.dtype)
        return cls(probe, states.new_ones(states.shape[:2]))

    def __call__(
        self, rows: Float[Tensor, "row hidden"], scale: Float[Tensor, "row"]
    ) -> Float[Tensor, "row hidden"]:
        """Norm components; the bias is not theirs.

        Args:
            rows: `[row, hidden]` components.
            scale: `[row]` this norm's scale at each row's position.
        """
        if self.probe.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows * scale[:, None]).mul_(self.probe.weight)

    def transposed(
        self, rows: Float[Tensor, "row hidden"], scale: Float[Tensor, "row"]
    ) -> Float[Tensor, "row hidden"]:
        """Take derivatives by the norm's output back to its input; arguments as for calling it."""
        rows = rows * self.probe.weight
        if self.probe.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return rows.mul_(scale[:, None])

    def constant_through(self, linear: AffineMap) -> Tensor | None:
        """Return what a linear map after this norm adds: its bias, and the norm's bias through it."""
        if self.probe.bias is None:
            return linear.bias
        pushed = linear.weight @ self.probe.bias
        return pushed if linear.bias is None else pushed + linear.bias


def past(skip: FrozenNorm | None, states: Float[Tensor, "batch position hidden"]) -> Tensor:
    """Return what the residual stream keeps of states past a sublayer.

    Args:
        skip: the frozen norm that the stream itself goes through there; None where there is none.
        states: states before the sublayer.
    """
    if skip is None:
        return states
    return skip(states.flatten(0, 1), skip.scale.flatten()).view(states.shape)


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
        """Take a derivative by what is added to the residual stream back to what attention returns.

        Args:
            output: the derivative.
        """
        if self.post_norm is not None:
            scale = self.post_norm.scale.flatten()
            output = self.post_norm.transposed(output.flatten(0, 1), scale).view(output.shape)
        return output * self.block.scale


@dataclass(frozen=True)
class FrozenAttention:
    """Attention with its probabilities held fixed: a linear map over positions.

    Grouped queries follow from the shapes: `heads * head_dim` is the output map's width, `key-value heads *
    head_dim` the value map's height. A norm after attention, its scale held fixed, is part of it: its
    weights are in the output map, its scale at each query in the probabilities.

    Args:
        norm: what it reads the residual stream through.
        probabilities: of each query for each key; they need not sum to one.
        value: the value map.
        output: the output map, without its bias.
        bias_terms: what biases add at each position.
        call: how the model called it.
        skip: the norm that the residual stream itself goes through past it, whose bias is among `bias_terms`;
            None where the stream passes unchanged.
    """

    norm: FrozenNorm
    probabilities: Float[Tensor, "batch head query key"]
    value: AffineMap
    output: AffineMap
    bias_terms: Float[Tensor, "batch position hidden"] | None
    call: AttentionCall
    skip: FrozenNorm | None = None

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.probabilities.shape[1]

    @property
    def head_size(self) -> int:
        """The size of one head's value."""
        return self.output.weight.shape[1] // self.heads

    @property
    def key_value_heads(self) -> int:
        """The number of value heads, each shared by a group of query heads."""
        return self.value.weight.shape[0] // self.head_size

    def mixture(self, weights: Float[Tensor, "batch head query key"]) -> Tensor:
        """Scale weights like the recorded probabilities, where a norm follows attention.

        Args:
            weights: the weight of each key for each query.
        """
        post_norm = self.call.post_norm
        return weights if post_norm is None else weights * post_norm.scale[:, None, :, None]

    def head_values(
        self, states: Float[Tensor, "batch position hidden"]
    ) -> tuple[Float[Tensor, "batch position head size"], Float[Tensor, "batch position head size"] | None]:
        """Each head's mixed values of a state, and what value biases add to them.

        Args:
            states: `[batch, position, hidden]`, not normed.
        """
        batch, positions, _ = states.shape
        scale = self.norm.scale.flatten()
        values = self.norm(states.flatten(0, 1), scale) @ self.value.weight.T
        groups = self.heads // self.key_value_heads

        def mixed(values: Tensor) -> Tensor:
            table = values.view(batch, positions, self.key_value_heads, -1).transpose(1, 2)
            table = table.repeat_interleave(groups, 1)
            return (self.probabilities @ table).transpose(1, 2)

        constant = self.norm.constant_through(self.value)
        constants = None if constant is None else mixed(constant.expand(batch, positions, -1))
        return mixed(values.view(batch, positions, -1)), constants

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
