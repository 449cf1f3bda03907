"""Run a model without side effects, and restore the model and the process exactly.

What would silently change results is disabled meanwhile: dropout, gradients, autocast (also the one that
Accelerate adds to `forward`), matrix products of less than the tensors' precision, compiled code that calls
no hooks, rotary frequencies left by an earlier prompt, and other threads. Each model has a lock: calls of
DePass on it take turns, and a plain forward pass in another thread waits while the model is changed.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PretrainedConfig

from depass_lightning.models.affine import device_of
from depass_lightning.models.rotary import Frequencies
from depass_lightning.models.sharding import opened
from depass_lightning.models.unwrapping import unwrapped

POLL = 0.0005  # seconds


class _Shared:
    """Settings of the whole process, changed by the first thread that needs them and restored by the last.

    Args:
        change: changes the settings, and returns a function that restores them; None if nothing changed.
    """

    def __init__(self, change: Callable[[], Callable[[], object] | None]) -> None:
        self._change = change
        self._guard = threading.Lock()
        self._users = 0
        self._restore: Callable[[], object] | None = None

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Change the settings inside the context."""
        with self._guard:
            if self._users == 0:
                self._restore = self._change()
            self._users += 1
        try:
            yield
        finally:
            with self._guard:
                self._users -= 1
                if self._users == 0 and self._restore is not None:
                    self._restore()


def _full_precision() -> Callable[[], object] | None:
    """Multiply float32 matrices in float32, not in TF32 or bfloat16."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend, which the older function cannot read
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        saved = [(backend, backend.fp32_precision) for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"

        def restore() -> None:
            for backend, value in saved:
                backend.fp32_precision = "none"
                if backend.fp32_precision != value:  # it was set for this backend, not inherited
                    backend.fp32_precision = value

        return restore
    if precision == "highest":
        return None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(precision)


def _uncompiled() -> Callable[[], object]:
    stance: Any = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_PRECISION, _STANCE = _Shared(_full_precision), _Shared(_uncompiled)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' precision and without gradients, whatever contexts are active."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_PRECISION.changed())
        yield


class _Turns:
    """A lock that lets one thread at a time use one model.

    Waiting threads are listed, so that `drain` does not wait for them.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: set[int] = set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the lock."""
        if not self._lock.acquire(blocking=False):
            thread = threading.get_ident()
            self._waiting.add(thread)
            self._lock.acquire()
            self._waiting.discard(thread)
        try:
            yield
        finally:
            self._lock.release()

    def wait(self, *_hook: Any) -> None:
        """Wait for the thread that holds the lock; a forward hook."""
        with self.taken():
            pass

    def drain(self, model: nn.Module) -> None:
        """Wait until forward passes that other threads have started are over."""
        while threading.active_count() > 1 and self._running(model):
            time.sleep(POLL)

    def _running(self, model: nn.Module) -> bool:
        others = set(frames := sys._current_frames()) - {threading.get_ident()} - self._waiting
        return any(_runs(frames[thread], model) for thread in others)


def _runs(frame: Any, model: nn.Module) -> bool:
    """Whether a thread's stack is inside a call of a model."""
    call = nn.Module._call_impl.__code__
    while frame is not None:
        if frame.f_code is call and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_MAKING = threading.Lock()


def _turns(model: nn.Module) -> _Turns:
    with _MAKING:
        return _TURNS.setdefault(model, _Turns())


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Compute with a model in its weights' precision, while no other thread uses it through DePass.

    The weights of an FSDP2 model are gathered group by group (`models/sharding.py`).

    Args:
        model: the model; it may be compiled or have adapters.
    """
    inner = unwrapped(model)
    with _turns(inner).taken(), exact(device_of(inner)), opened(inner):
        yield


@contextmanager
def undisturbed(model: nn.Module, *, attention: str | None = "eager") -> Iterator[None]:
    """Disable dropout, gradients, autocast and compiled code, and choose the attention, inside the context.

    Each module's training flag and each configuration's attention implementation are restored one by one,
    since a model may mix them.

    Args:
        model: the model; it may be compiled or have adapters.
        attention: the attention implementation; `eager` returns its probabilities, None keeps the model's.
    """
    inner = unwrapped(model)
    turns = _turns(inner)
    with alone(inner), ExitStack() as stack:
        others = inner.register_forward_pre_hook(turns.wait)
        stack.callback(others.remove)
        turns.drain(inner)
        if any(_is_compiled(module) for module in inner.modules()):
            stack.enter_context(_STANCE.changed())
        frequencies = Frequencies(inner)
        if frequencies:
            stack.callback(frequencies.restore)
            frequencies.reset()
            stack.callback(inner.register_forward_pre_hook(frequencies.reset).remove)
        _evaluate(inner, stack)
        if "_original_forward" in vars(inner):  # Accelerate's wrapper applies autocast
            _replace(inner, "forward", inner._original_forward, stack)
        if attention is not None:
            configs = (getattr(module, "config", None) for module in inner.modules())
            unique = {id(config): config for config in configs if isinstance(config, PretrainedConfig)}
            for config in unique.values():
                _replace(config, "_attn_implementation_internal", attention, stack)
        yield


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _evaluate(model: nn.Module, stack: ExitStack) -> None:
    """Leave training mode until the stack is closed."""
    for module in [module for module in model.modules() if module.training]:
        stack.callback(setattr, module, "training", True)
        module.training = False


def _replace(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    """Set an attribute until the stack is closed."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
