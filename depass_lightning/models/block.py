"""One decoder block as its family declares it, bound to the modules of the model at hand."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import (
    AffineMap,
    Projection,
    base_of,
    features,
    has_bias,
    is_quantised,
    parameter_of,
)
from depass_lightning.models.spec import (
    AttentionSpec,
    FamilySpec,
    MLPSpec,
    ResidualNorm,
    configured,
    submodule,
)


@dataclass(frozen=True)
class AttentionParts:
    """The modules of an attention sublayer.

    Args:
        module: returns the probabilities second.
        norm: what it reads the residual stream through, if there is one.
        post_norm: the norm after its output, if any.
        value: the value map, which reads `latent` if there is one.
        latent: the map to the latent and the norm after it.
        output: the output map.
        heads: the number of query heads.
        in_mask: the name of an argument that eager attention would count twice; see `AttentionSpec`.
        residual: which norm is on the residual stream itself; see `AttentionSpec`.
    """

    module: nn.Module
    norm: nn.Module | None
    post_norm: nn.Module | None
    value: Projection
    latent: tuple[Projection, nn.Module] | None
    output: Projection
    heads: int
    in_mask: str | None
    residual: ResidualNorm


@dataclass(frozen=True)
class DenseParts:
    """The maps of an MLP; see `MLPSpec`."""

    gate: Projection
    up: Projection | None
    down: Projection


@dataclass(frozen=True)
class ExpertsParts:
    """The modules of a mixture of experts.

    Args:
        module: the experts, called with states, indices and weights.
        shared: the MLP that every position goes through, if there is one.
        shared_gate: the map whose sigmoid scales the shared MLP's output.
    """

    module: nn.Module
    shared: DenseParts | None
    shared_gate: nn.Module | None

    @property
    def count(self) -> int:
        """The number of experts."""
        return self._stored("down_proj").shape[0]

    @property
    def transposed(self) -> bool:
        """Whether the weights are stored `[expert, in, out]`."""
        return hasattr(base_of(self.module), "gate_up_proj_bias")

    @property
    def has_biases(self) -> bool:
        """Whether the experts add constants."""
        return hasattr(base_of(self.module), "down_proj_bias")

    @property
    def width(self) -> int:
        """The number of one expert's neurons."""
        return self._stored("down_proj").shape[1 if self.transposed else 2]

    def _stored(self, name: str) -> Tensor:
        weight = getattr(base_of(self.module), name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            kind = type(base_of(self.module)).__name__
            raise DePassError(f"{kind} keeps no weights of all experts in '{name}'")
        return weight

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return the weights of all experts with their biases: gate and up together, and down.

        Args:
            dtype: the precision of the result.
        """
        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        self._stored(names[0])
        gate_up, first, down, second = (parameter_of(self.module, name, dtype) for name in names)
        assert gate_up is not None
        assert down is not None
        if self.transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return gate_up, first, down, second

    def column(self, expert: int, neuron: int, dtype: torch.dtype) -> Float[Tensor, "hidden"]:
        """What one neuron of one expert writes.

        Args:
            expert: the expert's number.
            neuron: the neuron's number inside it.
            dtype: the precision of the result.
        """
        down = parameter_of(self.module, "down_proj", None)
        assert down is not None
        return (down[expert, neuron] if self.transposed else down[expert, :, neuron]).to(dtype)

    @property
    def gate_rows(self) -> slice:
        """Where gates stand among the outputs of gates and ups together."""
        return slice(0, None, 2) if self.transposed else slice(0, self.width)

    @property
    def up_rows(self) -> slice:
        """Where ups stand among the outputs of gates and ups together."""
        return slice(1, None, 2) if self.transposed else slice(self.width, 2 * self.width)

    def activated(self, gate_up: Tensor) -> Tensor:
        """One expert's neurons from its gates and ups, by the module's own code.

        Args:
            gate_up: `[*rows, 2 neuron]`.
        """
        module: Any = base_of(self.module)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return module.act_fn(gate) * up


@dataclass(frozen=True)
class ExpertsUp:
    """The map to the second factor of all experts' neurons, and a shared expert's last, read when needed.

    Args:
        parts: the experts.
        device: where it is read to; None for where it is.
    """

    parts: ExpertsParts
    device: torch.device | None = None

    def linear(self, dtype: torch.dtype) -> AffineMap:
        """Read the map.

        Args:
            dtype: the precision of the result.
        """
        rows = self.parts.up_rows
        gate_up, bias, _, _ = self.parts.weights(dtype)
        offset = self._offset(gate_up)
        biases = None if bias is None else bias[:, rows].flatten()
        weight = gate_up[:, rows].flatten(0, 1)
        if offset:
            biases = offset + (weight.new_zeros(len(weight)) if biases is None else biases)
        affine = AffineMap(weight, biases)
        if self.parts.shared is not None:
            assert self.parts.shared.up is not None
            affine = affine.joined(self.parts.shared.up.linear(dtype).to(weight.device))
        return affine if self.device is None else affine.to(self.device)

    def _offset(self, like: Tensor) -> float:
        """What the experts add to their second factor, learnt from their own code: gpt-oss adds one."""
        gate_up = torch.ones(2, 2 * self.parts.width, device=like.device, dtype=like.dtype)
        gate_up[0, self.parts.up_rows] = 0
        at_zero, at_one = self.parts.activated(gate_up)[:, 0].tolist()
        return at_zero / (at_one - at_zero)


@dataclass(frozen=True)
class MLPParts:
    """The modules of an MLP sublayer, which is dense or a mixture of experts.

    Args:
        module: the MLP, or the block where its maps stand there.
        norm: what it reads the residual stream through, if there is one.
        post_norm: the norm after its output, if any.
        dense: its maps.
        experts: or its experts.
        residual: which norm is on the residual stream itself; see `AttentionSpec`.
    """

    module: nn.Module
    norm: nn.Module | None
    post_norm: nn.Module | None
    dense: DenseParts | None
    experts: ExpertsParts | None
    residual: ResidualNorm

    @property
    def every_dense(self) -> list[DenseParts]:
        """Its own maps, or those of a shared expert, where there are any."""
        dense = (self.dense, None if self.experts is None else self.experts.shared)
        return [parts for parts in dense if parts is not None]

    @property
    def width(self) -> int:
        """The number of its neurons, those of all experts in order and of a shared one last."""
        if self.dense is not None:
            return self.dense.down.shape[1]
        assert self.experts is not None
        shared = self.experts.shared
        return self.experts.count * self.experts.width + (0 if shared is None else shared.down.shape[1])

    def column(self, neuron: int, dtype: torch.dtype) -> Float[Tensor, "hidden"]:
        """What one neuron writes, before any norm after the MLP.

        Args:
            neuron: its number, as `width` counts them.
            dtype: the precision of the result.
        """
        dense = self.dense
        if self.experts is not None:
            expert, inside = divmod(neuron, self.experts.width)
            if expert < self.experts.count:
                return self.experts.column(expert, inside, dtype)
            neuron, dense = neuron - self.experts.count * self.experts.width, self.experts.shared
        assert dense is not None
        return dense.down.linear(dtype).weight[:, neuron]


@dataclass(frozen=True)
class Block:
    """The modules of one decoder block that take part in a decomposed pass.

    Args:
        index: the block's number.
        module: the block.
        attention: its first sublayer.
        mlp: its second sublayer.
        parallel: the MLP reads what enters the block.
        scale: what both sublayers' outputs are multiplied with.
    """

    index: int
    module: nn.Module
    attention: AttentionParts
    mlp: MLPParts
    parallel: bool
    scale: float

    @property
    def has_biases(self) -> bool:
        """Whether any constant enters the residual stream here, or pushes a bias component's shares."""
        attention, mlp = self.attention, self.mlp
        modules = [
            attention.norm,
            attention.post_norm,
            mlp.norm,
            mlp.post_norm,
            attention.value.module,
            attention.output.module,
            *(part.module for parts in mlp.every_dense for part in (parts.gate, parts.down)),
        ]
        if any(module is not None and has_bias(module) for module in modules):
            return True
        return mlp.experts is not None and mlp.experts.has_biases

    @property
    def quantised(self) -> bool:
        """Whether any map here is kept more coarsely than in half precision."""
        attention, mlp = self.attention, self.mlp
        modules = [
            attention.value.module,
            attention.output.module,
            None if attention.latent is None else attention.latent[0].module,
            None if mlp.experts is None else mlp.experts.module,
        ]
        for parts in mlp.every_dense:
            modules += [part.module for part in (parts.gate, parts.up, parts.down) if part is not None]
        return any(module is not None and is_quantised(module) for module in modules)


def bind(spec: FamilySpec, index: int, module: nn.Module, config: Any, owner: str) -> Block:
    """Bind a declaration to one block.

    Args:
        spec: the family's declaration.
        index: the block's number.
        module: the block.
        config: the model's configuration.
        owner: what the block is called in an error.

    Raises:
        DePassError: the block lacks a declared submodule.
    """
    return Block(
        index=index,
        module=module,
        attention=_attention(spec.attention, module, config.num_attention_heads, owner),
        mlp=_mlp(spec.mlp, module, owner),
        parallel=spec.parallel,
        scale=configured(config, spec.residual_scale),
    )


def _optional(module: nn.Module, path: str | None, owner: str) -> nn.Module | None:
    return None if path is None else submodule(module, path, owner)


def _attention(spec: AttentionSpec, module: nn.Module, heads: int, owner: str) -> AttentionParts:
    inside = submodule(module, spec.module, owner)
    output = Projection(submodule(inside, spec.output, owner))
    size = output.shape[1] // heads
    value = submodule(inside, spec.value, owner)
    latent = None
    if spec.latent is not None:
        projection, norm = (submodule(inside, name, owner) for name in spec.latent)
        latent = Projection(projection, slice(0, features(value)[0])), norm
    rows = _value_rows(spec, features(value)[1], heads, size, owner)
    return AttentionParts(
        module=inside,
        norm=_optional(module, spec.norm, owner),
        post_norm=_optional(module, spec.post_norm, owner),
        value=Projection(value, rows),
        latent=latent,
        output=output,
        heads=heads,
        in_mask=spec.in_mask,
        residual=spec.residual,
    )


def _value_rows(spec: AttentionSpec, outputs: int, heads: int, size: int, owner: str) -> Tensor | None:
    """Which outputs of a fused projection are values."""
    if spec.layout == "own":
        return None
    # Queries have `heads` parts; keys and values, or groups of queries, keys and values, share the rest.
    groups = heads if spec.latent is not None else (outputs // size - heads) // 2
    if groups < 1 or outputs % groups:
        raise DePassError(f"{owner}: '{spec.value}' has {outputs} outputs, too few for {heads} heads' values")
    everything = torch.arange(outputs)
    if spec.layout == "concatenated":
        return everything[-groups * size :]
    return everything.view(groups, -1)[:, -size:].flatten()


def _mlp(spec: MLPSpec, module: nn.Module, owner: str) -> MLPParts:
    inside = submodule(module, spec.module, owner)
    experts = None
    if spec.experts is not None and hasattr(inside, spec.experts.module):
        names = spec.experts
        shared = getattr(inside, names.shared, None) if names.shared else None
        experts = ExpertsParts(
            module=submodule(inside, names.module, owner),
            shared=None if shared is None else _dense(spec, shared, f"{owner}'s shared expert"),
            shared_gate=None if names.shared_gate is None else submodule(inside, names.shared_gate, owner),
        )
    return MLPParts(
        module=inside,
        norm=_optional(module, spec.norm, owner),
        post_norm=_optional(module, spec.post_norm, owner),
        dense=_dense(spec, inside, owner) if experts is None else None,
        experts=experts,
        residual=spec.residual,
    )


def _dense(spec: MLPSpec, inside: nn.Module, owner: str) -> DenseParts:
    gate = submodule(inside, spec.gate, owner)
    down = Projection(submodule(inside, spec.down, owner))
    if spec.up == spec.gate:
        half = features(gate)[1] // 2
        return DenseParts(Projection(gate, slice(0, half)), Projection(gate, slice(half, 2 * half)), down)
    up = _optional(inside, spec.up, owner)
    return DenseParts(Projection(gate), None if up is None else Projection(up), down)
