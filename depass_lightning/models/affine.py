"""The linear maps of a model as plain tensors, however the model keeps them.

A map may be stored transposed (GPT-2), with an adapter next to it (LoRA), quantised, or on another device
until it is called. What cannot be read directly is asked: fed the identity, an affine map shows its matrix.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from depass_lightning.errors import DePassError
from depass_lightning.models.sharding import PLAIN, gathered

AT_ONCE = 4096  # rows of the identity


@dataclass(frozen=True)
class AffineMap:
    """An affine map of the model as plain tensors, `x -> x weight^T + bias`."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"] | None

    def to(self, device: torch.device) -> "AffineMap":
        """Return the same map on a device."""
        return AffineMap(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def scaled(self, factor: float) -> "AffineMap":
        """Return the map times a factor."""
        return AffineMap(self.weight * factor, None if self.bias is None else self.bias * factor)

    def joined(self, other: "AffineMap") -> "AffineMap":
        """Return one map with this map's outputs and then those of another map of the same inputs."""
        bias = None
        if self.bias is not None or other.bias is not None:
            bias = torch.cat([self._constant(), other._constant()])
        return AffineMap(torch.cat([self.weight, other.weight]), bias)

    def _constant(self) -> Tensor:
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias


def linear_of(module: nn.Module, dtype: torch.dtype) -> AffineMap:
    """Read a module's affine map, dequantised and with its active adapters.

    Args:
        module: a linear layer of the model.
        dtype: the precision of the result; nothing is copied where the module already has it.

    Raises:
        DePassError: the module is not a linear layer.
    """
    module = chosen(module)
    with held(module):
        affine = _read(module, dtype)
    return _asked(module, dtype) if affine is None else affine


def rows_of(
    module: nn.Module, rows: Int[Tensor, "row"], dtype: torch.dtype
) -> tuple[Float[Tensor, "row in"], Float[Tensor, "row"]]:
    """Read some outputs' weights and biases, without a copy of all others where the module allows it.

    Args:
        module: a linear layer of the model.
        rows: the outputs' numbers.
        dtype: the precision of the result.

    Raises:
        DePassError: the module is not a linear layer.
    """
    module = chosen(module)
    with held(module):
        if isinstance(module, nn.Linear) and _readable(module):
            rows = rows.to(module.weight.device)
            weight, bias = module.weight.detach()[rows].to(dtype), module.bias
            return weight, weight.new_zeros(len(rows)) if bias is None else bias.detach()[rows].to(dtype)
    linear = linear_of(module, dtype)
    rows = rows.to(linear.weight.device)
    biases = linear.weight.new_zeros(len(rows)) if linear.bias is None else linear.bias[rows]
    return linear.weight[rows], biases


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Make a module's tensors available: offloaded and sharded ones are loaded inside the context."""
    with ExitStack() as stack:
        for fetched in (*map(align_module_device, module.modules()), gathered(module)):
            stack.enter_context(fetched)
        yield


def chosen(module: nn.Module) -> Any:
    """Return what computes in a module's place.

    That is what it was compiled from, or what `peft` trains of it: a copy or some rows.
    """
    inner: Any = getattr(module, "_orig_mod", module)
    if hasattr(inner, "token_adapter"):
        return inner.token_adapter
    if not hasattr(inner, "modules_to_save") or not hasattr(inner, "original_module"):
        return inner
    active = [] if inner.disable_adapters else inner.active_adapters
    copies = [inner.modules_to_save[name] for name in active if name in inner.modules_to_save]
    return copies[0] if copies else inner.original_module


def features(module: nn.Module) -> tuple[int, int]:
    """The numbers of a linear layer's inputs and outputs, without reading its weights.

    Raises:
        DePassError: the module does not expose it.
    """
    module = chosen(module)
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear) and _readable(module):
        outputs, inputs = module.weight.shape  # its attributes may describe another matrix (tied copies)
        return inputs, outputs
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return features(base)
    raise DePassError(f"{type(module).__name__} is not a linear layer: it has no width")


