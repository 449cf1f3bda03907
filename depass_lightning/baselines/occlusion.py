"""Occlusion: what the target loses without a token.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014, arXiv 1311.2901);
Li et al., "Understanding Neural Networks through Representation Erasure" (2016, arXiv 1612.08220), for words.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from depass_lightning.baselines.base import Baseline
from depass_lightning.baselines.forward import Batch, embeddings_replaced, run
from depass_lightning.baselines.gradients import embeddings_of
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.prompts import pad
from depass_lightning.sources import Source


class Occlusion(Baseline):
    """The target's value less what it is without a token, one token after another.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()`.
        how: `remove` takes the token out of the prompt, which is encoded again and read behind its last
            token; `zero` sets its embedding to zero where it stands. The only token of a prompt cannot be
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
        whole = batch.values()
        places = [(row, at) for row, ids in enumerate(batch.rows) for at in range(len(ids))]
        scores = whole[:, None].expand(batch.ids.shape).clone()
        if self.how == "remove":
            places = [(row, at) for row, at in places if len(batch.rows[row]) > 1]
        for start in range(0, len(places), self.rows):
            chosen = torch.tensor(places[start : start + self.rows], device=batch.ids.device)
            rows, at = chosen.unbind(1)
            wanted, signs = batch.wanted()
            without = self._without(batch, rows, at)
            scores[rows, at] -= batch.read(without, wanted[rows], signs[rows])
        return scores[:, None]

    def _without(self, batch: Batch, rows: Tensor, at: Tensor) -> Tensor:
        """Return the logits of some prompts, each without one token."""
        if self.how == "zero":
            embeddings = embeddings_of(batch).detach()[rows]
            embeddings[torch.arange(len(rows), device=rows.device), at] = 0
            with embeddings_replaced(batch.decoder, embeddings):
                return run(batch.decoder, batch.ids[rows], batch.positions[rows])[1]
        both = zip(rows.tolist(), at.tolist(), strict=True)
        ids = pad([batch.rows[row][:place] + batch.rows[row][place + 1 :] for row, place in both])
        return run(batch.decoder, ids.to(batch.ids.device), batch.positions[rows] - 1)[1]
