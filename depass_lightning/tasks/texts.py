"""Labelled texts to train probes on: true and false statements, and texts in several languages."""

import random
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.loading.rows import converted, text_field
from depass_lightning.tasks.synthetic.facts import FACTS, PARAPHRASES

# The names of the numeric labels in the public rows.
LABELS = {
    "truthful": ("false", "true"),
    "language": ("English", "French", "German", "Italian", "Portuguese", "Spanish"),
}

CODES: dict[str, str] = dict(zip(["en", "fr", "de", "it", "pt", "es"], LABELS["language"], strict=True))


@dataclass(frozen=True)
class Texts:
    """Labelled texts.

    Args:
        name: the name in results.
        texts: the texts.
        labels: one label per text.
        skipped: unusable rows of a file, each with its `row` number and the `reason`.
    """

    name: str
    texts: list[str]
    labels: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)


def load_texts(
    name: str,
    *,
    split: str = "train",
    path: str | Path | None = None,
    seed: int = 0,
) -> Texts:
    """Load labelled texts.

    Args:
        name: "truthful" or "language".
        split: "train" or "test" of generated texts; ignored for a file.
        path: rows `{text, label}` in a file, folder or data set of `tasks.load`; a label is an index into
            `LABELS` or a name.
        seed: the seed of the false answers and the order of generated texts.

    Raises:
        DePassError: there is no such name, split or file, or no usable row.
    """
    if name not in LABELS:
        raise DePassError(f"there are no labelled texts {name!r}; there are {', '.join(LABELS)}")
    if path is None:
        if split not in ("train", "test"):
            raise DePassError(f"labelled texts have no split {split!r}; they have 'train' and 'test'")
        return _statements(seed, split) if name == "truthful" else _relations(seed, split)
    rows, skipped = converted(path, lambda row, _: labelled(name, row), "of labelled texts")
    return Texts(name, [text for text, _ in rows], [label for _, label in rows], skipped)


def labelled(name: str, row: dict[str, Any]) -> tuple[str, str]:
    """Return a row's text and the name of its label.

    Args:
        name: "truthful" or "language".
        row: `{text, label}`, or `{statement, label}` or `{text, labels}` as in data sets on the hub.
    """
    text = text_field(row, "statement" if "text" not in row and "statement" in row else "text").strip()
    label = row.get("label", row.get("labels"))
    names = LABELS[name]
    if isinstance(label, str) and label.strip():
        return text, CODES.get(label.strip(), label.strip()) if name == "language" else label.strip()
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise DePassError(f"the label must be a name, or a number from 0 to {len(names) - 1}, not {label!r}")
    return text, names[int(label)]


def _statements(seed: int, split: str) -> Texts:
    """Return the bundled model's facts, half of them with the answer to another fact of the relation.

    No subject occurs in both splits, so that a probe cannot memorise facts.
    """
    generator = random.Random(f"truthful {seed}")
    answers = defaultdict(set)
    for fact in FACTS:
        answers[fact.relation].add(fact.answer)
    facts = [fact for fact in FACTS if (zlib.crc32(fact.subject.encode()) % 4 == 0) == (split == "test")]
    generator.shuffle(facts)
    texts, labels = [], []
    for number, fact in enumerate(facts):
        prompt = generator.choice(fact.prompts("train"))[0]
        false = generator.choice(sorted(answers[fact.relation] - {fact.answer}))
        texts.append(f"{prompt} {false if number % 2 else fact.answer}.")
        labels.append("false" if number % 2 else "true")
    return Texts("truthful", texts, labels)


def _relations(seed: int, split: str) -> Texts:
    """Return prompts about the bundled model's facts, labelled with their relations instead of languages.

    No subject and no wording occurs in both splits: one wording of each relation is used only in the test.
    """
    pairs = [
        (template.format(fact.subject), fact.relation)
        for fact in FACTS
        for wording, template in enumerate(PARAPHRASES[fact.relation])
        if (wording == 3) == (zlib.crc32(fact.subject.encode()) % 4 == 0) == (split == "test")
    ]
    random.Random(f"language {seed} {split}").shuffle(pairs)
    return Texts("language", [text for text, _ in pairs], [label for _, label in pairs])
