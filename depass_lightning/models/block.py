"""One decoder block as its family declares it, bound to the modules of the model at hand."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.models.affine import Projection, has_bias, is_quantised
from depass_lightning.models.experts import DenseParts, ExpertsParts
from depass_lightning.models.mixers import Mixer
from depass_lightning.models.spec import ResidualNorm


@dataclass(frozen=True)
class AttentionParts:
    """The modules and settings that `AttentionSpec` names, of one block.

    Args:
        value: the value map, which reads `latent` if there is one.
        latent: the map to the latent and the norm after it.
        gate: the map to the gates, one for each head or for each of the output map's inputs.
        mixer: the linear mixer in attention's place, if there is one.
        probabilities: computes them, if the module does not return them.
        output_bias: what is added after the output map, in addition to its bias.
    """

    module: nn.Module
    value: Projection
    output: Projection
    heads: int
    norm: nn.Module | None = None
    post_norm: nn.Module | None = None
    latent: tuple[Projection, nn.Module] | None = None
    in_mask: str | None = None
    residual: ResidualNorm = "none"
    residual_weight: Tensor | float | None = None
    output_weight: Tensor | float = 1.0
    value_norm: nn.Module | None = None
    gate: Projection | None = None
    mixer: Mixer | None = None
    probabilities: Callable[..., Tensor] | None = None
    weights: nn.Module | None = None
    inner_norm: nn.Module | None = None
    output_bias: Tensor | None = None
    value_scale: float = 1.0
    gate_activation: str = "sigmoid"
    scaled_heads: bool = False

    @property
    def has_plain_values(self) -> bool:
        """Whether nothing comes between the value map and the mixing of positions."""
        return self.mixer is None and self.value_norm is None

    @property
    def mixing(self) -> nn.Module:
        """The module that computes probabilities and mixes values."""
        return self.weights or self.module


@dataclass(frozen=True)
class MLPParts:
    """The modules and settings that `MLPSpec` names, of one block.

    Args:
        dense: the maps, of an MLP that is no mixture of experts.
        absent: the block has no MLP.
    """

    module: nn.Module
    norm: nn.Module | None = None
    post_norm: nn.Module | None = None
    dense: DenseParts | None = None
    experts: ExpertsParts | None = None
    residual: ResidualNorm = "none"
    residual_weight: Tensor | float | None = None
    output_weight: Tensor | float = 1.0
    absent: bool = False

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
        ends: the modules that are called first and last, if the model does not call `module` itself.
    """

    index: int
    module: nn.Module
    attention: AttentionParts
    mlp: MLPParts
    parallel: bool
    scale: float
    ends: tuple[nn.Module, nn.Module] | None = None

    @property
    def entry(self) -> nn.Module:
        """The module whose input is the state that enters the block."""
        return self.module if self.ends is None else self.ends[0]

    @property
    def exit(self) -> nn.Module:
        """The module whose output is the state that leaves the block."""
        return self.module if self.ends is None else self.ends[1]

    def factor(self, parts: AttentionParts | MLPParts) -> float:
        """What a sublayer's output is multiplied with."""
        return self.scale * float(parts.output_weight)

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
        if attention.output_bias is not None:
            return True
        if attention.mixer is not None and attention.mixer.has_biases:
            return True
        return mlp.experts is not None and mlp.experts.has_biases

    @property
    def adds_to_scores(self) -> bool:
        """Whether attention's scores contain constants, such as sinks or ALiBi's slopes."""
        module = self.attention.module
        arguments = inspect.signature(module.forward).parameters
        sinks = any(True for _ in module.parameters(recurse=False))
        return self.attention.mixer is None and (
            sinks or not arguments.keys().isdisjoint(("alibi", "position_bias"))
        )

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