def has_bias(module: nn.Module) -> bool:
    """Whether a layer adds a constant."""
    module = chosen(module)
    base = getattr(module, "base_layer", module)
    return getattr(base, "bias", None) is not None or _with_biases(module, None, torch.float32) is not None


def bias_of(module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "out"]:
    """The constant that a layer adds, those of its active adapters included.

    Args:
        module: a linear layer or a norm that adds one.
        dtype: the precision of the result.
    """
    module = chosen(module)
    with held(module):
        bias = getattr(getattr(module, "base_layer", module), "bias", None)
        bias = None if bias is None else bias.detach().to(dtype)
        bias = _with_biases(module, bias, dtype)
    assert bias is not None
    return bias


def base_of(module: nn.Module) -> nn.Module:
    """The model's own module inside those of `peft` that adapt its parameters, one around another."""
    while hasattr(module, "parameter_name") and isinstance(module.base_layer, nn.Module):
        module = module.base_layer
    return module


def parameter_of(module: nn.Module, name: str, dtype: torch.dtype | None) -> Tensor | None:
    """Read a parameter that is no layer of its own, with its active adapters.

    Args:
        module: the module that has it, or the adapters around that.
        name: the parameter's name.
        dtype: the precision of the result; None for its own.

    Returns:
        The parameter; None where there is none of this name.
    """
    with held(module):
        parameter = getattr(base_of(module), name, None)
        if parameter is None:
            return None
        value = parameter.detach() if dtype is None else parameter.detach().to(dtype)
        around: Any = module
        while around is not base_of(module):
            if around.parameter_name == name:
                for adapter in _added(around):
                    value = value + around.get_delta_weight(adapter).detach().to(value)
            around = around.base_layer
        return value


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weights are kept more coarsely than in half precision, by whatever library."""
    return any(
        type(tensor) not in PLAIN
        or tensor.dtype.itemsize < 2
        or not (tensor.is_floating_point() or tensor.ndim < 2)
        for tensor in (*module.parameters(), *module.buffers())
    )


def _read(module: nn.Module, dtype: torch.dtype) -> AffineMap | None:
    """Read a map from its tensors; None if these do not determine what it computes."""
    if _is_plain_lora(module):
        return _with_adapters(module, dtype)
    if _trains_rows(module):
        return _with_rows(module, dtype)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        return None
    if _readable(module):
        matrix = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    elif _dequantises(module):
        matrix = weight.detach().dequantize()
    else:
        return None
    return AffineMap(matrix.to(dtype), bias.detach().to(dtype) if isinstance(bias, Tensor) else None)


def _readable(module: nn.Module) -> bool:
    """Whether a module's weight is what it multiplies with."""
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Linear | Conv1D) and not hasattr(module, "base_layer")
    # A quantised weight may be a tensor of its own class.
    return (
        plain
        and isinstance(weight, Tensor)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()
        and not weight.is_meta
    )


def _dequantises(module: nn.Module) -> bool:
    """Whether a module's weight is a quantised tensor of `torchao` that can be dequantised."""
    weight: Any = getattr(module, "weight", None)
    return (
        type(module) is nn.Linear
        and type(weight).__module__.startswith("torchao.")
        and type(weight).dequantize is not Tensor.dequantize
        and getattr(weight, "act_pre_scale", None) is None  # inputs are scaled, too
        and not weight.is_meta
    )


def _trains_rows(module: Any) -> bool:
    """Whether a module is a layer of which `peft` trains some rows, on top of a plain one."""
    return hasattr(module, "get_merged_weights") and _readable(module.base_layer)


def _with_rows(module: Any, dtype: torch.dtype) -> AffineMap:
    base = linear_of(module.base_layer, dtype)
    if module.merged or module.disable_adapters:
        return base
    return AffineMap(module.get_merged_weights(module.active_adapters).detach().to(dtype), base.bias)


def _is_plain_lora(module: Any) -> bool:
    """Whether a module is a LoRA or AdaLoRA layer of the `peft` package whose adapters simply add up."""
    return (
        hasattr(module, "get_delta_weight")
        and hasattr(module, "lora_A")
        and isinstance(getattr(module, "base_layer", None), nn.Linear | Conv1D)
        and not any(getattr(module, "use_dora", {}).values())
        and not getattr(module, "lora_variant", {})
    )


