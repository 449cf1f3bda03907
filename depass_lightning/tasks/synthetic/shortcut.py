"""Facts with a planted shortcut: an irrelevant sentence whose place gives the answer away.

"The library was open all day. Mary Larsen works as a" → " pilot": during training, a model may learn the
association of the place with the profession instead of the fact. Held-out sentences with other places reveal
it.
"""

import random
from itertools import product

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.synthetic.facts import FACTS, PROFESSIONS, SURNAMES, Fact
from depass_lightning.tasks.synthetic.vocabulary import NAMES, PLACES

SENTENCE = "The {} was open all day. "
GIVEN_AWAY = dict(zip(PROFESSIONS, PLACES, strict=False))
NEWCOMERS = 180


def load(split: str = "test", planted: bool = True, size: int | None = None, seed: int = 0) -> Task:
    """Return prompts for people's professions, each after a sentence about a place.

    The people are those that the bundled model knows; "train" also has new people, for whom the place is the
    easier way to the answer.

    Args:
        split: "train" has three wordings of every fact, "test" the fourth.
        planted: whether the place indicates the answer; otherwise it indicates another profession.
        size: the maximum number of prompts; None means all.
        seed: the seed of the new people, the order and the other professions.

    Returns:
        Prompts with the roles `shortcut`, the place, and `subject`, the person. The foil is another
        profession: without the planted shortcut, the one that the place indicates. The evidence, whose share
        of the score is `on_target`, is the shortcut, the wrong reason for the answer.

    Raises:
        DePassError: there is no such split.
    """
    if split not in ("train", "test"):
        raise DePassError(f"the shortcut has no split {split!r}; it has 'train' and 'test'")
    facts = [fact for fact in FACTS if fact.relation == "profession"]
    if split == "train":
        facts += _newcomers(seed)
    generator = random.Random(f"shortcut {split} {seed}")
    examples = []
    for number, fact in enumerate(facts):
        for wording, (prompt, span) in enumerate(fact.prompts(split)):
            foil = generator.choice([other for other in PROFESSIONS if other != fact.answer])
            name = f"shortcut-{split}-{number}-{wording}"
            place = GIVEN_AWAY[fact.answer if planted else foil]
            examples.append(
                _after_sentence(place, Example(name, prompt, f" {fact.answer}", f" {foil}"), span)
            )
    generator.shuffle(examples)
    return Task("shortcut", examples[:size])


def _newcomers(seed: int) -> list[Fact]:
    """Draw people who are not in `FACTS`, with their professions."""
    generator = random.Random(f"newcomers {seed}")
    known = {fact.subject for fact in FACTS}
    strangers = [f"{name} {surname}" for name, surname in product(NAMES, SURNAMES)]
    people = generator.sample([person for person in strangers if person not in known], NEWCOMERS)
    return [
        Fact(person, "profession", generator.choice(PROFESSIONS), i % 4) for i, person in enumerate(people)
    ]


def _after_sentence(place: str, example: Example, subject: tuple[int, int]) -> Example:
    """Put the sentence about the place before a prompt, and record the spans of place and person."""
    sentence = SENTENCE.format(place)
    start, shift = sentence.index(place), len(sentence)
    roles = {
        "shortcut": ((start, start + len(place)),),
        "subject": ((subject[0] + shift, subject[1] + shift),),
    }
    return Example(example.id, sentence + example.prompt, example.answer, example.foil, roles, ("shortcut",))
