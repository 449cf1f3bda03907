"""Task files and public data sets: read row by row, so that a bad row costs only itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.hub import HUB, hub_rows, saved_rows

Row = dict[str, Any]


def load_rows(
    name: str, path: str | Path, read: Callable[[Row, int], Example], size: int | None = None
) -> Task:
    """Read a file of rows into a task; rows that cannot be read are collected in `Task.skipped`.

    Args:
        name: the task's name.
        path: as for `read_rows`.
        read: makes an example of a row and its number, or raises `DePassError` saying what is wrong with it.
        size: how many examples at most, from the top; None means all.
    Raises:
        DePassError: as for `read_rows`; or there is no row that can be used.
    """
    examples: dict[str, Example] = {}
    skipped: list[Row] = []
    for number, row, fault in read_rows(path):
        if len(examples) == size:
            break
        try:
            if fault:
                raise DePassError(fault)
            if not isinstance(row, dict):
                raise DePassError(f"not an object with named fields: {row!r}")
            example = read(row, number)
            if example.id in examples:
                raise DePassError(f"the id {example.id!r} is taken by an earlier row")
            examples[example.id] = example
        except DePassError as error:
            skipped.append({"row": number, "reason": str(error), "path": str(path)})
    if not examples:
        first = f"; row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""
        raise DePassError(f"{path} has no row that the task {name!r} can use{first}")
    return Task(name, list(examples.values()), skipped)


def text_field(row: Row, key: str) -> str:
    """Return a field that must be there and be text with something in it."""
    if key not in row:
        raise DePassError(f"the field {key!r} is missing; the row has {', '.join(row) or 'no fields'}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise DePassError(f"the field {key!r} must be text that is not empty, not {value!r}")
    return value


def read_rows(path: str | Path) -> list[tuple[int, Any, str]]:
    """Return every row's number, value and fault: its line in JSON Lines, its place from 1 elsewhere.

    Args:
        path: a JSON file (a list of objects), a JSON Lines file (an object a line), a folder that
            `Dataset.save_to_disk` wrote, or `hub:owner/name` for a public data set (`hub.py`).
    Raises:
        DePassError: there is no such file or data set, or the file is neither JSON nor JSON Lines.
    """
    if str(path).startswith(HUB):
        return [(number, row, "") for number, row in enumerate(hub_rows(str(path)), start=1)]
    path = Path(path)
    if path.is_dir():
        return [(number, row, "") for number, row in enumerate(saved_rows(path), start=1)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DePassError(f"no file {path}; give the path of a JSON or JSON Lines file (path=)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DePassError(f"cannot read {path} ({error}); give a JSON or JSON Lines file in UTF-8") from error
    if text.lstrip().startswith("["):
        return [(number, row, "") for number, row in enumerate(_json_list(text, path), start=1)]
    lines = enumerate(text.split("\n"), start=1)
    rows = [(number, *_json_line(line)) for number, line in lines if line.strip()]
    if all(fault for _, _, fault in rows):
        why = f"line {rows[0][0]}: {rows[0][2]}" if rows else "it is empty"
        raise DePassError(f"{path} is neither a JSON list nor JSON Lines ({why}); write one object a line")
    return rows


def _json_list(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DePassError(f"{path} is not valid JSON ({where}: {error.msg}); correct it there") from error


def _json_line(line: str) -> tuple[Any, str]:
    """Return a line's value and no fault, or no value and the fault."""
    try:
        return json.loads(line), ""
    except json.JSONDecodeError as error:
        return None, f"not valid JSON at column {error.colno}: {error.msg}"
