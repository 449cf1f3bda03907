"""The probabilities of an attention module that does not return them, recorded in an additional call."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from depass_lightning.errors import DePassError

SOFTMAX = (torch.softmax, nn.functional.softmax, Tensor.softmax)


def seen_probabilities(
    module: nn.Module, *arguments: Any, **keywords: Any
) -> Float[Tensor, "batch head query key"]:
    """Call attention as the model called it, and return the probabilities that it multiplies values by.

    Args:
        module: a module that calls `scaled_dot_product_attention`, or one softmax over its scores.
        arguments: of the call.
        keywords: of the call.

    Raises:
        DePassError: it calls neither, or one of them several times.
    """
    with _Softmax() as softmax:
        module.forward(*arguments, **keywords)
    if len(softmax.seen) != 1:
        raise DePassError(
            f"{type(module).__name__} takes {len(softmax.seen)} softmaxes of attention scores, not one; "
            "declare a function that gives its probabilities: AttentionSpec(probabilities=...)"
        )
    return softmax.seen[0]


class _Softmax(TorchFunctionMode):
    """Keeps the probabilities of every softmax over attention scores."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is nn.functional.scaled_dot_product_attention:
            self.seen.append(_of_products(*args, **kwargs))
        elif function in SOFTMAX and result.ndim == 4:
            self.seen.append(result)
        return result


def _of_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001
) -> Tensor:
    """The probabilities that `scaled_dot_product_attention` computes from these arguments."""
    # [batch, head, position, size]; several heads may share a key
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)
