"""Weights that FSDP2 shards over ranks, gathered on every rank while they are read.

FSDP gathers a group of weights in the hooks of its module's forward pass, in the precision of its
`MixedPrecisionPolicy`. A decomposed pass also reads weights between forward passes. So FSDP's hooks are
disabled meanwhile, and weights are gathered from the shards as they are: one group at a time, except those in
no inner group (embedding, final norm, unembedding). FSDP's state, and with it training, is not changed.

Gathers are collective: all ranks must make the same calls in the same order.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from depass_lightning.errors import DePassError

PLAIN = (nn.Parameter, Tensor, DTensor)  # quantised weights may have their library's tensor class
WAY_OUT = (
    "train with DDP or FSDP2, or attribute the checkpoints as they appear: python analyze.py "
    "watch.folder=<the training's output folder>"
)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model's weights over ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_shards(model: nn.Module) -> None:
    """Refuse weights that are sharded other than by FSDP2.

    Raises:
        DePassError: a parameter is a shard of a weight, or is not on the device where it is used.
    """
    groups = is_sharded(model)
    for name, parameter in model.named_parameters():
        fault = _fault(parameter, groups)
        if fault is None and name.endswith("weight") and parameter.ndim == 1 and _is_matrix(model, name):
            fault = "flattened pieces, as FSDP1 makes them"
        if fault is not None:
            raise DePassError(
                f"the weights of {type(model).__name__} are sharded over ranks ({fault}), but DePass needs "
                f"all of a block's on every rank; {WAY_OUT}"
            )


def _fault(parameter: nn.Parameter, groups: bool) -> str | None:
    if hasattr(parameter, "ds_id"):  # DeepSpeed's mark; ZeRO-1 and 2 keep weights whole
        return "ZeRO-3"
    if not isinstance(parameter, DTensor):
        return None
    if not groups or sum(not isinstance(placement, Replicate) for placement in parameter.placements) > 1:
        return "DTensors, as tensor parallelism makes them"
    if parameter.device.type != parameter.device_mesh.device_type:
        return f"FSDP2's with CPUOffloadPolicy, on {parameter.device.type}"
    return None


def _is_matrix(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Linear | nn.Embedding)


def mixed_precision(model: nn.Module) -> torch.dtype | None:
    """The precision of FSDP2's `MixedPrecisionPolicy`, if it differs from that of the weights.

    Args:
        model: the language model, or the module that is trained.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            policy: Any = getattr(module._get_fsdp_state(), "_mp_policy", None)
            return getattr(policy, "param_dtype", None)
    return None


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all ranks."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather all weights of a module inside the context."""
    with ExitStack() as stack:
        _gather(module.modules(), stack)
        yield


@contextmanager
def opened(model: nn.Module, around: nn.Module | None = None) -> Iterator[None]:
    """Let an FSDP2 model run without FSDP, gathering one group of weights after another.

    Weights that are in no inner group are gathered inside the whole context.

    Args:
        model: the language model; one that is not sharded is not changed.
        around: the module that is trained, if it contains the model and is FSDP's root.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not groups:
        yield
        return
    outer = [] if around is None else [part for part in around.modules() if isinstance(part, FSDPModule)]
    with ExitStack() as stack:
        for group in {id(group): group for group in (*outer, *groups)}.values():
            group.reshard()  # a forward pass leaves the root's weights gathered, in the policy's precision
        for group in groups:
            _disable(group, stack)
        _gather(_outside_groups(model), stack)
        for group in groups:
            if group is not model:
                _gather_when_called(group, stack)
        yield


def _gather(modules: Iterable[nn.Module], stack: ExitStack) -> None:
    """Replace sharded weights by gathered ones until the stack is closed."""
    tied: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in tied:
                tied[id(parameter)] = nn.Parameter(whole(parameter), requires_grad=False)
            stack.callback(module._parameters.__setitem__, name, parameter)
            module._parameters[name] = tied[id(parameter)]


def _outside_groups(module: nn.Module) -> list[nn.Module]:
    """The modules inside a module that are in none of the groups inside it."""
    parts = list(module.modules())
    groups = (part for part in parts if isinstance(part, FSDPModule) and part is not module)
    inner = {id(part) for group in groups for part in group.modules()}
    return [part for part in parts if id(part) not in inner]


def _gather_when_called(group: nn.Module, stack: ExitStack) -> None:
    """Gather a group's weights during its forward passes until the stack is closed."""
    running = stack.enter_context(ExitStack())

    def enter(*_hook: Any) -> None:
        _gather(_outside_groups(group), running)

    def leave(*_hook: Any) -> None:
        running.close()

    stack.callback(group.register_forward_pre_hook(enter).remove)
    stack.callback(group.register_forward_hook(leave, always_call=True).remove)


def _disable(group: nn.Module, stack: ExitStack) -> None:
    """Remove FSDP's hooks from a module, and restore them in their order when the stack is closed."""
    for hooks in (group._forward_pre_hooks, group._forward_hooks):
        saved = dict(hooks)
        for key, hook in saved.items():
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                del hooks[key]
        if len(hooks) < len(saved):
            stack.callback(_restore, hooks, saved)


def _restore(hooks: dict[int, Any], saved: dict[int, Any]) -> None:
    added = {key: hook for key, hook in hooks.items() if key not in saved}
    hooks.clear()
    hooks.update(saved | added)
