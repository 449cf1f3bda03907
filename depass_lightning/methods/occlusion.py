"""Occlusion: what the target loses without a token, or without a span of them.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014, arXiv 1311.2901);
Li et al., "Understanding Neural Networks through Representation Erasure" (2016, arXiv 1612.08220), for words.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.base import TokenBaseline
from depass_lightning.methods.gradients import embeddings_of
from depass_lightning.methods.model_runs import Batch, embeddings_replaced, run
from depass_lightning.prompts import pad
from depass_lightning.sources import Source


class AblationBaseline(TokenBaseline):
    """A method that runs the model on prompts without some of their tokens.

    Where `how="remove"` would leave nothing, the last token stays. An encoder always keeps the token at which
    the target is read, such as the mask.

    Raises:
        DePassError: `how` is unknown, or there are no rows.
    """

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

    def values(
        self, batch: Batch, rows: Int[Tensor, "run"], removed: Bool[Tensor, "run position"]
    ) -> Float[Tensor, "run"]:
        """Return the target's value in prompts without some of their tokens."""
        wanted, weights = batch.wanted()
        values = []
        for start in range(0, len(rows), self.rows):
            part = slice(start, start + self.rows)
            logits = self._logits(batch, rows[part], removed[part])
            values.append(self.read(batch, logits, wanted[rows[part]], weights[rows[part]]))
        return torch.cat(values)

    def read(
        self, batch: Batch, logits: Float[Tensor, "run vocabulary"], wanted: Tensor, weights: Tensor
    ) -> Float[Tensor, "run"]:
        """Return what a run is judged by: the target's value.

        Args:
            batch: the prompts.
            logits: the logits, before any soft cap.
            wanted: `[run, token]` the tokens whose logits make up each target.
            weights: `[run, token]` the weight of each.
        """
        return batch.read(logits, wanted, weights)

    def _logits(self, batch: Batch, rows: Tensor, removed: Tensor) -> Tensor:
        if self.how == "zero":
            embeddings = embeddings_of(batch).detach()[rows].masked_fill(removed[..., None], 0)
            with embeddings_replaced(batch.decoder, embeddings):
                return run(batch.decoder, batch.ids[rows], batch.positions[rows])[1]
        kept = batch.real[rows] & ~removed
        if not batch.decoder.causal:
            return self._encoded(batch, rows, kept)
        empty = ~kept.any(1)
        kept[empty, batch.positions[rows][empty]] = True  # a model needs one token to read
        both = zip(batch.ids[rows].cpu(), kept.cpu(), strict=True)
        ids = pad([row[left].tolist() for row, left in both])
        return run(batch.decoder, ids.to(batch.ids.device), kept.sum(1) - 1)[1]

    def _encoded(self, batch: Batch, rows: Tensor, kept: Tensor) -> Tensor:
        """Return an encoder's logits, which padding would change: texts of equal length run together."""
        read = batch.positions[rows][:, None]
        kept = kept.scatter(1, read, True)
        places, lengths = kept.cumsum(1).gather(1, read)[:, 0] - 1, kept.sum(1)
        parts, order = [], []
        for length in lengths.unique().tolist():
            part = (lengths == length).nonzero()[:, 0]
            ids = batch.ids[rows[part]][kept[part]].view(len(part), length)
            parts.append(run(batch.decoder, ids, places[part])[1])
            order.append(part)
        return torch.cat(parts)[torch.cat(order).argsort().to(parts[0].device)]


class Occlusion(AblationBaseline):
    """The target's value less what it is without a token or span, one after another.

    The only token of a prompt cannot be removed: it has the whole value.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`, whose tokens go together.
        how: `remove` takes tokens out of the prompt, which is encoded again and read after its last token;
            `zero` sets their embeddings to zero and keeps all positions.
        rows: the number of ablated prompts in one pass.

    Raises:
        DePassError: `how` is unknown, or there are no rows.
    """

    name: ClassVar[str] = "occlusion"

    @override
    def score(self, batch: Batch) -> Tensor:
        whole, owners = batch.values(), self.owners(batch)
        scores = whole.new_zeros(len(whole), int(owners.max()) + 1)
        places: list[tuple[int, int]] = []
        for row, row_owners in enumerate(owners):
            components = row_owners[row_owners > 0].unique().tolist()
            scores[row, components] = whole[row]
            if self.how == "zero" or len(components) > 1:
                places += [(row, component) for component in components]
        if places:
            rows, components = whole.new_tensor(places).long().unbind(1)
            without = self.values(batch, rows, owners[rows] == components[:, None])
            scores[rows, components] -= without
        return scores[:, None, 1:]
