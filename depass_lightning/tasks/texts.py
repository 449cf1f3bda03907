"""Labelled texts, which probes are trained on: statements, true or false, and texts in several languages."""

import random
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError, reason_of
from depass_lightning.tasks.loading.rows import read_rows, text_field
from depass_lightning.tasks.synthetic.facts import FACTS, PARAPHRASES

# What the labels of the public rows mean, by their number.
LABELS = {
    "truthful": ("false", "true"),
    "language": ("English", "French", "German", "Italian", "Portuguese", "Spanish"),
}

CODES: dict[str, str] = dict(zip(["en", "fr", "de", "it", "pt", "es"], LABELS["language"], strict=True))


@dataclass(frozen=True)
class Texts:
    """Texts with a label each.

    Args:
        name: what they are called in results.
        texts: the texts.
        labels: the label of each.
        skipped: the rows of a file that could not be used, each with its `row` number and the `reason`.
    """

    name: str
    texts: list[str]
    labels: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, size: int | None) -> "Texts":
        """Return the first of them; all where the size is None."""
        return Texts(self.name, self.texts[:size], self.labels[:size], self.skipped)


def load_texts(
    name: str,
    *,
    split: str = "train",
    path: str | Path | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Texts:
    """Load labelled texts.

    Args:
        name: "truthful" or "language".
        split: "train" or "test" of the embedded model's own; of a file without meaning.
        path: as for `tasks.load`, with rows `{text, label}`; a label is a number, as in `LABELS`, or a name.
        size: how many texts at most; None means all.
        seed: the false answers and the order of the embedded model's own.
    Raises:
        DePassError: there is no such name, split or file, or no row that can be used.
    """
    if name not in LABELS:
        raise DePassError(f"there are no labelled texts {name!r}; there are {', '.join(LABELS)}")
    if path is None:
        if split not in ("train", "test"):
            raise DePassError(f"labelled texts have no split {split!r}; they have 'train' and 'test'")
        made = _statements(seed, split) if name == "truthful" else _relations(seed, split)
        return made.head(size)
    texts, labels, skipped = [], [], []
    for number, row, fault in read_rows(path):
        try:
            if fault or not isinstance(row, dict):
                raise DePassError(fault or f"not an object with named fields: {row!r}")
            text, label = labelled(name, row)
            texts.append(text)
            labels.append(label)
        except Exception as error:  # whatever is wrong with a row costs that row
            skipped.append({"row": number, "reason": reason_of(error), "path": str(path)})
    if not texts:
        first = f"; row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""
        raise DePassError(f"{path} has no row of labelled texts{first}")
    return Texts(name, texts, labels, skipped).head(size)


def labelled(name: str, row: dict[str, Any]) -> tuple[str, str]:
    """Return a row's text and the name of its label.

    Args:
        name: "truthful" or "language".
        row: `{text, label}`, or `{statement, label}` and `{text, labels}` as data sets on the hub have them.
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
    """Return each of the embedded model's facts, half of them with an answer to another of their relation.

    No subject stands in both splits, so that a probe cannot know a fact by heart.
    """
    generator = random.Random(f"truthful {seed}")
    answers = defaultdict(set)
    for fact in FACTS:
        answers[fact.relation].add(fact.answer)
    facts = [f for f in FACTS if (zlib.crc32(f.subject.encode()) % 4 == 0) == (split == "test")]
    generator.shuffle(facts)
    texts, labels = [], []
    for number, fact in enumerate(facts):
        prompt = generator.choice(fact.prompts("train"))[0]
        false = generator.choice(sorted(answers[fact.relation] - {fact.answer}))
        texts.append(f"{prompt} {false if number % 2 else fact.answer}.")
        labels.append("false" if number % 2 else "true")
    return Texts("truthful", texts, labels)


def _relations(seed: int, split: str) -> Texts:
    """Return prompts about the embedded model's facts with their relations, which stand in for languages.

    No subject and no wording stands in both splits: of each relation, one wording is kept for the test.
    """
    pairs = [
        (template.format(fact.subject), fact.relation)
        for fact in FACTS
        for way, template in enumerate(PARAPHRASES[fact.relation])
        if (way == 3) == (zlib.crc32(fact.subject.encode()) % 4 == 0) == (split == "test")
    ]
    random.Random(f"language {seed} {split}").shuffle(pairs)
    return Texts("language", [text for text, _ in pairs], [label for _, label in pairs])
