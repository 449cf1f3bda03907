"""Prompts with a corrupted counterpart of as many tokens, in which the answer is no longer the right one.

- `ioi`: all names are replaced, and no name occurs twice (ABC prompts; Wang et al. 2023, arXiv 2211.00593).
- `greater_than`: a year is continued after an earlier one, which becomes "01" (Hanna et al. 2023, arXiv
  2305.00586). The answer is two decades later and the foil two decades earlier, so that their first digits
  suffice where a tokenizer splits numbers into digits.
- `agreement`: a verb agrees with its subject, whose number is exchanged, and not with a noun in between.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.tasks import Example, ioi
from depass_lightning.tasks.synthetic.vocabulary import NAMES, pairs, words
from depass_lightning.utils.tokenization import continuation_ids, encode

CORRUPTED = "corrupted"  # the variant of an example
EVENTS = words("war siege trial project treaty tour reign strike revolt crisis mission expedition")
NOUNS = pairs(
    """
    boy:boys girl:girls teacher:teachers doctor:doctors farmer:farmers student:students writer:writers
    author:authors manager:managers artist:artists guard:guards pilot:pilots friend:friends dog:dogs
    car:cars book:books key:keys picture:pictures house:houses tree:trees
    """
)
VERBS = pairs("is:are was:were has:have")
LINKS = words("near by with from")
ATTEMPTS = 20  # prompts that are generated for every usable one, before giving up


def _ioi(generator: random.Random) -> Iterator[Example]:
    """Yield indirect objects, with three other names in the corrupted prompt."""
    for example in ioi.stream(generator.randrange(1 << 16), "test"):
        spans = sorted(span for role in example.roles.values() for span in role)
        present = {example.prompt[start:end] for start, end in spans}
        names = generator.sample([name for name in NAMES if name not in present], len(spans))
        corrupted = example.prompt
        for name, (start, end) in reversed(list(zip(names, spans, strict=True))):
            corrupted = corrupted[:start] + name + corrupted[end:]
        yield replace(example, variants={CORRUPTED: corrupted})


def _greater_than(generator: random.Random) -> Iterator[Example]:
    """Yield spans of years."""
    number = 0
    while True:
        event, century = generator.choice(EVENTS), generator.randint(11, 18)
        decade, year = generator.randint(3, 6), generator.randint(2, 9)
        text = f"The {event} lasted from the year {century}{{}} to the year {century}"
        answer, foil = (f"{decade + step}{generator.randint(0, 9)}" for step in (2, -2))
        variants = {CORRUPTED: text.format("01")}
        yield Example(
            f"greater-than-{number}", text.format(f"{decade}{year}"), answer, foil, variants=variants
        )
        number += 1


def _agreement(generator: random.Random) -> Iterator[Example]:
    """Yield subjects with another noun of the opposite number before the verb."""
    number = 0
    while True:
        subject, other = generator.sample(list(NOUNS.items()), 2)
        verb, plural = generator.choice(list(VERBS.items())), number % 2
        text = f"The {{}} {generator.choice(LINKS)} the {other[1 - plural]}"
        yield Example(
            f"agreement-{number}",
            text.format(subject[plural]),
            f" {verb[plural]}",
            f" {verb[1 - plural]}",
            variants={CORRUPTED: text.format(subject[1 - plural])},
        )
        number += 1


PAIRS: dict[str, Callable[[random.Random], Iterator[Example]]] = {
    "ioi": _ioi,
    "greater_than": _greater_than,
    "agreement": _agreement,
}


def prompt_pairs(depass: DePass, task: str, size: int, seed: int = 0) -> list[Example]:
    """Return distinct prompts that a model's tokenizer splits as their corrupted variants; maybe fewer.

    Args:
        depass: the model, with its tokenizer.
        task: one of `PAIRS`.
        size: the number of prompts.
        seed: of the prompts.

    Raises:
        DePassError: there is no such task, or the model has no tokenizer.
    """
    if task not in PAIRS:
        raise DePassError(f"no prompts are corrupted for {task!r}; there are {', '.join(PAIRS)}")
    if depass.tokenizer is None:
        raise DePassError("prompts are text, but there is no tokenizer; use DePass(model, tokenizer)")
    usable: dict[str, Example] = {}
    for example in islice(PAIRS[task](random.Random(f"{task} {seed}")), ATTEMPTS * size):
        if len(usable) < size and _aligned(depass, example):
            usable.setdefault(example.prompt, example)
    return list(usable.values())


def _aligned(depass: DePass, example: Example) -> bool:
    """Whether the two prompts have known tokens only, as many, and answers that differ in the first one."""
    tokenizer = depass.tokenizer
    assert tokenizer is not None
    texts = example.prompt, example.variants[CORRUPTED]
    clean, corrupted = (encode(text, tokenizer).ids for text in texts)
    answer, foil = (
        continuation_ids(text, example.prompt, tokenizer)
        for text in (example.known_answer, example.foil or "")
    )
    if len(clean) != len(corrupted) or not answer or not foil or answer[0] == foil[0]:
        return False
    if tokenizer.unk_token_id in {*clean, *corrupted, *answer, *foil}:
        return False
    if not example.known_answer.startswith(" "):
        return True  # a number, which need not be one token
    changed = sum(a != b for a, b in zip(*(text.split() for text in texts), strict=True))
    tokens = sum(a != b for a, b in zip(clean, corrupted, strict=True))
    return len(answer) == len(foil) == 1 and changed == tokens
