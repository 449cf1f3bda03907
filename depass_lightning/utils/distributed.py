"""Several processes that run the same program: what goes in batches is shared out, and all know all results.

Lightning starts the processes; inside `sharing()` each of them makes the same calls in the same order. A
mistake in one of them is raised in all, instead of leaving the others waiting for it.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from depass_lightning.errors import DePassError

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)
Result = TypeVar("Result")


@contextmanager
def sharing(active: bool = True) -> Iterator[None]:
    """Share out the batches of all calls inside among the processes of the default group.

    Args:
        active: False lets this process work by itself again, inside of such a share.
    """
    several = active and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    token = _sharing.set(several)
    try:
        yield
    finally:
        _sharing.reset(token)


def place() -> tuple[int, int]:
    """Return this process's number and how many share the work; 0 and 1 outside of `sharing()`."""
    return (dist.get_rank(), dist.get_world_size()) if _sharing.get() else (0, 1)


def from_all(work: Callable[[], Result]) -> list[Result]:
    """Do some work on each process, and return what every one of them came to, in their order.

    Args:
        work: what this process does; its result can be pickled.

    Raises:
        DePassError: another process made a mistake, which it names, or is gone.
    """
    rank, world = place()
    if world == 1:
        return [work()]
    own = _outcome(work)
    packed: list[bytes] = [b""] * world
    with _meeting(world):
        dist.all_gather_object(packed, _packed(own))
    return [_result(own if i == rank else _unpacked(each), i, world) for i, each in enumerate(packed)]


def from_first(work: Callable[[], Result]) -> Result:
    """Do something on the first process alone, such as writing a file, and return its result on all of them.

    Args:
        work: what the first process does; its result can be pickled.

    Raises:
        DePassError: the first process made a mistake, which it names, or a process is gone.
    """
    rank, world = place()
    if world == 1:
        return work()
    own = _outcome(work) if rank == 0 else None
    packed = [b"" if own is None else _packed(own)]
    with _meeting(world):
        dist.broadcast_object_list(packed, src=0)
    return _result(_unpacked(packed[0]) if own is None else own, 0, world)


@contextmanager
def _meeting(world: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # how torch tells of a connection that has ended
        raise DePassError(f"one of the {world} processes was lost ({str(error).splitlines()[0]})") from error


@dataclass(frozen=True)
class _Outcome:
    """A result, or what went wrong; the exception itself stays where it was raised, and is told elsewhere."""

    result: Any = None
    mistake: str | None = None
    error: Exception | None = None


def _outcome(work: Callable[[], Any]) -> _Outcome:
    with sharing(False):
        try:
            return _Outcome(work())
        except Exception as error:
            kind = "" if isinstance(error, DePassError) else f"{type(error).__name__}: "
            return _Outcome(mistake=f"{kind}{error}", error=error)


def _result(outcome: _Outcome, rank: int, world: int) -> Any:
    if outcome.error is not None:
        raise outcome.error
    if outcome.mistake is not None:
        raise DePassError(f"process {rank + 1} of {world}: {outcome.mistake}")
    return outcome.result


def _packed(outcome: _Outcome) -> bytes:
    buffer = io.BytesIO()
    torch.save((outcome.result, outcome.mistake), buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> _Outcome:
    # Onto the processor: another process's device is not this one's. Both run this very program.
    return _Outcome(*torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False))
