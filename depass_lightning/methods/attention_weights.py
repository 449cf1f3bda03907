"""What attention itself looks at: its probabilities from the target's position to every token.

Source of the rollout: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020, arXiv
2005.00928), section 4.
"""

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.errors import DePassError
from depass_lightning.methods.base import TokenBaseline
from depass_lightning.methods.model_runs import Batch


class _Attention(TokenBaseline):
    """One pass that keeps each block's probabilities, their mean over heads."""

    @override
    def score(self, batch: Batch) -> Tensor:
        batch.decoder.check_attention(self.name)
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if not isinstance(output, tuple) or output[1] is None:
                raise DePassError(f"{self.name}: attention returned no probabilities under eager attention")
            seen.append(output[1].to(batch.decoder.dtype).mean(1).to(batch.ids.device))

        with ExitStack() as stack:
            for block in batch.decoder.blocks:
                stack.callback(block.attention.module.register_forward_hook(keep).remove)
            batch.values()
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        return self.summed(batch, self.of(seen)[rows, batch.positions])

    @abstractmethod
    def of(self, layers: list[Tensor]) -> Float[Tensor, "batch query key"]:
        """Return how much each position looks at each other one.

        Args:
            layers: each block's probabilities `[batch, query, key]`.
        """


class MeanAttention(_Attention):
    """The mean of the probabilities over all layers and heads.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
    """

    name: ClassVar[str] = "mean_attention"

    @override
    def of(self, layers: list[Tensor]) -> Tensor:
        return torch.stack(layers).mean(0)


class LastLayerAttention(_Attention):
    """The mean of the probabilities over the heads of the last layer.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
    """

    name: ClassVar[str] = "last_layer_attention"

    @override
    def of(self, layers: list[Tensor]) -> Tensor:
        return layers[-1]


class AttentionRollout(_Attention):
    """The product over all layers of `(A + I) / 2`, each row made to sum to one: A is the mean over heads.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
    """

    name: ClassVar[str] = "attention_rollout"

    @override
    def of(self, layers: list[Tensor]) -> Tensor:
        identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
        with_residual = [layer + identity for layer in layers]
        return rolled_out([layer / layer.sum(-1, keepdim=True) for layer in with_residual])


def rolled_out(layers: list[Tensor]) -> Float[Tensor, "*batch query key"]:
    """Return the product of layers, the last one first: how much of each token is in each final position.

    Args:
        layers: each block's weights `[*batch, query, key]`, the first block first.
    """
    product = layers[0]
    for layer in layers[1:]:
        product = layer @ product
    return product
