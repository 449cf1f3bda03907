"""Tasks: prompts with their right answers, and where in the prompt the reason for the answer stands."""

from pathlib import Path

from depass_lightning.errors import DePassError
from depass_lightning.tasks import ioi, jsonl, known
from depass_lightning.tasks.example import Example, Task

_LOADERS = {"ioi": ioi.load, "known": known.load, "jsonl": jsonl.load}
NAMES = tuple(_LOADERS)

__all__ = ["NAMES", "Example", "Task", "load"]


def load(
    name: str,
    *,
    size: int | None = None,
    seed: int = 0,
    split: str = "test",
    path: str | Path | None = None,
) -> Task:
    """Load a task by name.

    Args:
        name: one of `NAMES`.
        size: how many examples; None leaves it to the task.
        seed: what generated prompts, or their order, are drawn from.
        split: "test", or the split that the embedded model was trained on, "train".
        path: a file to read instead of generating prompts.
    Raises:
        DePassError: no such task, split or file, or fewer examples than asked for.
    """
    if name not in _LOADERS:
        raise DePassError(f"no task {name!r}; there are {', '.join(NAMES)}")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise DePassError(f"a task's size must be a whole number from 1, not {size!r}")
    return _LOADERS[name](size, seed, split, path)
