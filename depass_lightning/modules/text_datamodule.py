"""Text to train a language model on, as a LightningDataModule."""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Span
from depass_lightning.tasks.synthetic.passages import Passage, read_passages

MANY_TOKENS = 1_000_000  # a tokenizer that states no limit states a number beyond this


class TextDataModule(LightningDataModule):
    """Passages in, padded batches out; each token carries the weight of its loss.

    Args:
        tokenizer: a fast tokenizer, since answers are found by their characters.
        train: the passages to train on.
        validation: the held-out passages: a list, several lists by name, or the share of `train` to hold out.
        batch_size: passages in a batch, a process.
        text_weight: weight of the loss on tokens outside the answers, in passages that have answers; 0 trains
            on the answers alone. Passages without answers weigh 1 everywhere.
        answer_weight: weight of the loss on tokens of answers.
        max_length: longer passages are cut into pieces of this many tokens; None means the model's context.
        append_eos: end each passage with the tokenizer's end-of-sequence token; it weighs as an answer where
            the passage ends with one, and never counts for the accuracy.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Passage],
        validation: Sequence[Passage] | Mapping[str, Sequence[Passage]] | float = 0.1,
        batch_size: int = 32,
        text_weight: float = 0.0,
        answer_weight: float = 1.0,
        max_length: int | None = None,
        append_eos: bool = False,
    ) -> None:
        super().__init__()
        if not tokenizer.is_fast:
            raise DePassError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer")
        if append_eos and tokenizer.eos_token is None:
            raise DePassError("the tokenizer has no end-of-sequence token; set append_eos=False")
        if isinstance(validation, int | float):
            train, validation = _hold_out(train, validation)
        self.tokenizer = tokenizer
        self.train_passages = train
        self.held_out = validation if isinstance(validation, Mapping) else {"all": validation}
        self.batch_size = batch_size
        self.text_weight, self.answer_weight = text_weight, answer_weight
        self.max_length = max_length or tokenizer.model_max_length
        self.ending = str(tokenizer.eos_token) if append_eos else ""
        self._pieces: dict[str, list[Piece]] = {}

    def setup(self, stage: str) -> None:
        """Tokenise what the stage needs, once."""
        sets = dict(self.held_out) | ({"train": self.train_passages} if stage == "fit" else {})
        for name, passages in sets.items():
            if name not in self._pieces:
                self._pieces[name] = self._encode(passages)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of the passages to train on, those of like length together."""
        pieces = self._pieces["train"]
        lengths = [len(piece.input_ids) for piece in pieces]
        sampler = RandomSampler(pieces)  # type: ignore[arg-type]
        batches = LengthBatches(sampler, self.batch_size, drop_last=False, lengths=lengths)
        return self._loader("train", batch_sampler=batches)

    def val_dataloader(self) -> list[DataLoader]:
        """Return one loader for each set of held-out passages."""
        return [self._loader(name, batch_size=self.batch_size) for name in self.held_out]

    def _loader(self, name: str, **batching: Any) -> DataLoader:
        pad_id: Any = self.tokenizer.pad_token_id or 0
        collate = partial(collate_pieces, name=name, pad_id=pad_id)
        return DataLoader(self._pieces[name], collate_fn=collate, **batching)  # type: ignore[arg-type]

    def _encode(self, passages: Sequence[Passage]) -> list["Piece"]:
        """Tokenise passages; a passage longer than `max_length` gives several pieces."""
        encoding = self.tokenizer(
            [passage.text + self.ending for passage in passages],
            truncation=self.max_length < MANY_TOKENS,
            max_length=self.max_length if self.max_length < MANY_TOKENS else None,
            return_offsets_mapping=True,
            return_overflowing_tokens=True,
        )
        origins = encoding.get("overflow_to_sample_mapping", range(len(passages)))
        rows = zip(origins, encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [self._piece(passages[origin], ids, offsets) for origin, ids, offsets in rows]

    def _piece(self, passage: Passage, ids: list[int], offsets: list[Span]) -> "Piece":
        """Weigh every token of a passage, or of a part of it."""
        length = len(passage.text)
        spans = [(a, b + len(self.ending) * (b == length)) for a, b in passage.answers]
        answer = torch.tensor([any(a < end and start < b for a, b in spans) for start, end in offsets])
        inside = torch.tensor([end <= length for _, end in offsets])
        if not spans:
            return Piece(torch.tensor(ids), torch.ones(len(ids)), inside)
        weights = torch.where(answer, float(self.answer_weight), float(self.text_weight))
        return Piece(torch.tensor(ids), weights, answer & inside)


class LengthBatches(BatchSampler):
    """Batches of like length: less is padding, and no two epochs have the same ones.

    Lightning gives it each process's own sampler: it makes a new one with the same arguments.

    Args:
        sampler: the order in which passages are taken.
        batch_size: passages in a batch.
        drop_last: whether to leave out the last passages, where they do not fill a batch.
        lengths: every passage's number of tokens.
        pool: batches whose passages are sorted by length together.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, drop_last: bool, lengths: Sequence[int], pool: int = 8
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.lengths = lengths
        self.pool = pool

    def __iter__(self) -> Iterator[list[int]]:
        order = [index for batch in super().__iter__() for index in batch]
        for start in range(0, len(order), self.pool * self.batch_size):
            taken = sorted(order[start : start + self.pool * self.batch_size], key=self.lengths.__getitem__)
            batches = [taken[i : i + self.batch_size] for i in range(0, len(taken), self.batch_size)]
            for number in torch.randperm(len(batches)).tolist():
                yield batches[number]


def file_data(
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None,
    validation: str | Path | float = 0.1,
    **options: Any,
) -> TextDataModule:
    """Return the data module of a file (see `read_passages`).

    Args:
        tokenizer: a fast tokenizer.
        path: what to train on.
        validation: a file to validate on, or the share of `path` to hold out.
        options: passed on to `TextDataModule`.
    """
    if path is None:
        raise DePassError("no data to train on; give a file (data.path=train.jsonl)")
    held_out = validation if isinstance(validation, float | int) else read_passages(validation)
    return TextDataModule(tokenizer, read_passages(path), held_out, **options)


class Piece(NamedTuple):
    """A tokenised passage, or a part of one."""

    input_ids: Int[Tensor, "position"]
    weights: Float[Tensor, "position"]
    scored: Bool[Tensor, "position"]


def collate_pieces(pieces: Sequence[Piece], name: str, pad_id: int) -> dict[str, Any]:
    """Pad pieces on the right into one batch.

    Returns:
        `input_ids`, `attention_mask`, `weights` (of the loss) and `scored` (tokens whose prediction counts
        for the accuracy), each [batch, position], and the `set` that the batch is from.
    """
    ids, weights, scored = (list(column) for column in zip(*pieces, strict=True))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "weights": pad_sequence(weights, batch_first=True),
        "scored": pad_sequence(scored, batch_first=True),
        "set": name,
    }


def _hold_out(passages: Sequence[Passage], share: float) -> tuple[list[Passage], list[Passage]]:
    """Part passages into those to train on and those to validate on, the same way each time."""
    if not 0 < share < 1 or len(passages) < 2:
        raise DePassError(
            f"cannot hold out the share {share} of {len(passages)} passages; give validation passages"
        )
    order = random.Random(0).sample(range(len(passages)), len(passages))
    count = max(1, round(share * len(passages)))
    return [passages[i] for i in order[count:]], [passages[i] for i in order[:count]]
