"""Devices that are not there: what a GPU would refuse, found on a processor.

Inside `fake_devices()` a tensor is on `cuda:0` (or `cuda:1` ...) where it was put there, and is computed on
the processor all the same. The device is noted per storage, so views and in-place operations share it. A
function mode answers `.device` and takes `device=` out of every call; a dispatch mode below it passes the
device on to results and refuses operations on tensors of different devices, as torch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
PROPERTY: Any = Tensor
GIB = 2**30
# Indices may be on the processor: torch copies them.
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
COPIES = ("copy_", "_to_copy", "set_")
# By element, an operation takes numbers (tensors without dimensions) from the processor; these do not.
NOT_BY_ELEMENT = (
    *("mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv", "convolution", "embedding", "native_layer_norm"),
    *("cat", "stack", "index_select", "index_add", "index_copy", "gather", "take", "isin", "topk", "sort"),
    *("scatter", "scatter_add", "scatter_reduce", "searchsorted", "bucketize", "_softmax", "_log_softmax"),
)


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of different devices."""


class Devices:
    """Which storage is on which device."""

    def __init__(self) -> None:
        self._devices: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.inside = (
            CPU  # what a function that is running makes without a device, as attention makes its mask
        )

    def of(self, tensor: Tensor) -> torch.device:
        try:
            reference, device = self._devices.get(tensor.untyped_storage()._cdata, (None, CPU))
        except (NotImplementedError, RuntimeError):
            return CPU  # no storage
        # The address of a storage that is gone may be another's now.
        return CPU if reference is None or reference.expired() else device

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if device == CPU:
            self._devices.pop(storage._cdata, None)
        else:
            self._devices[storage._cdata] = StorageWeakRef(storage), device

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        if self.of(tensor) == device or tensor.is_meta:
            return tensor
        copied = tensor.clone()
        self.put(copied, device)
        return copied


def _device(value: Any) -> torch.device:
    if isinstance(value, int):
        return torch.device("cuda", value)
    device = torch.device(value)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


class _Functions(TorchFunctionMode):
    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = dict(kwargs or {}), self.devices
        name = getattr(func, "__name__", "")
        if name == "__get__" and args and isinstance(args[0], Tensor):
            device = devices.of(args[0])
            if func == PROPERTY.device.__get__ and device != CPU:
                return device
            if func in (PROPERTY.is_cuda.__get__, PROPERTY.is_cpu.__get__):
                return (device == CPU) == (func == PROPERTY.is_cpu.__get__)
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            return devices.moved(args[0], CPU)
        if func is Tensor.cuda:
            return devices.moved(args[0], _device(args[1] if len(args) > 1 else kwargs.get("device", 0)))
        if func is Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and devices.of(args[0]) != CPU:
            raise MixedDevicesError("numpy cannot read a tensor on a device")
        wanted = kwargs.pop("device", None)
        device = None if wanted is None else _device(wanted)
        if device is None and name.startswith("new_"):
            device = devices.of(args[0])
        outer = devices.inside
        leaves = (devices.of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        devices.inside = next((leaf for leaf in leaves if leaf != CPU), CPU)
        try:
            result = func(*args, **kwargs)
        finally:
            devices.inside = outer
        if func in (torch.as_tensor, Tensor.__deepcopy__) and isinstance(args[0], Tensor):
            return devices.moved(result, device or devices.of(args[0]))
        if device is not None and device.type != "meta" and isinstance(result, Tensor):
            devices.put(result, device)
        return result

    def _to(self, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in (*args, kwargs.get("other")):
            if isinstance(value, Tensor):
                device, dtype = self.devices.of(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.device | str | int) and not isinstance(value, bool):
                device = value
        result = tensor if dtype is None else tensor.to(dtype=dtype)
        return result if device is None else self.devices.moved(result, _device(device))


class _Operations(TorchDispatchMode):
    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = [self.devices.of(tensor) for tensor in tensors]
        home = next((device for device in devices if device != CPU), CPU)
        if not tensors:
            home = self.devices.inside
        if len(set(devices)) > 1 and name not in COPIES:
            self._check(name, args, tensors, devices, home)
        result = func(*args, **kwargs)
        if home != CPU:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in tensors):
                    self.devices.put(leaf, home)
        return result

    def _check(
        self, name: str, args: Any, tensors: list[Tensor], devices: list[torch.device], home: torch.device
    ) -> None:
        if name in INDEXED:
            home = self.devices.of(args[0])
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            pairs = [(index, self.devices.of(index)) for index in indices]
            pairs = [(index, device) for index, device in pairs if device != CPU]
            if len(args) > 2:
                pairs.append((args[2], self.devices.of(args[2])))
        else:
            pairs = list(zip(tensors, devices, strict=True))
        strict = name.rstrip("_") in NOT_BY_ELEMENT
        for tensor, device in pairs:
            if device != home and (strict or tensor.ndim or device != CPU):
                operands = ", ".join(
                    f"{tuple(operand.shape)} on {place}"
                    for operand, place in zip(tensors, devices, strict=True)
                )
                raise MixedDevicesError(f"{name}: {operands}")


@contextmanager
def fake_devices() -> Iterator[Devices]:
    """Let tensors be on `cuda` devices that are not there."""
    devices = Devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (60 * GIB, 80 * GIB))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8))
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        with _Operations(devices), _Functions(devices):
            yield devices
