"""Methods that take gradients by the token embeddings.

Sources: Simonyan et al., "Deep Inside Convolutional Networks" (2013, arXiv 1312.6034), the gradient's length;
Shrikumar et al., "Not Just a Black Box" (2016, arXiv 1605.01713), gradient x input; Sundararajan et al.,
"Axiomatic Attribution for Deep Networks" (ICML 2017, arXiv 1703.01365), equation 1, integrated gradients;
Lundberg & Lee, "A Unified Approach to Interpreting Model Predictions" (NeurIPS 2017, arXiv 1705.07874) and
Erion et al., "Improving performance of deep learning models with axiomatic attribution priors" (2021, arXiv
1906.10670), equation 3, the expected gradients that captum computes as gradient SHAP.
"""

from abc import abstractmethod
from typing import ClassVar

import captum.attr
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.base import TokenBaseline
from depass_lightning.methods.model_runs import Batch, embeddings_replaced, run
from depass_lightning.methods.random_scores import seed_of, seeded
from depass_lightning.models.decoder import Decoder
from depass_lightning.sources import Source


def embeddings_of(batch: Batch) -> Float[Tensor, "batch position hidden"]:
    """Return the embeddings of a batch's tokens, as a leaf that gradients can be taken by."""
    decoder: Decoder = batch.decoder
    return decoder.token_embedding(batch.ids).detach().requires_grad_()


def _values_from_embeddings(
    embeddings: Tensor, batch: Batch, ids: Tensor, positions: Tensor, wanted: Tensor, weights: Tensor
) -> Tensor:
    """Run the model on embeddings, as captum calls it; every row has its target."""
    with embeddings_replaced(batch.decoder, embeddings):
        _, uncapped = run(batch.decoder, ids, positions)
    return batch.read(uncapped, wanted, weights)


class _Gradient(TokenBaseline):
    """One backward pass to the embeddings."""

    @override
    def score(self, batch: Batch) -> Tensor:
        embeddings = embeddings_of(batch)
        with torch.enable_grad(), embeddings_replaced(batch.decoder, embeddings):
            (gradients,) = torch.autograd.grad(batch.values().sum(), embeddings)
        dtype = batch.decoder.dtype
        return self.of(batch, embeddings.detach().to(dtype), gradients.to(dtype))

    @abstractmethod
    def of(
        self, batch: Batch, embeddings: Tensor, gradients: Tensor
    ) -> Float[Tensor, "batch group component"]:
        """Return the scores.

        Args:
            batch: the prompts.
            embeddings: `[batch, position, hidden]`.
            gradients: `[batch, position, hidden]` the targets' by them.
        """


class InputGradient(_Gradient):
    """Gradient x input: what the target would lose with a token's embedding, were it linear in it.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
    """

    name: ClassVar[str] = "input_gradient"

    @override
    def of(self, batch: Batch, embeddings: Tensor, gradients: Tensor) -> Tensor:
        return self.summed(batch, (embeddings * gradients).sum(-1))


class GradientNorm(_Gradient):
    """The L2 norm of the gradient by a token's or a span's embeddings: how much these could matter, unsigned.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
    """

    name: ClassVar[str] = "gradient_norm"

    @override
    def of(self, batch: Batch, embeddings: Tensor, gradients: Tensor) -> Tensor:
        return self.summed(batch, gradients.square().sum(-1)).sqrt()


class IntegratedGradients(TokenBaseline):
    """The mean gradient from embeddings of zero to the prompt's, by Gauss-Legendre quadrature, x the input.

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
            scores = captum.attr.IntegratedGradients(_values_from_embeddings).attribute(
                embeddings_of(batch),
                additional_forward_args=(batch, batch.ids, batch.positions, wanted, weights),
                n_steps=self.steps,
                internal_batch_size=max(self.rows, len(batch.ids)),
            )
        assert isinstance(scores, Tensor)
        return self.summed(batch, scores.detach().to(batch.decoder.dtype).sum(-1))


class GradientShap(TokenBaseline):
    """Gradient SHAP with prompts of as many tokens, drawn from the vocabulary, as the background.

    The draws depend on the seed and the prompt alone. Captum draws for all rows at once, so prompts run
    one by one.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
        samples: the number of points, each between the prompt and a random prompt.
        seed: the seed of the draws.

    Raises:
        DePassError: there are no samples.
    """

    name: ClassVar[str] = "gradient_shap"

    def __init__(
        self, depass: DePass, source: Source | None = None, *, samples: int = 32, seed: int = 0
    ) -> None:
        super().__init__(depass, source)
        if samples < 1:
            raise DePassError(f"{self.name}: samples must be at least 1; got {samples}")
        self.samples = samples
        self.seed = seed

    @override
    def score(self, batch: Batch) -> Tensor:
        scores = torch.zeros(batch.ids.shape, dtype=batch.decoder.dtype, device=batch.ids.device)
        wanted, weights = batch.wanted()
        embeddings = embeddings_of(batch).detach()
        embed = batch.decoder.token_embedding
        for row, ids in enumerate(batch.rows):
            seed, length, rows = seed_of(ids, self.seed), len(ids), slice(row, row + 1)
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(batch.decoder.embedding), (self.samples, length), generator=generator)
            with torch.enable_grad(), seeded(seed, batch.ids.device):
                attributed = captum.attr.GradientShap(_values_from_embeddings).attribute(
                    embeddings[rows, :length].clone().requires_grad_(),
                    baselines=embed(drawn.to(batch.ids.device)).detach(),
                    n_samples=self.samples,
                    additional_forward_args=(
                        batch,
                        batch.ids[rows, :length],
                        batch.positions[rows],
                        wanted[rows],
                        weights[rows],
                    ),
                )
            assert isinstance(attributed, Tensor)
            scores[row, :length] = attributed[0].detach().to(scores).sum(-1)
        return self.summed(batch, scores)
