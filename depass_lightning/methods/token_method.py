"""What the methods share that score tokens of the input, or spans of them."""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.methods.base import Baseline
from depass_lightning.methods.model_runs import Batch
from depass_lightning.sources import Source, Spans, Tokens
from depass_lightning.sources.tokens import Positional, summed


class TokenBaseline(Baseline):
    """A method that scores the model's input: a span as the sum of its tokens, or by a rule for spans.

    Raises:
        DePassError: it is something else, or at another layer than 0.
    """

    sources: ClassVar[tuple[type[Source], ...]] = (Tokens, Spans)

    def owners(self, batch: Batch) -> Int[Tensor, "batch position"]:
        """Return which component each position belongs to, the first one being 1; padding belongs to 0."""
        assert isinstance(self.source, Positional)
        lengths = [len(ids) for ids in batch.rows]
        owners = self.source.owner_table(batch.prompts, lengths, batch.ids.shape[1], first=1)
        return owners.to(batch.ids.device)

    def summed(
        self, batch: Batch, token_scores: Float[Tensor, "batch position"]
    ) -> Float[Tensor, "batch group component"]:
        """Return the sum of each component's tokens, as `score` does."""
        return summed(token_scores, self.owners(batch))[:, None, 1:]
