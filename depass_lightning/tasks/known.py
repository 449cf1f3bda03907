"""Facts that a model knows: "The capital of France is" → " Paris".

Without a file, the prompts ask for the bundled model's facts. With a file, they are those of the public
Known_1000 collection (Meng et al. 2022, "Locating and Editing Factual Associations in GPT",
arXiv:2202.05262).
"""

import random
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Span, Task
from depass_lightning.tasks.loading.rows import load_rows, name_field, text_field
from depass_lightning.tasks.synthetic.facts import FACTS, NEW_FACTS

SPLITS = ("train", "test", "new-train", "new-test")


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:
    """Ask for the bundled model's facts, or read rows in the layout of Known_1000.

    Args:
        size: the maximum number of prompts; None means all.
        seed: the seed of the order of generated prompts.
        split: "test" asks for every fact in the wording held out from the bundled model's training, "train"
            in the others; "new-train" and "new-test" ask for facts that the model has not been trained on.
        path: rows with `subject`, `attribute` and `prompt`; seed and split are then ignored.
    """
    if path is not None:
        return load_rows("known", path, _from_public, size)
    if split not in SPLITS:
        raise DePassError(f"the known task has no split {split!r}; it has {', '.join(SPLITS)}")
    examples = generate(seed, split)
    if size is not None and size > len(examples):
        raise DePassError(f"the split {split!r} of the known task has {len(examples)} prompts, not {size}")
    return Task("known", examples[:size])


def generate(seed: int, split: str) -> list[Example]:
    """Return all prompts of a split, shuffled by the seed."""
    facts, part = (NEW_FACTS if split.startswith("new-") else FACTS), split.removeprefix("new-")
    examples = []
    for number, fact in enumerate(facts):
        for wording, (prompt, span) in enumerate(fact.prompts(part)):
            name = f"known-{split}-{fact.relation}-{number}-{wording}"
            examples.append(_example(name, prompt, fact.answer, span))
    random.Random(f"known {split} {seed}").shuffle(examples)
    return examples


def _example(name: str, prompt: str, answer: str, span: Span) -> Example:
    return Example(name, prompt, f" {answer}", roles={"subject": (span,)}, evidence=("subject",))


def _from_public(row: dict[str, Any], number: int) -> Example:
    prompt, answer = text_field(row, "prompt").rstrip(), text_field(row, "attribute").strip()
    subject = text_field(row, "subject").strip()
    start = prompt.find(subject)
    if start < 0:
        raise DePassError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    return _example(name_field(row, "known_id", number), prompt, answer, (start, start + len(subject)))
