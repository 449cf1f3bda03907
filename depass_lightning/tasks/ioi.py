"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" → " Mary".

Two people are named, one of them twice; the answer is the one named once (Wang et al. 2023, "Interpretability
in the Wild", arXiv:2211.00593). The relevant tokens are known: the indirect object is copied, and the subject
and its repetition exclude the other name.
"""

import random
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Span, Task
from depass_lightning.tasks.loading.rows import load_rows, name_field, text_field
from depass_lightning.tasks.synthetic.vocabulary import NAMES, OBJECTS, PLACES

OPENINGS = (
    "{A} and {B} went to the {place}.",
    "{A} and {B} are good friends.",
    "When {A} and {B} went to the {place},",
    "After {A} and {B} went to the {place},",
    "While {A} and {B} were working at the {place},",
    "While {A} and {B} were walking to the {place},",
    "Then, {A} and {B} went to the {place}.",
    "Then, {A} and {B} were working at the {place}.",
    "Then, {A} and {B} had a lot of fun at the {place}.",
    "Then, {A} and {B} were thinking about going to the {place}.",
    "Afterwards, {A} and {B} went to the {place}.",
    "After the lunch, {A} and {B} went to the {place}.",
    "Friends {A} and {B} found a {object} at the {place}.",
    "When {A} and {B} got a {object} at the {place},",
    "The {place} {A} and {B} went to had a {object}.",
    "{A} and {B} bought a {object} at the {place}, and",
    "At the {place}, {A} and {B} talked about a {object}, and",
    "Yesterday, {A} met {B} at the {place}.",
    "{A} and {B} were sitting in the {place}.",
    "One day, {A} and {B} came home from the {place}.",
    "In the morning, {A} saw {B} at the {place}.",
    "{A} was waiting for {B} at the {place}. Later,",
    "As soon as {A} and {B} arrived at the {place},",
    "Last week, {A} and {B} visited the {place}.",
    "Before {A} and {B} left the {place},",
    "{A} came to the {place} with {B}, and",
    "It was late when {A} and {B} reached the {place}.",
    "Last night, {A} had dinner with {B} at the {place}.",
)

ACTIONS = (
    "{S} gave a {object} to",
    "{S} handed a {object} to",
    "{S} passed a {object} to",
    "{S} wanted to give a {object} to",
    "{S} decided to give a {object} to",
    "{S} offered a {object} to",
    "{S} sent a {object} to",
    "{S} brought a {object} to",
    "{S} showed a {object} to",
    "{S} sold a {object} to",
    "{S} bought a {object} for",
    "{S} said hello to",
    "{S} started talking to",
)

# For openings that already name the object.
LATER_ACTIONS = (
    "{S} gave it to",
    "{S} gave the {object} to",
    "{S} decided to give it to",
    "{S} decided to give the {object} to",
    "{S} handed the {object} to",
    "{S} showed it to",
    "{S} kept the {object} for",
)

TEMPLATES = tuple(
    f"{opening} {action}"
    for opening in OPENINGS
    for action in (LATER_ACTIONS if "{object}" in opening else ACTIONS)
)

DEFAULT_SIZE = 100


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:
    """Generate the prompts from a seed, or read them from a file of `{case_id, prompt, answer}` rows.

    Args:
        size: the number of prompts; None means 100, or all rows of a file.
        seed: the seed of generated prompts; a larger size extends a smaller one.
        split: "train" or "test". No pair of people occurs in both, in either order.
        path: rows in the public layout; seed and split are then ignored.
    """
    if path is not None:
        return load_rows("ioi", path, _from_public, size)
    return Task("ioi", generate(DEFAULT_SIZE if size is None else size, seed, split))


def generate(size: int, seed: int, split: str) -> list[Example]:
    """Return `size` distinct prompts; every second one names the subject first."""
    if split not in ("train", "test"):
        raise DePassError(f"the ioi task has no split {split!r}; it has 'train' and 'test'")
    draws = stream(seed, split)
    seen: set[str] = set()
    examples: list[Example] = []
    for _ in range(20 * size + 1000):
        if len(examples) == size:
            break
        example = next(draws)
        if example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(example)
    if len(examples) < size:
        raise DePassError(f"found {len(examples)} different ioi prompts, not {size}; ask for fewer (size=)")
    return examples


def held_out(first: str, second: str) -> bool:
    """Return whether a pair of people belongs to the test split, in either order."""
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % 10 == 0


def stream(seed: int, split: str) -> Iterator[Example]:
    """Yield an endless stream of prompts, with duplicates."""
    generator = random.Random(f"ioi {split} {seed}")
    number = 0
    while True:
        for template in generator.sample(TEMPLATES, len(TEMPLATES)):
            subject, indirect = _pair(generator, split)
            words = {"place": generator.choice(PLACES), "object": generator.choice(OBJECTS)}
            first, second = (subject, indirect) if number % 2 else (indirect, subject)
            yield _fill(template, f"ioi-{split}-{seed}-{number}", subject, (first, second), words)
            number += 1


def _pair(generator: random.Random, split: str) -> tuple[str, str]:
    """Draw a pair of people of the split."""
    while True:
        first, second = generator.sample(NAMES, 2)
        if held_out(first, second) == (split == "test"):
            return first, second


def _fill(template: str, name: str, subject: str, pair: tuple[str, str], words: dict[str, str]) -> Example:
    """Fill a template with people and words, and record the people's positions."""
    people = {"A": pair[0], "B": pair[1], "S": subject}
    roles: dict[str, tuple[Span, ...]] = {}
    text = ""
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is None:
            continue
        word = people.get(slot) or words[slot]
        if slot in people:
            role = "repetition" if slot == "S" else "subject" if word == subject else "indirect_object"
            roles[role] = ((len(text), len(text) + len(word)),)
        text += word
    indirect = pair[0] if pair[1] == subject else pair[1]
    return Example(name, text, f" {indirect}", f" {subject}", roles, ("indirect_object",))


def _from_public(row: dict[str, Any], number: int) -> Example:
    """Read a row of the public layout; the roles are located in the text."""
    prompt, answer = text_field(row, "prompt").rstrip(), text_field(row, "answer").strip()
    words = [(match[0], match.span()) for match in re.finditer(r"[^\W\d_]+", prompt)]
    names = [(word, span) for word, span in words if word[0].isupper()]
    counts = Counter(name for name, _ in names)
    repeated = [name for name, _ in names if counts[name] > 1 and name != answer]
    if not answer or counts[answer] == 0:
        raise DePassError(f"the answer {answer!r} does not occur in the prompt {prompt!r}")
    if not repeated:
        raise DePassError(f"no name other than the answer occurs twice in the prompt {prompt!r}")
    subject = repeated[-1]
    places = {name: tuple(span for other, span in names if other == name) for name in (answer, subject)}
    roles = {
        "indirect_object": places[answer],
        "subject": places[subject][:1],
        "repetition": places[subject][1:],
    }
    name = name_field(row, "case_id", number)
    return Example(name, prompt, f" {answer}", f" {subject}", roles, ("indirect_object",))
