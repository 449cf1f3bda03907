"""Training text: whole texts, or prompts with answers, of which only the answers are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError, reason_of
from depass_lightning.tasks.example import Example, Span, Task
from depass_lightning.tasks.loading.rows import checked, read_rows, read_text, text_field


@dataclass(frozen=True)
class Passage:
    """A text and the character ranges to predict; without ranges, the whole text is predicted."""

    text: str
    answers: tuple[Span, ...] = ()


def from_examples(examples: Sequence[Example] | Task) -> list[Passage]:
    """Return each prompt with its answer."""
    return [answered(example.prompt, example.known_answer) for example in examples]


def answered(prompt: str, answer: str) -> Passage:
    """Return a prompt with its answer."""
    text = prompt + answer
    return Passage(text, ((len(prompt), len(text)),))


def read_passages(path: str | Path) -> list[Passage]:
    """Read training text from a file.

    Args:
        path: JSON Lines or a JSON list of rows `{prompt, target}` or `{text}`, or a plain text file (.txt,
            .md) whose paragraphs, separated by empty lines, are the passages.

    Raises:
        DePassError: the file is missing or has no text, or a row cannot be used (rows are not skipped,
            because training on part of the data could go unnoticed).
    """
    path = Path(path)
    if path.suffix in (".txt", ".md"):
        blocks = read_text(path, "the text to train on").split("\n\n")
        passages = [Passage(block.strip()) for block in blocks if block.strip()]
    else:
        passages = [_passage(path, *row) for row in read_rows(path)]
    if not passages:
        raise DePassError(f"{path} has no text to train on")
    return passages


def _passage(path: Path, number: int, row: Any, fault: str) -> Passage:
    try:
        fields = checked(row, fault)
        if "text" in fields:
            return Passage(text_field(fields, "text"))
        return answered(text_field(fields, "prompt"), text_field(fields, "target"))
    except Exception as error:  # any error in a row
        raise DePassError(
            f"row {number} of {path}: {reason_of(error)}; rows have {{prompt, target}} or {{text}}"
        ) from error
