"""Integrated gradients: the mean gradient from zero embeddings to the prompt's, times the difference.

Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks" (ICML 2017, arXiv 1703.01365),
equation 1. The integral is captum's, by Gauss-Legendre quadrature.
"""

from typing import ClassVar

import torch
from captum.attr import IntegratedGradients as Captum
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.gradients import embeddings_of
from depass_lightning.methods.model_runs import Batch, embeddings_replaced, run
from depass_lightning.methods.token_method import TokenBaseline
from depass_lightning.sources import Source


def values_from_embeddings(
    embeddings: Tensor, batch: Batch, ids: Tensor, positions: Tensor, wanted: Tensor, weights: Tensor
) -> Tensor:
    """Run the model on embeddings, as captum calls it; every row has its target.

    Args:
        embeddings: `[row, position, hidden]`.
        batch: the batch that the rows belong to.
        ids: `[row, position]`, the tokens of the embeddings.
        positions: `[row]`, the targets' positions.
        wanted: `[row, token]`, the tokens whose logits make up each target.
        weights: `[row, token]`, the weight of each.
    """
    with embeddings_replaced(batch.decoder, embeddings):
        _, uncapped = run(batch.decoder, ids, positions)
    return batch.read(uncapped, wanted, weights)


class IntegratedGradients(TokenBaseline):
    """Integrated gradients from embeddings of zero.

    With enough steps, the scores sum to the target's value minus its value at zero embeddings.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
        steps: the number of points at which gradients are taken.
        rows: the number of points in one pass, for all prompts together.

    Raises:
        DePassError: a number is less than one.
    """

    name: ClassVar[str] = "integrated_gradients"

    def __init__(
        self, depass: DePass, source: Source | None = None, *, steps: int = 32, rows: int = 32
    ) -> None:
        super().__init__(depass, source)
        if min(steps, rows) < 1:
            raise DePassError(f"{self.name}: steps and rows must be at least 1; got {steps} and {rows}")
        self.steps = steps
        self.rows = rows

    @override
    def score(self, batch: Batch) -> Tensor:
        wanted, weights = batch.wanted()
        with torch.enable_grad():
            scores = Captum(values_from_embeddings).attribute(
                embeddings_of(batch),
                additional_forward_args=(batch, batch.ids, batch.positions, wanted, weights),
                n_steps=self.steps,
                internal_batch_size=max(self.rows, len(batch.ids)),
            )
        assert isinstance(scores, Tensor)
        return self.summed(batch, scores.detach().to(batch.decoder.dtype).sum(-1))
