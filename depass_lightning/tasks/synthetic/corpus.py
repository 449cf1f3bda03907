"""The text that the embedded model is trained on: people who give things to each other, and one-line facts.

About half of the passages are prompts of the task `ioi` (split "train"), the others are facts of the task
`known` (split "train"), both with their answers. Before some of them stands a sentence that has nothing to do
with the answer, so that the model learns to look past it.
"""

import random
import re
from collections.abc import Iterator

from depass_lightning.tasks import ioi
from depass_lightning.tasks.synthetic.facts import CAPITALS, FACTS, LANGUAGES, NEW_FACTS, PARAPHRASES, Fact
from depass_lightning.tasks.synthetic.passages import Passage, answered
from depass_lightning.tasks.synthetic.vocabulary import NAMES, OBJECTS, PLACES

FILLERS = (
    "{name} walked to the {place}.",
    "{name} lost a {object} near the {place}.",
    "There was a {object} on the table.",
    "The {place} was open all day.",
    "It was a cold day and {name} stayed at home.",
    "{name} has a new {object}.",
    "The weather was good.",
    "{name} and {other} are friends.",
)

# Words that the tokenizer does not know: the model meets its unknown token now and then.
UNKNOWN = ("gizmo", "doodad")

IOI_SHARE = 0.55
FILLER_SHARE = 0.3
UNKNOWN_SHARE = 0.03


def passages(size: int, seed: int = 0) -> list[Passage]:
    """Return `size` passages drawn from a seed."""
    generator = random.Random(f"corpus {seed}")
    examples = ioi.stream(seed, "train")
    return [_passage(generator, examples) for _ in range(size)]


def vocabulary() -> list[str]:
    """Return every word and mark that a passage or a generated prompt can hold, in a fixed order."""
    facts = (*FACTS, *NEW_FACTS)
    texts = (
        *NAMES,
        *PLACES,
        *OBJECTS,
        *(f"{fact.subject} {fact.answer}" for fact in facts),
        *CAPITALS.values(),
        *LANGUAGES.values(),
        *ioi.TEMPLATES,
        *(template for templates in PARAPHRASES.values() for template in templates),
        *FILLERS,
    )
    plain = (re.sub(r"\{\w*\}", " ", text) for text in texts)
    return list(dict.fromkeys(word for text in plain for word in re.findall(r"\w+|[^\w\s]", text)))


def _passage(generator: random.Random, examples: Iterator[ioi.Example]) -> Passage:
    """Draw one passage: a prompt with its answer, perhaps with an idle sentence before it."""
    if generator.random() < IOI_SHARE:
        example = next(examples)
        passage = answered(example.prompt, example.answer)
    else:
        passage = _fact(generator)
    if generator.random() < FILLER_SHARE:
        passage = _join(_idle(generator), passage)
    if generator.random() < UNKNOWN_SHARE:
        passage = _estrange(generator, passage)
    return passage


def _fact(generator: random.Random) -> Passage:
    fact: Fact = generator.choice(FACTS)
    prompt, _ = generator.choice(fact.prompts("train"))
    return answered(prompt, f" {fact.answer}")


def _idle(generator: random.Random) -> Passage:
    """Draw a sentence that says nothing about what follows: a fact half of the time."""
    if generator.random() < 0.5:
        fact = _fact(generator)
        return Passage(f"{fact.text}.", fact.answers)
    name, other = generator.sample(NAMES, 2)
    words = {"place": generator.choice(PLACES), "object": generator.choice(OBJECTS)}
    return Passage(generator.choice(FILLERS).format(name=name, other=other, **words))


def _join(first: Passage, second: Passage) -> Passage:
    shift = len(first.text) + 1
    later = tuple((start + shift, end + shift) for start, end in second.answers)
    return Passage(f"{first.text} {second.text}", first.answers + later)


def _estrange(generator: random.Random, passage: Passage) -> Passage:
    """Put a word that the tokenizer does not know in the place of the first thing or place in the passage."""
    match = re.search(rf"\b({'|'.join((*PLACES, *OBJECTS))})\b", passage.text)
    if match is None:
        return passage
    word = generator.choice(UNKNOWN)
    shift = len(word) - len(match[0])
    answers = tuple((a + shift, b + shift) if a > match.start() else (a, b) for a, b in passage.answers)
    return Passage(passage.text[: match.start()] + word + passage.text[match.end() :], answers)
