"""Tasks: prompts with their correct answers, and the evidence for the answer in the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks import (
    counterfact,
    ioi,
    jsonl,
    known,
    language,
    longra,
    multilingual,
    rag,
    truthfulqa,
)
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.texts import Texts, load_texts

_LOADERS = {
    "ioi": ioi.load,
    "known": known.load,
    "counterfact": counterfact.load,
    "truthfulqa": truthfulqa.load,
    "longra": longra.load,
    "multilingual": multilingual.load,
    "language": language.load,
    "jsonl": jsonl.load,
    "labelled": jsonl.load_labelled,
    "chat": jsonl.load_chat,
    "rag": rag.load,
}
NAMES = tuple(_LOADERS)

__all__ = ["NAMES", "Example", "Task", "Texts", "load", "load_texts"]


def load(
    name: str,
    *,
    size: int | None = None,
    seed: int = 0,
    split: str = "test",
    path: str | Path | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    language: str | None = None,
    kind: str | None = None,
    sentences: int | None = None,
) -> Task:
    """Load a task by name.

    Args:
        name: one of `NAMES`.
        size: the number of examples; None uses the task's default.
        seed: the seed of generated prompts, or of their order.
        split: "test", or "train", the split that the bundled model was trained on.
        path: read the prompts instead of generating them: a JSON, JSON Lines, CSV or Parquet file, a folder
            that `datasets` saved, or `hub:owner/name` for a public data set.
        rows: the rows of the task "jsonl" instead of a file.
        language: one language of a multilingual task; None means all.
        kind: one of `rag.KINDS`, for generated questions about documents.
        sentences: the number of their other sentences.

    Raises:
        DePassError: there is no such task, split, file or language, or there are fewer examples than
            requested.
    """
    if name not in _LOADERS:
        raise DePassError(f"no task {name!r}; there are {', '.join(NAMES)}")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise DePassError(f"a task's size must be a whole number from 1, not {size!r}")
    if rows is not None:
        if name != "jsonl" or path is not None:
            raise DePassError("rows= are the prompts of the task 'jsonl' instead of path=; give one of them")
        return jsonl.load_listed(rows, size)
    if name == "multilingual":
        return multilingual.load(size, seed, split, path, language)
    if language is not None:
        raise DePassError(f"the task {name!r} is in one language; language= is for the task 'multilingual'")
    if name == "rag":
        return rag.load(size, seed, split, path, kind or "people", 4 if sentences is None else sentences)
    if kind is not None or sentences is not None:
        raise DePassError(f"the task {name!r} hides no needles; kind= and sentences= are for the task 'rag'")
    return _LOADERS[name](size, seed, split, path)
