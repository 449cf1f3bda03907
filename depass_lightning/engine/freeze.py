"""Freeze the sublayers of one block from what its hooks recorded (`engine/hooks.py`)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.engine.frozen import (
    AttentionCall,
    Expert,
    FrozenAttention,
    FrozenBlock,
    FrozenConvolution,
    FrozenMLP,
)
from depass_lightning.engine.frozen_experts import FrozenExperts
from depass_lightning.engine.hooks import Capture
from depass_lightning.engine.mixture import DenseMixture, Mixture
from depass_lightning.engine.norms import FrozenNorm, NormParameters
from depass_lightning.errors import DePassError
from depass_lightning.models.affine import AffineMap
from depass_lightning.models.block import AttentionParts, Block, MLPParts
from depass_lightning.models.experts import DenseParts, ExpertsParts, ExpertsUp
from depass_lightning.models.mixers.base import Mixer, Mixing
from depass_lightning.models.sharding import whole
from depass_lightning.models.spec import ResidualNorm


@dataclass(frozen=True)
class BlockNorms:
    """What one block's norms do besides scaling; None where a norm is not there."""

    attention: NormParameters | None
    latent: NormParameters | None
    after_attention: NormParameters | None
    mlp: NormParameters | None
    after_mlp: NormParameters | None
    values: NormParameters | None
    heads: NormParameters | None
    neurons: NormParameters | None

    @classmethod
    def of(cls, block: Block, hidden: int, expects: torch.dtype, dtype: torch.dtype) -> "BlockNorms":
        """Probe all norms of a block."""

        def probe(norm: nn.Module | None, size: int = hidden) -> NormParameters | None:
            return None if norm is None else NormParameters.of(norm, attention.module, size, expects, dtype)

        attention, mlp = block.attention, block.mlp
        inner = None if mlp.dense is None else mlp.dense.inner_norm
        return cls(
            attention=probe(attention.norm),
            latent=None if attention.latent is None else probe(attention.latent[1], attention.value.shape[1]),
            after_attention=probe(attention.post_norm),
            mlp=probe(mlp.norm),
            after_mlp=probe(mlp.post_norm),
            values=probe(attention.value_norm, attention.output.shape[1] // attention.heads),
            heads=probe(attention.inner_norm, attention.output.shape[1]),
            neurons=None if inner is None else probe(inner, mlp.width),
        )


def freeze(
    block: Block, capture: Capture, state: Float[Tensor, "batch position hidden"], probes: BlockNorms
) -> FrozenBlock:
    """Freeze one block.

    Raises:
        DePassError: the block's attention gives no probabilities, or a norm is of an unknown kind.
    """
    freezer = _Freezer(block, capture, state, probes)
    resid_post = capture.left.to(state.dtype)
    return FrozenBlock(block.index, state, resid_post, freezer.attention(), freezer.mlp(), block.parallel)


@dataclass(frozen=True)
class _Freezer:
    """Makes one block's frozen sublayers."""

    block: Block
    capture: Capture
    state: Tensor
    probes: BlockNorms

    def attention(self) -> FrozenAttention:
        """Its attention."""
        parts, capture, dtype = self.block.attention, self.capture, self.state.dtype
        if parts.mixer is not None:
            return self._mixer(parts.mixer)
        norm = call_norm = self._norm("attention", self.probes.attention)
        value = parts.value.linear(dtype)
        if parts.value_scale != 1:
            value = value.scaled(parts.value_scale)
        if parts.latent is not None:
            # Values are `W norm(V x)`: the norm's scale fixed, one map, whose scale joins the outer norm's.
            inner = parts.latent[0].linear(dtype)
            scaled = self._norm("latent", self.probes.latent)
            weight = (value.weight * scaled.probe.weight) @ inner.weight
            value, norm = AffineMap(weight, value.bias), FrozenNorm(norm.probe, norm.scale * scaled.scale)
        convolution = None
        if self.probes.values is not None:
            value, convolution = self._with_normed_values(value, self.probes.values)
        post = self._post("attention post-norm", self.probes.after_attention)
        read, scale = self._after_norm(parts.output.linear(dtype), "heads", self.probes.heads)
        if parts.output_bias is not None:
            bias = parts.output_bias.detach().to(read.weight)
            read = AffineMap(read.weight, bias if read.bias is None else read.bias + bias)
        output, added = self._projected(parts, read, post)
        skip = self._skip(parts, call_norm, post)
        gates = self._gates()
        if scale is not None:
            scale = scale[..., None].expand(-1, -1, parts.output.shape[1])  # [batch, position, channel]
            gates = scale if gates is None else gates * scale
        frozen = FrozenAttention(
            norm=norm,
            mixture=self._mixture(),
            value=value,
            output=output,
            bias_terms=self._with_skipped_bias(added, skip, parts.residual),
            call=AttentionCall(self.block, *capture.attention_call, call_norm, post),
            skip=skip,
            gates=gates,
            convolution=convolution,
        )
        return self._with_scaled_heads(frozen) if parts.scaled_heads else frozen

    def _with_normed_values(
        self, value: AffineMap, probe: NormParameters
    ) -> tuple[AffineMap, FrozenConvolution]:
        """The value map times the weights of the norm of each head's values, and that norm's scales."""
        states, normed = self.capture.norms["values"]  # [batch, position, value head, size]
        name = f"block {self.block.index}: the norm of values"
        scale = FrozenNorm.fit(probe, states, normed, name).scale
        scale = scale.repeat_interleave(len(probe.weight), 2)  # [batch, position, channel]
        weight = probe.weight.repeat(states.shape[2])
        bias = None if value.bias is None else value.bias * weight
        convolution = FrozenConvolution(None, scale.new_ones(scale.shape[2], 1), scale)
        return AffineMap(value.weight * weight[:, None], bias), convolution

    def _with_scaled_heads(self, frozen: FrozenAttention) -> FrozenAttention:
        """Fit each head's factor at each position to the output map's input, and multiply the gates by it."""
        values, constants = replace(frozen, call=replace(frozen.call, post_norm=None)).head_values(self.state)
        values = values if constants is None else values + constants  # [batch, position, head, size]
        recorded = self.capture.seen["heads"].to(values).view(values.shape)
        tiny = torch.finfo(values.dtype).tiny
        fitted = (recorded * values).sum(-1) / values.square().sum(-1).clamp_min(tiny)
        scale = fitted.repeat_interleave(values.shape[3], 2)  # [batch, position, channel]
        return replace(frozen, gates=scale if frozen.gates is None else frozen.gates * scale)

    def _after_norm(
        self, linear: AffineMap, name: str, probe: NormParameters | None
    ) -> tuple[AffineMap, Float[Tensor, "batch position"] | None]:
        """A map multiplied by the weights of the norm before it, and that norm's scale."""
        if probe is None:
            return linear, None
        norm = self._norm(name, probe)
        weight = linear.weight * probe.weight
        if probe.centred:
            weight = weight - weight.mean(1, keepdim=True)
        return AffineMap(weight, norm.constant_through(linear)), norm.scale

    def _mixture(self) -> Mixture:
        """How attention mixes positions."""
        capture, dtype = self.capture, self.state.dtype
        if capture.mixture is not None:
            return capture.mixture.to(dtype)
        if capture.probabilities is None:
            raise DePassError(
                f"block {self.block.index}: attention returned no probabilities under eager attention"
            )
        return DenseMixture(capture.probabilities.to(dtype))

    def _gates(self) -> Float[Tensor, "batch position channel"] | None:
        """The sigmoid that the heads' mixed values are multiplied with, if there is one."""
        parts = self.block.attention
        if parts.gate is None:
            return None
        seen = parts.gate.of(self.capture.seen["attention gate"]).to(self.state.dtype)
        seen = getattr(torch.nn.functional, parts.gate_activation)(seen)
        seen = seen.view(*self.state.shape[:2], -1)  # [batch, position, head or channel]
        return seen.repeat_interleave(parts.output.shape[1] // seen.shape[2], 2)

    def _mixer(self, mixer: Mixer) -> FrozenAttention:
        """A linear mixer in attention's place."""
        parts, dtype = self.block.attention, self.state.dtype
        seen = {**self.capture.mixed, "state": ((), self.state)}
        if mixer.softmax is not None:
            seen["probabilities"] = (), self._mixture().whole()
        mixing = mixer.mixing(seen, dtype)
        norm = self._norm("attention", self.probes.attention)
        post = self._post("attention post-norm", self.probes.after_attention)
        device = self.state.device  # the maps of an absent mixer are not on the model's device
        value = parts.value.linear(dtype).to(device)
        output, added = self._projected(parts, parts.output.linear(dtype).to(device), post)
        skip = self._skip(parts, norm, post)
        frozen = FrozenAttention(
            norm=replace(norm, probe=replace(norm.probe, bias=None)),
            mixture=DenseMixture(mixing.matrix),
            value=AffineMap(value.weight, None),
            output=output,
            bias_terms=self._with_skipped_bias(added, skip, parts.residual),
            call=AttentionCall(self.block, *self.capture.attention_call, norm, post),
            skip=skip,
            gates=mixing.gates,
            convolution=FrozenConvolution(mixing.before, mixing.taps, mixing.slopes),
        )
        return self._with_mixed_constants(frozen, norm.constant_through(value), mixing)

    def _with_mixed_constants(
        self, frozen: FrozenAttention, constant: Tensor | None, mixing: Mixing
    ) -> FrozenAttention:
        """Send constants of values and convolution through a mixer once: they depend on positions."""
        if constant is None and mixing.constants is None:
            return frozen
        assert frozen.convolution is not None
        values = self.state.new_zeros(*self.state.shape[:2], len(mixing.taps))
        if constant is not None:
            values = frozen.convolution((values + constant)[:, :, None])[:, :, 0]
        if mixing.constants is not None:
            values = values + mixing.constants * (1 if mixing.slopes is None else mixing.slopes)
        added = frozen.mixed(values).flatten(2) @ frozen.output.weight.T
        return replace(frozen, bias_terms=added if frozen.bias_terms is None else added + frozen.bias_terms)

    def mlp(self) -> FrozenMLP:
        """Its MLP."""
        parts, dtype = self.block.mlp, self.state.dtype
        if parts.absent:
            return self._no_mlp()
        norm = self._norm("mlp", self.probes.mlp)
        post = self._post("mlp post-norm", self.probes.after_mlp)
        if parts.dense is not None:
            gates, neurons = self._recorded(parts.dense, "")
            gate, down = parts.dense.gate.linear(dtype), parts.dense.down.linear(dtype)
            if parts.dense.gate_scale != 1:
                gate = gate.scaled(parts.dense.gate_scale)
            down, scale = self._after_norm(down, "neurons", self.probes.neurons)
            if scale is not None:
                neurons = self.capture.norms["neurons"][0].view(neurons.shape).to(dtype) * scale[..., None]
            up_projection, normed = parts.dense.up, self.capture.seen["gate input"]
            added = routed = None
        else:
            assert parts.experts is not None
            experts = FrozenExperts(parts.experts, self.capture, dtype, self.state.shape[:2])
            gates, neurons, gate, down, added = experts.frozen()
            routed = experts.routed()
            up_projection, normed = ExpertsUp(parts.experts), self.capture.seen["experts"][0]
            if parts.experts.shared is not None:
                width = gates.shape[2]
                gates, neurons, gate, down = self._with_shared(parts.experts, gates, neurons, gate, down)
                everywhere = torch.ones_like(gates[..., 0], dtype=torch.bool)
                routed = (*routed, Expert(slice(width, gates.shape[2]), everywhere))
        down, constant = self._projected(parts, down, post, added)
        if post is not None:
            neurons = neurons * post.scale[..., None]
        skip = self._skip(parts, norm, post)
        return FrozenMLP(
            norm=norm,
            gate=gate,
            up_projection=up_projection,
            down=down,
            bias_terms=self._with_skipped_bias(constant, skip, parts.residual),
            pre_activations=gates,
            activations=neurons,
            normed=normed.view(self.state.shape),
            experts=routed,
            skip=skip,
        )

    def _no_mlp(self) -> FrozenMLP:
        """A stand-in for the MLP of a block without one: a single neuron with the value zero."""
        dense, zeros = self.block.mlp.dense, self.state.new_zeros(*self.state.shape[:2], 1)
        assert dense is not None
        gate, down = (part.linear(self.state.dtype).to(zeros.device) for part in (dense.gate, dense.down))
        return FrozenMLP(
            norm=FrozenNorm.nothing(self.state),
            gate=gate,
            up_projection=None,
            down=down,
            bias_terms=None,
            pre_activations=zeros + 1,
            activations=zeros,
            normed=self.state,
        )

    def _norm(self, name: str, probe: NormParameters | None) -> FrozenNorm:
        """What a sublayer reads the residual stream through."""
        if probe is None:
            return FrozenNorm.nothing(self.state)
        states, normed = (seen.view(*self.state.shape[:2], -1) for seen in self.capture.norms[name])
        return FrozenNorm.fit(probe, states, normed, f"block {self.block.index}: the norm of '{name}'")

    def _post(self, name: str, probe: NormParameters | None) -> FrozenNorm | None:
        return None if probe is None else self._norm(name, probe)

    def _projected(
        self,
        parts: AttentionParts | MLPParts,
        linear: AffineMap,
        post: FrozenNorm | None,
        added: Tensor | None = None,
    ) -> tuple[AffineMap, Tensor | None]:
        """Return a sublayer's last map with the norm and the factor after it, and what it adds."""
        weight, scale = linear.weight, self.block.factor(parts)
        if linear.bias is not None:
            added = linear.bias.expand(self.state.shape) + (0 if added is None else added)
        if post is not None:
            weight = post.probe.direction(weight.T).T
            if added is not None:
                added = post.probe.direction(added) * post.scale[..., None]
            if post.probe.bias is not None:
                added = post.probe.bias.expand(self.state.shape) + (0 if added is None else added)
        if scale != 1:
            weight, added = weight * scale, None if added is None else added * scale
        return AffineMap(weight, None), added

    def _skip(
        self, parts: AttentionParts | MLPParts, norm: FrozenNorm, post: FrozenNorm | None
    ) -> FrozenNorm | None:
        """What the residual stream itself goes through past a sublayer, if anything."""
        skip = {"none": None, "norm": norm, "post_norm": post}[parts.residual]
        factor = parts.residual_weight
        if factor is None:
            return skip
        factor = whole(factor).detach().to(self.state) if isinstance(factor, Tensor) else factor
        skip = FrozenNorm.nothing(self.state) if skip is None else skip
        bias = None if skip.probe.bias is None else skip.probe.bias * factor
        return replace(skip, probe=replace(skip.probe, weight=skip.probe.weight * factor, bias=bias))

    def _with_skipped_bias(
        self, added: Tensor | None, skip: FrozenNorm | None, residual: ResidualNorm
    ) -> Tensor | None:
        """Add the bias of a norm on the residual stream; after the sublayer, `_projected` has added it."""
        if residual != "norm" or skip is None or skip.probe.bias is None:
            return added
        return skip.probe.bias.expand(self.state.shape) + (0 if added is None else added)

    def _recorded(self, parts: DenseParts, name: str) -> tuple[Tensor, Tensor]:
        """A dense MLP's pre-activations and neurons."""
        seen, shape = self.capture.seen, self.state.shape[:2]
        gates = parts.gate.of(seen[f"{name}gate"]).reshape(*shape, -1)
        return gates.to(self.state.dtype) * parts.gate_scale, seen[f"{name}down"].reshape(*shape, -1).to(
            self.state.dtype
        )

    def _with_shared(
        self, parts: ExpertsParts, gates: Tensor, neurons: Tensor, gate: AffineMap, down: AffineMap
    ) -> tuple[Tensor, Tensor, AffineMap, AffineMap]:
        """Put the shared expert's neurons after those of the experts."""
        assert parts.shared is not None
        dtype = self.state.dtype
        own_gates, own_neurons = self._recorded(parts.shared, "shared ")
        if parts.shared_gate is not None:
            scale = self.capture.seen["shared scale"].to(dtype).sigmoid()
            own_neurons = own_neurons * scale.view(*self.state.shape[:2], 1)
        own_gate, own_down = parts.shared.gate.linear(dtype), parts.shared.down.linear(dtype)
        return (
            torch.cat([gates, own_gates], 2),
            torch.cat([neurons, own_neurons], 2),
            gate.joined(own_gate),
            AffineMap(torch.cat([down.weight, own_down.weight], 1), own_down.bias),
        )
