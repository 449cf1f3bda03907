"""The training corpus of the bundled model: people who give things to each other, and one-line facts.

About half of the passages are prompts of the task `ioi` (split "train"), the others facts of the task `known`
(split "train"), both with their answers. Some are preceded by an irrelevant sentence, so that the model
learns to ignore it.
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

# Words outside the vocabulary, so that the unknown token occurs in training.
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
    """Return every word and punctuation mark of passages and generated prompts, in a fixed order."""
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
    """Draw one passage: a prompt with its answer, sometimes after an irrelevant sentence."""
    if generator.random() < IOI_SHARE:
        example = next(examples)
        passage = answered(example.prompt, example.known_answer)
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
    """Draw an irrelevant sentence, half of the time a fact."""
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
    """Replace the first object or place of a passage by a word outside the vocabulary."""
    match = re.search(rf"\b({'|'.join((*PLACES, *OBJECTS))})\b", passage.text)
    if match is None:
        return passage
    word = generator.choice(UNKNOWN)
    shift = len(word) - len(match[0])
    answers = tuple(
        (start + shift, end + shift) if start > match.start() else (start, end)
        for start, end in passage.answers
    )
    return Passage(passage.text[: match.start()] + word + passage.text[match.end() :], answers)
