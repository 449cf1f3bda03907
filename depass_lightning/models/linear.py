"""The linear maps of a model as plain tensors, however the model keeps them.

A map may be stored transposed (GPT-2), with an adapter beside it (LoRA), quantised, or on another device
until it is called. What cannot be read directly is asked: fed the identity, an affine map shows its matrix.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from depass_lightning.errors import DePassError

AT_ONCE = 4096  # rows of the identity


@dataclass(frozen=True)
class Linear:
    """An affine map of the model as plain tensors, `x -> x weight^T + bias`."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"] | None


def linear_of(module: nn.Module, dtype: torch.dtype) -> Linear:
    """Read a module's affine map, dequantised and with its active adapters.

    Args:
        module: a linear layer of the model.
        dtype: the precision of the result; nothing is copied where the module already has it.

    Raises:
        DePassError: the module has no weight matrix.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor) and _readable(module, weight):
        matrix = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
        return Linear(matrix.to(dtype), bias.detach().to(dtype) if isinstance(bias, Tensor) else None)
    if _is_plain_lora(module):
        return _with_adapters(module, dtype)
    if not isinstance(weight, Tensor) and not hasattr(module, "base_layer"):
        raise DePassError(f"{type(module).__name__} is not a linear layer with a weight matrix")
    return _asked(module, dtype)


def features(module: nn.Module) -> tuple[int, int]:
    """The numbers of a linear layer's inputs and outputs, without reading its weights.

    Args:
        module: a linear layer of the model.

    Raises:
        DePassError: the module does not say.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return features(base)
    raise DePassError(f"{type(module).__name__} is not a linear layer: it does not say how wide it is")


def has_bias(module: nn.Module) -> bool:
    """Whether a layer adds a constant.

    Args:
        module: a linear layer or a norm.
    """
    base = getattr(module, "base_layer", module)
    return getattr(base, "bias", None) is not None


def _readable(module: nn.Module, weight: Tensor) -> bool:
    """Whether a module's weight is what it multiplies with."""
    plain = isinstance(module, nn.Linear | Conv1D) and not hasattr(module, "base_layer")
    # A quantised weight may be a tensor of its own class.
    return (
        plain
        and type(weight) in (nn.Parameter, Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()
        and not weight.is_meta
    )


def _is_plain_lora(module: Any) -> bool:
    """Whether a module is a LoRA layer of the `peft` package whose adapters simply add up."""
    return (
        hasattr(module, "get_delta_weight")
        and hasattr(module, "active_adapters")
        and isinstance(getattr(module, "base_layer", None), nn.Linear | Conv1D)
        and not any(getattr(module, "use_dora", {}).values())
        and not getattr(module, "lora_variant", {})
    )


def _with_adapters(module: Any, dtype: torch.dtype) -> Linear:
    base = linear_of(module.base_layer, dtype)
    if module.merged or module.disable_adapters:
        return base
    weight, bias = base.weight, base.bias
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            delta = module.get_delta_weight(adapter).detach().to(dtype)
            # peft gives it in the base layer's own orientation.
            weight = weight + (delta.T if isinstance(module.base_layer, Conv1D) else delta)
            added = module.lora_B[adapter].bias
            if added is not None:
                added = module.scaling[adapter] * added.detach().to(dtype)
                bias = added if bias is None else bias + added
    return Linear(weight, bias)


def _asked(module: nn.Module, dtype: torch.dtype) -> Linear:
    """Read an affine map by feeding it the identity."""
    width, _ = features(module)
    with torch.no_grad():
        identity = torch.eye(width, device=device_of(module), dtype=_precision_of(module))
        constant = module(identity.new_zeros(1, width))[0].to(dtype)
        columns = [module(rows).to(dtype) - constant for rows in identity.split(AT_ONCE)]
    return Linear(torch.cat(columns).T.contiguous(), constant if bool(constant.any()) else None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module expects its input, offloaded by `accelerate` or not.

    Args:
        module: a part of the model.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _precision_of(module: nn.Module) -> torch.dtype:
    """The precision that a module expects its input in."""
    base: Any = getattr(module, "base_layer", module)
    precision = getattr(base, "compute_dtype", None)  # bitsandbytes
    if precision is None:
        kinds = [tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()]
        precision = kinds[0] if kinds else torch.float32
    return precision


@dataclass(frozen=True)
class Part:
    """A linear map inside the model: a module, or some of its outputs.

    Args:
        module: the module.
        rows: which of its outputs; None for all.
    """

    module: nn.Module
    rows: Int[Tensor, "out"] | slice | None = None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        inputs, outputs = features(self.module)
        return len(range(outputs)[self.rows]) if isinstance(self.rows, slice) else (
            outputs if self.rows is None else len(self.rows)
        ), inputs

    def linear(self, dtype: torch.dtype) -> Linear:
        """Read the map.

        Args:
            dtype: the precision of the result.
        """
        whole = linear_of(self.module, dtype)
        if self.rows is None:
            return whole
        rows = self.rows if isinstance(self.rows, slice) else self.rows.to(whole.weight.device)
        return Linear(whole.weight[rows], None if whole.bias is None else whole.bias[rows])

    def of(self, output: Float[Tensor, "*rows all"]) -> Float[Tensor, "*rows out"]:
        """Pick this map's outputs from the module's."""
        if self.rows is None:
            return output
        return output[..., self.rows if isinstance(self.rows, slice) else self.rows.to(output.device)]
