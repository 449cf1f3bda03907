"""Distribute batches among processes that run the same program; every process gets all results.

Lightning starts the processes; inside `sharing()` each of them makes the same calls in the same order. An
error in one of them is raised in all, so that no process waits for it.
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
    """Distribute the batches of all calls inside among the processes of the default group.

    Args:
        active: False makes this process compute everything itself again, inside another `sharing()`.
    """
    several = active and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    token = _sharing.set(several)
    try:
        yield
    finally:
        _sharing.reset(token)


def place() -> tuple[int, int]:
    """Return this process's rank and the world size; 0 and 1 outside of `sharing()`."""
    return (dist.get_rank(), dist.get_world_size()) if _sharing.get() else (0, 1)


def from_all(work: Callable[[], Result]) -> list[Result]:
    """Run a function on each process, and return the results of all of them, by rank.

    Args:
        work: the function of this process; its result must be picklable.

    Raises:
        DePassError: another process failed (the message has its error) or was lost.
    """
    rank, world = place()
    if world == 1:
        return [work()]
    outcome = _outcome(work)
    packed: list[bytes] = [b""] * world
    with _meeting(world):
        dist.all_gather_object(packed, _packed(outcome))
    outcomes = (outcome if index == rank else _unpacked(data) for index, data in enumerate(packed))
    return [_result(outcome, index, world) for index, outcome in enumerate(outcomes)]


def from_first(work: Callable[[], Result]) -> Result:
    """Run a function on the first process only, such as writing a file, and return its result on all of them.

    Args:
        work: the function of the first process; its result must be picklable.

    Raises:
        DePassError: the first process failed (the message has its error), or a process was lost.
    """
    rank, world = place()
    if world == 1:
        return work()
    outcome = _outcome(work) if rank == 0 else None
    packed = [b"" if outcome is None else _packed(outcome)]
    with _meeting(world):
        dist.broadcast_object_list(packed, src=0)
    return _result(_unpacked(packed[0]) if outcome is None else outcome, 0, world)


@contextmanager
def _meeting(world: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's error for a closed connection
        raise DePassError(f"one of the {world} processes was lost ({str(error).splitlines()[0]})") from error


@dataclass(frozen=True)
class _Outcome:
    """A result or an error; the exception itself stays on its process, the message is sent to the others."""

    result: Any = None
    message: str | None = None
    error: Exception | None = None


def _outcome(work: Callable[[], Any]) -> _Outcome:
    with sharing(False):
        try:
            return _Outcome(work())
        except Exception as error:
            kind = "" if isinstance(error, DePassError) else f"{type(error).__name__}: "
            return _Outcome(message=f"{kind}{error}", error=error)


def _result(outcome: _Outcome, rank: int, world: int) -> Any:
    if outcome.error is not None:
        raise outcome.error
    if outcome.message is not None:
        raise DePassError(f"process {rank + 1} of {world}: {outcome.message}")
    return outcome.result


def _packed(outcome: _Outcome) -> bytes:
    buffer = io.BytesIO()
    torch.save((outcome.result, outcome.message), buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> _Outcome:
    # To the CPU: processes use different devices. Unpickling is safe: all processes run this program.
    return _Outcome(*torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False))
