"""How the target changes with each token's embedding: gradient x input, and the gradient's length.

Source: Simonyan et al., "Deep Inside Convolutional Networks" (2013, arXiv 1312.6034); Shrikumar et al., "Not
Just a Black Box" (2016, arXiv 1605.01713), for the product with the input.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.methods.model_runs import Batch, embeddings_replaced
from depass_lightning.methods.token_method import TokenBaseline
from depass_lightning.models.decoder import Decoder


def embeddings_of(batch: Batch) -> Float[Tensor, "batch position hidden"]:
    """Return the embeddings of a batch's tokens, as a leaf that gradients can be taken by."""
    decoder: Decoder = batch.decoder
    return decoder.token_embedding(batch.ids).detach().requires_grad_()


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
