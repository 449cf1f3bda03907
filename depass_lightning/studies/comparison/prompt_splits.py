"""Which prompts a comparison may look at: splits of a task by a hash of each prompt's text.

Rules and settings are chosen on `development`, judged on `held_out`, and confirmed once on `fresh`. A prompt
is always in the same split, whatever the file, its order or the seed, so that results are not reported on
the prompts that settings were chosen on.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

from depass_lightning.errors import DePassError
from depass_lightning.tasks import Example

Split = Literal["development", "held_out", "fresh"]

SHARES: dict[Split, float] = {"development": 0.5, "held_out": 0.25, "fresh": 0.25}


def split_of(prompt: str) -> Split:
    """Return the split of a prompt."""
    place, end = _fraction(prompt), 0.0
    for split, share in SHARES.items():
        end += share
        if place < end:
            return split
    return "fresh"


def sampled(examples: Sequence[Example], split: Split | None, seed: int = 0) -> list[Example]:
    """Return the examples of a split, in an order that depends on the seed and on each prompt's text alone.

    Without a split, all examples are returned in their order.

    Raises:
        DePassError: there is no such split, or none of the examples is in it.
    """
    if split is None:
        return list(examples)
    if split not in SHARES:
        raise DePassError(f"split must be {', '.join(get_args(Split))} or left out; got {split!r}")
    chosen = [example for example in examples if split_of(example.prompt) == split]
    if not chosen:
        raise DePassError(f"none of {len(examples)} prompts is in the split {split}")
    return sorted(chosen, key=lambda example: _fraction(f"{seed} {example.prompt}"))


def _fraction(text: str) -> float:
    """Return a number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
