"""Read task files and public data sets row by row; a bad row is skipped."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from depass_lightning.errors import DePassError, reason_of
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.loading.hub import HUB, hub_rows, saved_rows
from depass_lightning.utils.atomic_files import read_limited

Row = dict[str, Any]
Result = TypeVar("Result")
FILE_BYTES = 2**30
MAX_CHARACTERS = 10_000_000  # of a text


def load_rows(
    name: str, path: str | Path | list[Row], read: Callable[[Row, int], Example], size: int | None = None
) -> Task:
    """Read a file of rows into a task; rows that cannot be read are collected in `Task.skipped`.

    Args:
        name: the task's name.
        path: a file, folder or data set of `read_rows`, or the rows.
        read: converts a row and its number to an example, or raises `DePassError` with the reason.
        size: the maximum number of examples, from the first row; None means all.

    Raises:
        DePassError: there is no such file or data set, or no usable row.
    """
    ids: set[str] = set()

    def example_of(row: Row, number: int) -> Example:
        example = read(row, number)
        if example.id in ids:
            raise DePassError(f"the id {example.id!r} is taken by an earlier row")
        check_text("the row", json.dumps(dataclasses.asdict(example), ensure_ascii=False))
        ids.add(example.id)
        return example

    return Task(name, *converted(path, example_of, f"that the task {name!r} can use", size))


def converted(
    path: str | Path | list[Row], read: Callable[[Row, int], Result], kind: str, size: int | None = None
) -> tuple[list[Result], list[Row]]:
    """Convert rows one by one; any error skips only its row.

    Args:
        path: a file, folder or data set of `read_rows`, or the rows.
        read: converts a row and its number, or raises `DePassError` with the reason.
        kind: which rows there should be, for the error.
        size: the maximum number of results, from the first row; None means all.

    Returns:
        The results, and the rows that are skipped, with the reasons.

    Raises:
        DePassError: there is no such file or data set, or no usable row.
    """
    results: list[Result] = []
    skipped: list[Row] = []
    listed = isinstance(path, list)
    rows = [(number, row, "") for number, row in enumerate(path, start=1)] if listed else read_rows(path)
    place = "the list of rows" if listed else str(path)
    for number, row, fault in rows:
        if len(results) == size:
            break
        try:
            results.append(read(checked(row, fault), number))
        except Exception as error:  # any error skips only this row
            skipped.append({"row": number, "reason": reason_of(error), "path": place})
    if not results:
        raise DePassError(f"{place} has no row {kind}{first_reason(skipped)}")
    return results, skipped


def checked(row: Any, fault: str) -> Row:
    """Return a row of `read_rows` that is an object.

    Raises:
        DePassError: it is not, or could not be read.
    """
    if fault or not isinstance(row, dict):
        raise DePassError(fault or f"not an object with named fields: {row!r}")
    return row


def first_reason(skipped: Sequence[Row]) -> str:
    """Return the end of an error about rows that are all skipped: why the first one is."""
    return f"; row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""


def text_field(row: Row, key: str) -> str:
    """Return a required text field, which must not be empty."""
    if key not in row:
        raise DePassError(f"the field {key!r} is missing; the row has {', '.join(row) or 'no fields'}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise DePassError(f"the field {key!r} must be non-empty text, not {value!r}")
    return check_text(f"the field {key!r}", value)


def name_field(row: Row, key: str, number: int) -> str:
    """Return a row's name: the value of a field, or the row's number if it is missing or null."""
    value = row.get(key)
    return str(number if value is None else value)


def check_text(what: str, text: str) -> str:
    """Return a text unchanged if it can be stored and tokenised.

    Raises:
        DePassError: the text has a lone surrogate, which JSON allows but tokenizers and files do not, or it
            is so long that tokenizers would crash.
    """
    if len(text) > MAX_CHARACTERS:
        raise DePassError(f"{what} has {len(text):,} characters; give at most {MAX_CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DePassError(f"{what} has half a character ({half}, a lone surrogate); remove it") from None
    return text


def read_text(path: Path, kind: str) -> str:
    """Read a text file.

    Raises:
        DePassError: the file is missing, not a regular file, too large, or not in UTF-8.
    """
    try:
        text = read_limited(path, FILE_BYTES).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise DePassError(f"no file {path}; give the path of {kind} (path=)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DePassError(f"cannot read {path} ({error}); give {kind} in UTF-8") from error


def read_rows(path: str | Path) -> list[tuple[int, Any, str]]:
    """Return every row's number, value and error; the number is the line in JSON Lines, else counts from 1.

    Args:
        path: a JSON file (a list of objects), a JSON Lines file (one object per line), a CSV file with a
            header (.csv), a Parquet file (.parquet), a `.txt` file (one prompt per line), a folder that
            `Dataset.save_to_disk` wrote, or `hub:owner/name` for a public data set (`hub.py`).

    Raises:
        DePassError: there is no such file or data set, or the file has none of these layouts.
    """
    if str(path).startswith(HUB):
        return [(number, row, "") for number, row in enumerate(hub_rows(str(path)), start=1)]
    path = Path(path)
    if path.is_dir():
        return [(number, row, "") for number, row in enumerate(saved_rows(path), start=1)]
    if path.suffix in (".csv", ".parquet"):
        rows = _csv(path) if path.suffix == ".csv" else _parquet(path)
        return [(number, row, "") for number, row in enumerate(rows, start=1)]
    text = read_text(path, "a JSON or JSON Lines file")
    if path.suffix == ".txt":
        return [(n, {"prompt": line}, "") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if text.lstrip().startswith("["):
        return [(number, row, "") for number, row in enumerate(_json_list(text, path), start=1)]
    lines = enumerate(text.split("\n"), start=1)
    rows = [(number, *_json_line(line)) for number, line in lines if line.strip()]
    if all(fault for _, _, fault in rows):
        why = f"line {rows[0][0]}: {rows[0][2]}" if rows else "it is empty"
        raise DePassError(f"{path} is neither a JSON list nor JSON Lines ({why}); write one object per line")
    return rows


def _csv(path: Path) -> list[Row]:
    """Read a CSV file; an empty cell is a missing value, and a cell beyond the header refuses the file."""
    reader = csv.DictReader(io.StringIO(read_text(path, "a CSV file"), newline=""), restkey="")
    try:
        rows = [{key: cell or None for key, cell in row.items()} for row in reader]
    except csv.Error as error:
        raise DePassError(f"{path} is not valid CSV at line {reader.line_num}: {error}") from error
    longer = next((number for number, row in enumerate(rows, start=1) if row.get("")), None)
    if longer is not None:
        raise DePassError(
            f"row {longer} of {path} has more cells than its header names; put cells with commas in quotes"
        )
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise DePassError(f"no file {path}; give the path of a Parquet file (path=)") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DePassError(f"{path} is not a readable Parquet file ({error})") from error


def _json_list(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DePassError(f"{path} is not valid JSON ({where}: {error.msg}); correct it there") from error
    except (RecursionError, ValueError) as error:
        raise DePassError(f"{path} cannot be read: {_beyond(error)}") from error


def _json_line(line: str) -> tuple[Any, str]:
    """Return a line's value and an empty text, or None and the error."""
    try:
        return json.loads(line), ""
    except json.JSONDecodeError as error:
        return None, f"not valid JSON at column {error.colno}: {error.msg}"
    except (RecursionError, ValueError) as error:
        return None, _beyond(error)


def _beyond(error: Exception) -> str:
    """Describe the limit of Python's JSON reader that a text exceeds."""
    return (
        "it is nested too deeply" if isinstance(error, RecursionError) else "it has a number that is too long"
    )
