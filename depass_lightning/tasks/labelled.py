"""Texts with the labels that a classifier should give them (`loading/label_rows.py`)."""

from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.jsonl import example_of
from depass_lightning.tasks.loading.label_rows import is_label_row
from depass_lightning.tasks.loading.rows import load_rows


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:  # noqa: ARG001
    """Read a file of rows `{text, label, foil, id, evidence}`.

    Args:
        size: the maximum number of texts, from the first row; None means all.
        seed: ignored.
        split: ignored.
        path: the file.
    """
    if path is None:
        raise DePassError("the labelled task reads a file; give its path (path=reviews.csv)")
    return load_rows("labelled", path, _example, size)


def _example(row: dict[str, Any], number: int) -> Example:
    if not is_label_row(row):
        raise DePassError(f"a row needs the fields 'text' and 'label'; it has {', '.join(row) or 'none'}")
    return example_of(row, number)
