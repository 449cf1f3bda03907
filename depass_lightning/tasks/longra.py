"""Long-range agreement: a distractor sentence separates the answer from its evidence.

With a file, the rows are those of LongRA (Vafa et al. 2021, "Rationales for Sequential Predictions",
arXiv:2109.06387): "When my flight landed in Vietnam, ... (...) I was staying in the capital," → " Hanoi", and
the evidence is "Vietnam". The bundled model cannot do this. Without a file, the prompts are those of `ioi`
with a distractor between the people and the action, so that the name to copy, the evidence, is further away
than in the model's training data.
"""

import random
import re
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks import ioi
from depass_lightning.tasks.example import Example, Span, Task
from depass_lightning.tasks.loading.rows import load_rows, name_field, text_field

DEFAULT_SIZE = 100
DISTRACTORS = ("The weather was good.", "There was a book on the table.", "The library was open all day.")


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:
    """Generate the prompts from a seed, or read rows in the layout of LongRA.

    Args:
        size: the number of prompts; None means 100, or all rows of a file.
        seed: the seed of generated prompts.
        split: a split of the task `ioi`, "train" or "test"; ignored for a file.
        path: rows `{id, a, b, prompt, target_token}` in a file, folder or data set of `tasks.load`; the
            evidence is the one of `a` and `b` that is not the target.
    """
    if path is not None:
        return load_rows("longra", path, _from_public, size)
    wanted = DEFAULT_SIZE if size is None else size
    generator = random.Random(f"longra {seed}")
    parts: dict[str, Example] = {}
    for example in ioi.stream(seed, split_of(split)):
        place = example.prompt.find(". ")
        if place > 0 and example.prompt not in parts:
            parts[example.prompt] = _with_distractor(example, place + 2, generator.choice(DISTRACTORS))
        if len(parts) == wanted:
            break
    return Task("longra", list(parts.values()))


def split_of(split: str) -> str:
    """Return the split, if it exists."""
    if split not in ("train", "test"):
        raise DePassError(f"the longra task has no split {split!r}; it has 'train' and 'test'")
    return split


def _with_distractor(example: Example, place: int, distractor: str) -> Example:
    """Insert a distractor into a prompt, and shift the spans after it."""
    shift = len(distractor) + 1

    def moved(span: Span) -> Span:
        return span if span[0] < place else (span[0] + shift, span[1] + shift)

    return Example(
        example.id.replace("ioi", "longra"),
        f"{example.prompt[:place]}{distractor} {example.prompt[place:]}",
        example.answer,
        example.foil,
        {name: tuple(map(moved, spans)) for name, spans in example.roles.items()},
        example.evidence,
    )


def _from_public(row: dict[str, Any], number: int) -> Example:
    prompt, answer = text_field(row, "prompt").rstrip(), text_field(row, "target_token").strip()
    pair = [text_field(row, key).strip() for key in ("a", "b")]
    if answer not in pair:
        raise DePassError(f"the target {answer!r} is neither of a and b: {', '.join(pair)}")
    evidence = pair[1 - pair.index(answer)]
    spans = tuple(match.span() for match in re.finditer(rf"\b{re.escape(evidence)}\b", prompt))
    if not spans:
        raise DePassError(f"the evidence {evidence!r} does not occur in the prompt {prompt!r}")
    return Example(
        name_field(row, "id", number),
        prompt,
        f" {answer}",
        roles={"evidence": spans},
        evidence=("evidence",),
        labels={"category": str(row.get("category", "unknown"))},
    )