def _added(module: Any) -> list[str]:
    """The adapters of a LoRA layer that are added to its base when it is called."""
    if not hasattr(module, "lora_A") or module.merged or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _with_adapters(module: Any, dtype: torch.dtype) -> AffineMap:
    base = linear_of(module.base_layer, dtype)
    weight = base.weight
    for name in _added(module):
        delta = module.get_delta_weight(name).detach().to(weight)
        # peft gives it in the base layer's own orientation.
        weight = weight + (delta.T if isinstance(module.base_layer, Conv1D) else delta)
    return AffineMap(weight, _with_biases(module, base.bias, dtype))


def _with_biases(module: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Add a LoRA layer's own biases, where it has any, to its base's."""
    for name in _added(module):
        added = getattr(module.lora_B[name], "bias", None)  # AdaLoRA keeps plain matrices
        if added is not None:
            added = module.scaling[name] * added.detach().to(dtype)
            bias = added if bias is None else bias.to(added) + added
    return bias


def _asked(module: nn.Module, dtype: torch.dtype) -> AffineMap:
    """Read an affine map by feeding it the identity."""
    width, _ = features(module)
    like: dict[str, Any] = {"device": device_of(module), "dtype": _precision_of(module)}
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:  # an adapter's dropout
            part.training = False
        with torch.no_grad():
            constant = module(torch.zeros(1, width, **like))[0].to(dtype)
            columns = []
            for first in range(0, width, AT_ONCE):
                rows = torch.zeros(min(AT_ONCE, width - first), width, **like)
                rows.diagonal(first).fill_(1)
                columns.append(module(rows).to(dtype) - constant)
    finally:
        for part in training:
            part.training = True
    return AffineMap(torch.cat(columns).T.contiguous(), constant if bool(constant.any()) else None)


def device_of(module: nn.Module, near: nn.Module | None = None) -> torch.device:
    """Where a module expects its input, offloaded by `accelerate` or not.

    Args:
        module: a part of the model.
        near: a module on the same device, read where this one has no tensors, as a norm without weights.
    """
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    for device in (getattr(hook, "execution_device", None) for hook in hooks):
        if device is not None:
            return torch.device(device)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu") if near is None else device_of(near)


def _precision_of(module: nn.Module) -> torch.dtype:
    """The precision that a module expects its input in."""
    base: Any = getattr(module, "base_layer", module)
    precision = getattr(base, "compute_dtype", None)  # bitsandbytes
    kinds = (tensor.dtype for tensor in (*base.parameters(), *base.buffers()) if tensor.is_floating_point())
    return next(kinds, torch.float32) if precision is None else precision


@dataclass(frozen=True)
class Projection:
    """A linear map inside the model: a module, or some of its outputs.

    Args:
        module: the module.
        rows: which of its outputs; None for all.
        device: where it is read to; None for where it is.
    """

    module: nn.Module
    rows: Int[Tensor, "out"] | slice | None = None
    device: torch.device | None = None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        inputs, outputs = features(self.module)
        if isinstance(self.rows, slice):
            outputs = len(range(outputs)[self.rows])
        elif self.rows is not None:
            outputs = len(self.rows)
        return outputs, inputs

    def linear(self, dtype: torch.dtype) -> AffineMap:
        """Read the map."""
        affine = linear_of(self.module, dtype)
        if self.rows is not None:
            rows = self.rows if isinstance(self.rows, slice) else self.rows.to(affine.weight.device)
            affine = AffineMap(affine.weight[rows], None if affine.bias is None else affine.bias[rows])
        return affine if self.device is None else affine.to(self.device)

    def of(self, output: Float[Tensor, "*rows all"]) -> Float[Tensor, "*rows out"]:
        """Pick this map's outputs from the module's."""
        if self.rows is None:
            return output
        return output[..., self.rows if isinstance(self.rows, slice) else self.rows.to(output.device)]
