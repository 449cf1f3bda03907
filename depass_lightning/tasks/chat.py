"""Conversations of one's own, in the layouts of fine-tuning data (`loading/chat_rows.py`).

The model's chat template writes every prompt; a prompt that is text becomes a turn of the user.
"""

from functools import partial
from pathlib import Path

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Task
from depass_lightning.tasks.jsonl import example_of
from depass_lightning.tasks.loading.rows import load_rows


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:  # noqa: ARG001
    """Read rows of conversations, completions or preferences.

    Args:
        size: the maximum number of prompts, from the first row; None means all.
        seed: ignored.
        split: ignored.
        path: a file, folder or data set of `tasks.load`.
    """
    if path is None:
        raise DePassError("the chat task reads conversations; give their file (path=conversations.jsonl)")
    return load_rows("chat", path, partial(example_of, user=True), size)
