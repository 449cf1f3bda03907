"""Run a model as it is meant to be explained, and leave it and the process exactly as they were found.

What would silently change results is held off meanwhile: dropout, gradients, autocast (also the one that
Accelerate puts into `forward`), matrix products coarser than the tensors' precision, compiled code that calls
no hooks, rotary frequencies left by an earlier prompt, and other threads. Each model has a lock: calls of
DePass on it take turns, and while it is changed a plain forward pass in another thread waits.
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
from depass_lightning.models.decoder import unwrapped
from depass_lightning.models.rotary import Frequencies

POLL = 0.0005  # seconds


class _Shared:
    """Settings of the whole process, changed by the first thread that needs it and put back by the last.

    Args:
        change: changes the settings, and returns what puts them back.
    """

    def __init__(self, change: Callable[[], Callable[[], object] | None]) -> None:
        self._change = change
        self._guard = threading.Lock()
        self._users = 0
        self._restore: Callable[[], object] | None = None

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Have the settings changed."""
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
        found = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by each backend's name, which torch does not let one read by the older one
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        before = [(own, own.fp32_precision) for own in backends]
        for own in backends:
            own.fp32_precision = "ieee"

        def put_back() -> None:
            for own, precision in before:
                own.fp32_precision = "none"
                if own.fp32_precision != precision:  # it was this backend's, not inherited
                    own.fp32_precision = precision

        return put_back
    if found == "highest":
        return None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(found)


def _uncompiled() -> Callable[[], object]:
    stance: Any = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_PRECISION, _STANCE = _Shared(_full_precision), _Shared(_uncompiled)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own precision and without gradients, whatever surrounds it.

    Args:
        device: where the computation runs.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_PRECISION.changed())
        yield


class _Turns:
    """One thread at a time on one model, the others waiting.

    A thread that waits is listed, so that nobody waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: set[int] = set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have the model."""
        if not self._lock.acquire(blocking=False):
            here = threading.get_ident()
            self._waiting.add(here)
            self._lock.acquire()
            self._waiting.discard(here)
        try:
            yield
        finally:
            self._lock.release()

    def wait(self, *_hook: Any) -> None:
        """Wait for the thread that has the model; a forward hook."""
        with self.taken():
            pass

    def drain(self, model: nn.Module) -> None:
        """Wait until forward passes that other threads have begun are over."""
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
    """Compute with a model and its weights exactly, while no other thread does so by DePass.

    Args:
        model: the model, compiled or with adapters or not.
    """
    inner = unwrapped(model)
    with _turns(inner).taken(), exact(device_of(inner)):
        yield


@contextmanager
def undisturbed(model: nn.Module, *, eager: bool = True) -> Iterator[None]:
    """Run a model to look at it: no dropout, no gradients, no autocast, eager attention, nothing compiled;
    undone on leaving.

    Each module's training flag and each configuration's attention implementation are put back one by one,
    since a model may mix them.

    Args:
        model: the model, compiled or with adapters or not.
        eager: have attention compute its probabilities; else it runs as it is.
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
        if "_original_forward" in vars(inner):  # Accelerate's, without its autocast
            _replace(inner, "forward", inner._original_forward, stack)
        if eager:
            found = (getattr(module, "config", None) for module in inner.modules())
            for config in {id(own): own for own in found if isinstance(own, PretrainedConfig)}.values():
                _replace(config, "_attn_implementation_internal", "eager", stack)
        yield


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _evaluate(model: nn.Module, stack: ExitStack) -> None:
    """Leave training mode, until the stack is left."""
    for module in [own for own in model.modules() if own.training]:
        stack.callback(setattr, module, "training", True)
        module.training = False


def _replace(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    """Set an attribute until the stack is left."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
