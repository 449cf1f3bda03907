r"""Name the language of a text: "La langue officielle d'Andorre est le\nThis text is written in" → " French".

With a file, the rows are labelled texts (`texts.py`), each followed by the question. The bundled model reads
only English; without a file, the prompts ask which language is spoken in a country.
"""

from pathlib import Path

from depass_lightning.tasks import known
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.loading.rows import load_rows
from depass_lightning.tasks.texts import labelled

QUESTION = "\nThis text is written in"


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:
    """Ask for the language of texts, or for the language of a country.

    Args:
        size: the maximum number of prompts; None means all.
        seed: the seed of the order of generated prompts.
        split: a split of the task `known`.
        path: rows `{text, label}` in a file, folder or data set of `tasks.load`.
    """
    if path is not None:
        return load_rows("language", path, _from_public, size)
    examples = [example for example in known.load(None, seed, split, None) if "-language-" in example.id]
    return Task("language", examples[:size])


def _from_public(row: dict, number: int) -> Example:
    text, label = labelled("language", row)
    roles = {"text": ((0, len(text)),)}
    return Example(str(number), text + QUESTION, f" {label}", roles=roles, evidence=("text",))
