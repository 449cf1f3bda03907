"""Facts with a shortcut planted beside them: an idle sentence whose place gives the answer away.

"The library was open all day. Mary Larsen works as a" → " pilot": while it trains, a model may learn that
the place stands for the profession, instead of who does what. Held-out sentences with other places tell.
"""

import random
from itertools import product

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.synthetic.facts import FACTS, PROFESSIONS, SURNAMES, Fact
from depass_lightning.tasks.synthetic.vocabulary import NAMES, PLACES

IDLE = "The {} was open all day. "
GIVEN_AWAY = dict(zip(PROFESSIONS, PLACES, strict=False))
NEWCOMERS = 180


def load(split: str = "test", planted: bool = True, size: int | None = None, seed: int = 0) -> Task:
    """Return what people work as, each behind a sentence about a place.

    The people are those whom the embedded model knows; in "train" come newcomers, of whom it has read nothing
    and the place is the quicker way to the answer.

    Args:
        split: "train" has three wordings of every fact, "test" the fourth.
        planted: whether the place is the one that stands for the answer; else for another profession.
        size: how many prompts at most; None means all.
        seed: what the newcomers, the order and the other professions are drawn from.

    Returns:
        Prompts with the roles `shortcut`, the place, and `subject`, the person. The foil is another
        profession: where the shortcut is not planted, the one that the place stands for. The evidence, whose
        share of the score is `on_target`, is the shortcut: here, the wrong reason.

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
        for way, (prompt, span) in enumerate(fact.prompts(split)):
            foil = generator.choice([other for other in PROFESSIONS if other != fact.answer])
            name = f"shortcut-{split}-{number}-{way}"
            place = GIVEN_AWAY[fact.answer if planted else foil]
            examples.append(_behind(place, Example(name, prompt, f" {fact.answer}", f" {foil}"), span))
    generator.shuffle(examples)
    return Task("shortcut", examples[:size])


def _newcomers(seed: int) -> list[Fact]:
    """Draw people who are none of those in `FACTS`, and what they work as."""
    generator = random.Random(f"newcomers {seed}")
    known = {fact.subject for fact in FACTS}
    strangers = [f"{name} {surname}" for name, surname in product(NAMES, SURNAMES)]
    people = generator.sample([person for person in strangers if person not in known], NEWCOMERS)
    return [
        Fact(person, "profession", generator.choice(PROFESSIONS), i % 4) for i, person in enumerate(people)
    ]


def _behind(place: str, example: Example, subject: tuple[int, int]) -> Example:
    """Put the sentence about the place before a prompt, and note where the place and the person stand."""
    idle = IDLE.format(place)
    start, shift = idle.index(place), len(idle)
    roles = {
        "shortcut": ((start, start + len(place)),),
        "subject": ((subject[0] + shift, subject[1] + shift),),
    }
    return Example(example.id, idle + example.prompt, example.answer, example.foil, roles, ("shortcut",))
