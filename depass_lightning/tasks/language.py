"""Which language is this? "La langue officielle d'Andorre est le\\nThis text is written in" → " French".

With a file, the rows are labelled texts (`texts.py`), each put before the question. The embedded model reads
English alone and cannot be asked that. Its own prompts ask which language is spoken somewhere.
"""

from pathlib import Path

from depass_lightning.tasks import known
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.loading.rows import load_rows
from depass_lightning.tasks.texts import labelled

QUESTION = "\nThis text is written in"


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:
    """Ask for the language of texts, or the embedded model for the language of a country.

    Args:
        size: how many prompts at most; None means all.
        seed: as for `known`.
        split: as for `known`.
        path: as for `tasks.load`, with rows `{text, label}`.
    """
    if path is not None:
        return load_rows("language", path, _from_public, size)
    asked = [own for own in known.load(None, seed, split, None) if "-language-" in own.id]
    return Task("language", asked[:size])


def _from_public(row: dict, number: int) -> Example:
    text, label = labelled("language", row)
    roles = {"text": ((0, len(text)),)}
    return Example(str(number), text + QUESTION, f" {label}", roles=roles, evidence=("text",))
