"""Rows of labelled texts: `{"text": "A lovely film.", "label": "positive"}`, for classifiers.

A label is a name or an index of the model's labels (`config.id2label`); `foil` is one to compare it with. A
text may be a conversation. The only output of a reward model may be named by any number.
"""

from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.loading.rows import Row, text_field
from depass_lightning.utils.sections import Conversation


def is_label_row(row: Row) -> bool:
    """Whether a row is a text with a label."""
    return "text" in row and "label" in row


def label_fields(row: Row) -> tuple[str, str, str | None]:
    """Return a row's text, its label and the foil, if it has one; an index as text.

    Raises:
        DePassError: the text is empty, or a label is neither a name nor a number.
    """
    text: Any = row["text"]
    text = Conversation(text) if isinstance(text, list) else text_field(row, "text")
    return text, _label(row, "label"), None if row.get("foil") is None else _label(row, "foil")


def _label(row: Row, key: str) -> str:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DePassError(f"the field {key!r} must be the name or the index of a label, not {value!r}")
    return str(value).strip()
