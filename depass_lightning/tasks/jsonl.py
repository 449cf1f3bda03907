"""Rows of one's own: one JSON object per line, or one prompt per line of a `.txt` file.

`{"prompt": "The sky is", "target": " blue", "foil": " green", "evidence": ["sky"]}`; only `prompt` is
required. Without a target, the model's most likely next token is explained. The target is used unchanged: for
most models, a word includes its leading space. Rows of conversations, completions, preferences and documents
are read too (`loading/chat_rows.py`), and labelled texts: `{"text": "A lovely film.", "label": "positive"}`.
A label is a name or an index of the model's labels (`config.id2label`); `foil` is one to compare it with. A
text may be a conversation. The only output of a reward model may be named by any number.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import ANSWER, LABEL, Example, Span, Task
from depass_lightning.tasks.loading.chat_rows import chat_fields, is_chat_row
from depass_lightning.tasks.loading.rows import Row, load_rows, name_field, text_field
from depass_lightning.utils.sections import Conversation


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:  # noqa: ARG001
    """Read a file of rows `{prompt, target, foil, id, evidence}`.

    Args:
        size: the maximum number of prompts, from the first row; None means all.
        seed: ignored.
        split: ignored.
        path: the file. `evidence` lists strings (all their occurrences in the prompt) or `[start, end]`
            ranges.
    """
    return _of_file("jsonl", path, "prompts.jsonl", example_of, size)


def load_chat(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:  # noqa: ARG001
    """Read rows of conversations, completions or preferences; a prompt that is text is a turn of the user.

    The model's chat template writes every prompt. The arguments are those of `load`.
    """
    return _of_file("chat", path, "conversations.jsonl", partial(example_of, user=True), size)


def load_labelled(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:  # noqa: ARG001
    """Read rows `{text, label, foil, id, evidence}`: texts with the labels that a classifier should give.

    The arguments are those of `load`.
    """
    return _of_file("labelled", path, "reviews.csv", _labelled, size)


def _of_file(
    name: str, path: str | Path | None, file: str, read: Callable[[Row, int], Example], size: int | None
) -> Task:
    if path is None:
        raise DePassError(f"the {name} task reads a file; give its path (path={file})")
    return load_rows(name, path, read, size)


def _labelled(row: Row, number: int) -> Example:
    if not _is_label_row(row):
        raise DePassError(f"a row needs the fields 'text' and 'label'; it has {', '.join(row) or 'none'}")
    return example_of(row, number)


def load_listed(rows: Sequence[Mapping[str, Any]], size: int | None = None) -> Task:
    """Read rows from a list instead of a file."""
    return load_rows("prompts", [dict(row) for row in rows], example_of, size)


def example_of(row: dict[str, Any], number: int, *, user: bool = False) -> Example:
    """Return a row as an example.

    Args:
        row: the row.
        number: its number, which names it unless it has an `id`.
        user: whether a prompt that is text is a turn of the user.

    Raises:
        DePassError: a field is missing or cannot be used.
    """
    labels: dict[str, str] = {}
    if _is_label_row(row):
        prompt, answer, foil = _label_fields(row)
        labels = {ANSWER: LABEL}
    elif is_chat_row(row):
        prompt, answer, foil = chat_fields(row, user=user)
    else:
        prompt = text_field(row, "prompt")
        answer = text_field(row, "target") if row.get("target") is not None else None
        prompt = Conversation([{"role": "user", "content": prompt}]) if user else prompt
        foil = text_field(row, "foil") if row.get("foil") is not None else None
    if foil is not None and answer is None:
        raise DePassError(f"the foil {foil!r} is compared with a target; give the target, too")
    if foil is not None and foil == answer:
        raise DePassError(f"the foil is the same as the target: {foil!r}")
    evidence = row.get("evidence") or []
    if not isinstance(evidence, list):
        raise DePassError(f"evidence must be a list of strings or [start, end] ranges, not {evidence!r}")
    spans = tuple(sorted({span for item in evidence for span in _spans(item, prompt)}))
    roles = {"evidence": spans} if spans else {}
    return Example(name_field(row, "id", number), prompt, answer, foil, roles, tuple(roles), labels=labels)


def _spans(item: Any, prompt: str) -> list[Span]:
    """Return the character ranges of one piece of evidence."""
    if isinstance(item, str) and item:
        spans = [match.span() for match in re.finditer(re.escape(item), prompt)]
        if not spans:
            raise DePassError(f"the evidence {item!r} does not occur in the prompt {prompt!r}")
        return spans
    if isinstance(item, list) and len(item) == 2 and all(type(edge) is int for edge in item):
        start, end = item
        if 0 <= start < end <= len(prompt):
            return [(start, end)]
        raise DePassError(f"the evidence range {item} is not inside the prompt's {len(prompt)} characters")
    raise DePassError(f"evidence must be strings or [start, end] ranges, not {item!r}")


def _is_label_row(row: Row) -> bool:
    """Whether a row is a text with a label."""
    return "text" in row and "label" in row


def _label_fields(row: Row) -> tuple[str, str, str | None]:
    """Return a row's text, its label and the foil, if it has one; an index as text."""
    text: Any = row["text"]
    text = Conversation(text) if isinstance(text, list) else text_field(row, "text")
    return text, _label(row, "label"), None if row.get("foil") is None else _label(row, "foil")


def _label(row: Row, key: str) -> str:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DePassError(f"the field {key!r} must be the name or the index of a label, not {value!r}")
    return str(value).strip()
