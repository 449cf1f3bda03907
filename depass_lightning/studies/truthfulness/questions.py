"""Asking the model again with some of a prompt's tokens masked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.errors import DePassError
from depass_lightning.utils.batching import in_batches

Mask = Literal["remove", "attention"]
MASKS = get_args(Mask)


@dataclass(frozen=True)
class ForcedChoice:
    """A prompt with some tokens masked, and its two answers.

    Args:
        ids: the prompt's token ids.
        answer: the id of the right next token.
        foil: the id of the false one.
        masked: the positions that are masked.
    """

    ids: Sequence[int]
    answer: int
    foil: int
    masked: Collection[int] = ()


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    Attributes:
        rank: the rank of the right answer among all tokens, from 1 for the most likely.
        preferred: whether the right answer is more likely than the false one.
        share: the right answer's probability among the two.
    """

    rank: int
    preferred: bool
    share: float


def ask(
    depass: DePass, questions: Sequence[ForcedChoice], *, mask: Mask = "remove", batch_size: int = 32
) -> list[Reply]:
    """Ask a model questions with tokens masked.

    Args:
        depass: the model.
        questions: what is asked; the same question is asked once.
        mask: "remove" takes masked tokens out, and what is left is encoded again as a prompt.
            "attention" leaves every token at its place and hides the masked ones from all later ones.
        batch_size: how many go through the model at once.

    Raises:
        DePassError: a question's last token is masked.
    """
    for question in questions:
        if len(question.ids) - 1 in question.masked:
            raise DePassError("a prompt's last token cannot be masked: the answer is read there")
    keys = [_key(question) for question in questions]
    different = list(dict.fromkeys(keys))

    def work(batch: list[int]) -> list[Reply]:
        return _replies(depass, [different[i] for i in batch], mask)

    lengths = [len(ids) - (len(masked) if mask == "remove" else 0) for ids, _, _, masked in different]
    kinds = [(depass.decoder.regime(length), length) for length in lengths]
    replies = dict(zip(different, in_batches(kinds, batch_size, work, progress=False), strict=True))
    return [replies[key] for key in keys]


_Key = tuple[tuple[int, ...], int, int, frozenset[int]]


def _key(question: ForcedChoice) -> _Key:
    return tuple(question.ids), question.answer, question.foil, frozenset(question.masked)


def _replies(depass: DePass, questions: list[_Key], mask: Mask) -> list[Reply]:
    """Ask a batch, padded on the left, so that all answers are read at the last position."""
    rows, seen = [], []
    for ids, _, _, masked in questions:
        kept = [i for i in range(len(ids)) if mask == "attention" or i not in masked]
        rows.append([ids[i] for i in kept])
        seen.append([int(i not in masked) for i in kept])
    width, device = max(map(len, rows)), depass.decoder.device
    padding = [width - len(row) for row in rows]

    def padded(values: list[list[int]]) -> Tensor:
        return torch.tensor([[0] * p + row for p, row in zip(padding, values, strict=True)], device=device)

    positions = padded([list(range(len(row))) for row in rows])
    with undisturbed(depass.decoder.model, attention=None):
        logits = depass.decoder.model(
            input_ids=padded(rows),
            attention_mask=padded(seen),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    logits = logits.float()
    answers = torch.tensor([[answer, foil] for _, answer, foil, _ in questions], device=device)
    choices = logits.gather(1, answers)
    ranks = (1 + (logits > choices[:, :1]).sum(1)).tolist()
    shares = choices.softmax(-1)[:, 0].tolist()
    preferred = (choices[:, 0] > choices[:, 1]).tolist()
    return [Reply(*reply) for reply in zip(ranks, preferred, shares, strict=True)]
