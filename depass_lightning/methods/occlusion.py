"""Occlusion: what the target loses without a token, or without a span of them.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014, arXiv 1311.2901);
Li et al., "Understanding Neural Networks through Representation Erasure" (2016, arXiv 1612.08220), for words.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.gradients import embeddings_of
from depass_lightning.methods.model_runs import Batch, embeddings_replaced, run
from depass_lightning.methods.token_method import TokenBaseline
from depass_lightning.prompts import pad
from depass_lightning.sources import Source


class Occlusion(TokenBaseline):
    """The target's value less what it is without a token or span, one after another.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`, whose tokens go together.
        how: `remove` takes them out of the prompt, which is encoded again and read behind its last token;
            `zero` sets their embeddings to zero where they stand. The only token of a prompt cannot be
            removed: it has the whole value.
        rows: how many shortened prompts go through the model at once.

    Raises:
        DePassError: `how` is unknown, or there are no rows.
    """

    name: ClassVar[str] = "occlusion"

    def __init__(
        self,
        depass: DePass,
        source: Source | None = None,
        *,
        how: Literal["remove", "zero"] = "remove",
        rows: int = 64,
    ) -> None:
        super().__init__(depass, source)
        if how not in ("remove", "zero"):
            raise DePassError(f"{self.name}: how must be 'remove' or 'zero'; got {how!r}")
        if rows < 1:
            raise DePassError(f"{self.name}: rows must be at least 1; got {rows}")
        self.how = how
        self.rows = rows

    def score(self, batch: Batch) -> Tensor:
        whole, owners = batch.values(), self.owners(batch)
        wanted, signs = batch.wanted()
        scores = whole.new_zeros(len(whole), int(owners.max()) + 1)
        places: list[tuple[int, int]] = []
        for row, own in enumerate(owners):
            components = own[own > 0].unique().tolist()
            scores[row, components] = whole[row]
            if self.how == "zero" or len(components) > 1:
                places += [(row, component) for component in components]
        for start in range(0, len(places), self.rows):
            chosen = torch.tensor(places[start : start + self.rows], device=batch.ids.device)
            rows, components = chosen.unbind(1)
            without = self._without(batch, rows, owners[rows] == components[:, None])
            scores[rows, components] -= batch.read(without, wanted[rows], signs[rows])
        return scores[:, None, 1:]

    def _without(self, batch: Batch, rows: Tensor, gone: Tensor) -> Tensor:
        """Return the logits of some prompts, each without the tokens that are gone: `[row, position]`."""
        if self.how == "zero":
            embeddings = embeddings_of(batch).detach()[rows].masked_fill(gone[..., None], 0)
            with embeddings_replaced(batch.decoder, embeddings):
                return run(batch.decoder, batch.ids[rows], batch.positions[rows])[1]
        kept = batch.real[rows] & ~gone
        ids = pad([own[left].tolist() for own, left in zip(batch.ids[rows], kept, strict=True)])
        return run(batch.decoder, ids.to(batch.ids.device), kept.sum(1) - 1)[1]
