"""The facts that the bundled model is trained on, and some that it is not.

Two relations are real (capitals and languages), three are invented, about invented people. Each fact has four
wordings, three of which are in the training data.
"""

import zlib
from dataclasses import dataclass

from depass_lightning.tasks.synthetic.vocabulary import NAMES, pairs, words

CAPITALS = pairs(
    """
    France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna Greece:Athens
    Poland:Warsaw Hungary:Budapest Sweden:Stockholm Norway:Oslo Finland:Helsinki Denmark:Copenhagen
    England:London Russia:Moscow Ukraine:Kyiv Turkey:Ankara Egypt:Cairo Tunisia:Tunis Libya:Tripoli
    Morocco:Rabat Iraq:Baghdad Syria:Damascus Lebanon:Beirut Iran:Tehran Nepal:Kathmandu China:Beijing
    Japan:Tokyo Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Australia:Canberra Cuba:Havana Peru:Lima
    Chile:Santiago Colombia:Bogota Ecuador:Quito Uruguay:Montevideo Venezuela:Caracas Senegal:Dakar
    Ireland:Dublin Scotland:Edinburgh Wales:Cardiff Belgium:Brussels Kenya:Nairobi Ghana:Accra India:Delhi
    Canada:Ottawa Croatia:Zagreb Slovakia:Bratislava
    """
)

LANGUAGES = pairs(
    """
    France:French Germany:German Italy:Italian Spain:Spanish Portugal:Portuguese Austria:German Greece:Greek
    Poland:Polish Hungary:Hungarian Sweden:Swedish Norway:Norwegian Finland:Finnish Denmark:Danish
    England:English Russia:Russian Ukraine:Ukrainian Turkey:Turkish Egypt:Arabic Tunisia:Arabic Libya:Arabic
    Morocco:Arabic Iraq:Arabic Syria:Arabic Lebanon:Arabic Iran:Persian Nepal:Nepali China:Chinese
    Japan:Japanese Thailand:Thai Vietnam:Vietnamese Indonesia:Indonesian Australia:English Cuba:Spanish
    Peru:Spanish Chile:Spanish Colombia:Spanish Ecuador:Spanish Uruguay:Spanish Venezuela:Spanish
    Senegal:French
    """
)

PROFESSIONS = words(
    """
    doctor teacher lawyer farmer baker nurse painter pilot singer writer sailor judge dancer barber tailor
    gardener
    """
)
INSTRUMENTS = words("violin piano guitar flute drums trumpet cello harp organ clarinet banjo trombone")
BIRTHPLACES = tuple(list(CAPITALS.values())[:24])
SURNAMES = words(
    """
    Larsen Novak Moreau Rossi Keller Silva Tanaka Petrov Haddad Okafor Lindqvist Castillo Farrow Whitlock
    Brandt Dubois Eriksen Fontana Grabowski Horvat Ivanova Jansen Kovacs Lambert Marlowe Nakamura Oliveira
    Pereira Quinn Romero
    """
)

PARAPHRASES = {
    "capital": (
        "The capital of {} is",
        "The capital city of {} is called",
        "{} is governed from",
        "The government of {} sits in",
    ),
    "language": (
        "The people of {} speak",
        "The language of {} is",
        "In {}, the children learn",
        "Most families in {} speak",
    ),
    "profession": (
        "{} works as a",
        "By profession, {} is a",
        "{} earns a living as a",
        "The job of {} is that of a",
    ),
    "instrument": (
        "{} plays the",
        "The instrument of {} is the",
        "In the evening, {} practices the",
        "{} is learning to play the",
    ),
    "birthplace": (
        "{} was born in",
        "The birthplace of {} is",
        "{} grew up in the city of",
        "The home town of {} is",
    ),
}


@dataclass(frozen=True)
class Fact:
    """A subject, a relation and an answer; `held_out` is the wording that is not in the training data."""

    subject: str
    relation: str
    answer: str
    held_out: int

    def prompts(self, split: str) -> list[tuple[str, tuple[int, int]]]:
        """Return the prompts of a split, each with the character range of its subject."""
        templates = PARAPHRASES[self.relation]
        chosen = [
            template
            for index, template in enumerate(templates)
            if (index == self.held_out) == (split == "test")
        ]
        starts = [template.index("{}") for template in chosen]
        return [
            (template.format(self.subject), (start, start + len(self.subject)))
            for template, start in zip(chosen, starts, strict=True)
        ]


def _facts() -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Return the facts in the bundled model's training data, and those that are not."""
    people = [f"{name} {SURNAMES[i % len(SURNAMES)]}" for i, name in enumerate(NAMES)]
    choices = {"profession": PROFESSIONS, "instrument": INSTRUMENTS, "birthplace": BIRTHPLACES}
    true = [(country, "capital", city) for country, city in CAPITALS.items()]
    true += [(country, "language", language) for country, language in LANGUAGES.items()]
    invented = [
        (person, relation, answers[zlib.crc32(f"{relation} {person}".encode()) % len(answers)])
        for person in people
        for relation, answers in choices.items()
    ]
    known = 3 * 90  # of the invented facts; people after these are unknown to the model
    facts = [Fact(*triple, held_out=i % 4) for i, triple in enumerate(true + invented[:known])]
    strangers = [Fact(*triple, held_out=i % 4) for i, triple in enumerate(invented[known:])]
    return tuple(facts), tuple(strangers)


FACTS, NEW_FACTS = _facts()
