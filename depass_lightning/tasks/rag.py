"""Questions about documents: "Mary left the ring in the garden. ... Mary left the ring in the" → " garden".

With a file, rows are `{documents, question, answer}`, with `evidence` if it is known
(`loading/chat_rows.py`). Without one, sentences that the answer needs, the needles, are hidden among others.
After Kamradt's needle in a haystack and RULER (Hsieh et al. 2024, arXiv 2404.06654).
"""

import random
from pathlib import Path

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.jsonl import example_of
from depass_lightning.tasks.loading.rows import load_rows
from depass_lightning.tasks.synthetic.corpus import FILLERS
from depass_lightning.tasks.synthetic.vocabulary import NAMES, OBJECTS, PLACES
from depass_lightning.utils.sections import Documents, SectionedText

DEFAULT_SIZE = 100
KINDS = ("people", "needle", "several", "two_steps")
RIVALS = 3  # needles about others, of the kind "several"


def load(
    size: int | None,
    seed: int,
    split: str,  # noqa: ARG001
    path: str | Path | None,
    kind: str = "people",
    sentences: int = 4,
) -> Task:
    """Read questions about documents, or hide needles.

    Args:
        size: the number of prompts; None means 100, or all rows of a file.
        seed: the seed of generated prompts.
        split: ignored.
        path: rows in a file, folder or data set of `tasks.load`.
        kind: `people`, whom something is given to, as in the task `ioi`, the only one that the bundled model
            has learnt; `needle`, where something is; `several`, the same with needles about others;
            `two_steps`, where somebody is to whom it was given.
        sentences: the number of other sentences, each a document.

    Raises:
        DePassError: there is no such kind, or the number is negative.
    """
    if path is not None:
        return load_rows("rag", path, example_of, size)
    if kind not in KINDS:
        raise DePassError(f"the rag task has no kind {kind!r}; it has {', '.join(KINDS)}")
    if sentences < 0:
        raise DePassError(f"sentences must be at least 0; got {sentences}")
    generator = random.Random(f"rag {kind} {sentences} {seed}")
    numbers = range(DEFAULT_SIZE if size is None else size)
    return Task("rag", [_example(number, kind, sentences, generator) for number in numbers])


def _example(number: int, kind: str, sentences: int, generator: random.Random) -> Example:
    """Hide the needles of one question at random places among other sentences."""
    names, places, things = (generator.sample(words, 12) for words in (NAMES, PLACES, OBJECTS))
    (first, second, *others), (place, *elsewhere), (thing, *things) = names, places, things
    question, answer, foil = f"{first} left the {thing} in the", place, elsewhere[0]
    needles, rivals = [f"{question} {place}."], []
    if kind == "people":
        needles, question = [f"{first} and {second} went to the {place}."], f"{second} gave a {thing} to"
        answer, foil = first, second
    elif kind == "several":
        triples = zip(others[:RIVALS], things[:RIVALS], elsewhere[:RIVALS], strict=True)
        rivals = [f"{name} left the {rival} in the {other}." for name, rival, other in triples]
    elif kind == "two_steps":
        needles = [f"{first} gave the {thing} to {second}.", f"{second} left it in the {place}."]
        question = f"The {thing} is in the"
    fillers = [_filler(generator, others, elsewhere, things) for _ in range(sentences)]
    hay = [*rivals, *fillers]
    generator.shuffle(hay)
    indices = sorted(generator.choices(range(len(hay) + 1), k=len(needles)))
    for earlier, (needle, index) in enumerate(zip(needles, indices, strict=True)):
        hay.insert(index + earlier, needle)
    documents = Documents(hay, question, header="", separator=" ")
    starts = [documents.index(needle) for needle in needles]
    spans = tuple((start, start + len(needle)) for start, needle in zip(starts, needles, strict=True))
    return Example(
        f"rag-{kind}-{sentences}-{number}",
        SectionedText(documents, documents.sections),  # to be continued, whatever the model's template
        f" {answer}",
        f" {foil}",
        {"needle": spans},
        ("needle",),
    )


def _filler(generator: random.Random, names: list[str], places: list[str], things: list[str]) -> str:
    name, other = generator.sample(names[RIVALS:], 2)
    words = {"place": generator.choice(places), "object": generator.choice(things)}
    return generator.choice(FILLERS).format(name=name, other=other, **words)
