"""Attention scores as a linear path: the softmax's mean derivative, and everything else that is held fixed.

For a query with scores `s[k]` over the positions that it sees, probabilities `A = softmax(s)` and the even
mixture `U = softmax(0)`, the mean derivative on the line from zero scores, `M = integral of J(t s) dt` over
[0, 1] with `J(s) = diag(softmax(s)) - softmax(s) softmax(s)^T`, satisfies `M s = A - U`
(Sundararajan et al., arXiv 1703.01365, applied to the softmax).

Attention is called as the model calls it; a torch function mode changes what derivatives see:

1. the softmax's derivative becomes `M`, by Gauss-Legendre quadrature;
2. a soft cap's `tanh` is held at its ratio of output to input;
3. norms are held at their scale;
4. what scores contain besides products of queries and keys (attention sinks, a bias of positions) has a
   derivative too.
"""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from depass_lightning.models.probabilities import SOFTMAX

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
SUMS_OF_PRODUCTS = (torch.baddbmm, Tensor.baddbmm)
SUMS = (torch.add, Tensor.add, Tensor.__add__)
Side = Literal["query", "key"]
NODES = 16  # of the quadrature; on real models 6 are exact to 2e-3 of a target's value, 12 to 2e-5


class ScorePath(TorchFunctionMode):
    """Calls of one attention module, with derivatives through its scores as described above.

    Args:
        module: the attention module.
        heads: the number of its heads.
        position_bias: `[head, #query, key]` what the module adds to every prompt's scores, if anything.
        causal: whether no query sees a later key.

    Attributes:
        uniform: `[batch, head, query, key]` the even mixture over the positions that each query sees, once
            attention has been called; None before.
        constants: what scores contain besides products of queries and keys: a leaf of zeros that was added
            to it, and the constant itself.
        first: the position of the first query, if only some of the queries are recomputed.
    """

    def __init__(
        self, module: nn.Module, heads: int, position_bias: Tensor | None = None, *, causal: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.position_bias, self.causal = heads, position_bias, causal
        self.uniform: Float[Tensor, "batch head query key"] | None = None
        self.constants: list[tuple[Tensor, Tensor]] = []
        self.first = 0
        self._parameters = _storages(module)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch, held fixed where that is asked for."""
        kwargs = kwargs or {}
        if function is torch.cat:
            (tensors, *rest) = args
            return function([self._with_leaf(tensor) for tensor in tensors], *rest, **kwargs)
        if function in SUMS and self.position_bias is not None and _is_part(args[1], self.position_bias):
            return function(args[0], self._constant(args[1].expand(len(args[0]), *args[1].shape)))
        result = function(*args, **kwargs)
        if function in SOFTMAX:
            return self._softmax(args[0] if args else kwargs["input"], result)
        if function in (torch.tanh, Tensor.tanh):
            (scores,) = args
            slopes = torch.where(scores == 0, 1, result / torch.where(scores == 0, 1, scores))
            return scores * slopes.detach()
        return result.detach() if function is torch.rsqrt else result

    def _with_leaf(self, tensor: Tensor) -> Tensor:
        """Give a parameter that is joined to the scores (an attention sink) a derivative for each prompt."""
        if tensor.untyped_storage().data_ptr() not in self._parameters:
            return tensor
        return self._constant(tensor)

    def _constant(self, tensor: Tensor) -> Tensor:
        """Hold what is added to the scores fixed, and make it differentiable."""
        leaf = torch.zeros_like(tensor, requires_grad=True)
        self.constants.append((leaf, tensor.detach()))
        return tensor.detach() + leaf

    def _softmax(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        # Masks are the lowest number of their precision; a probability of zero may also be an underflow.
        visible = scores.detach() > torch.finfo(scores.dtype).min / 2
        # Some masks are only large (-1e4); no query sees what follows it. Columns after the keys are sinks.
        queries, keys = scores.shape[-2], self.first + scores.shape[-2]
        if self.causal:
            visible[..., :keys] &= visible.new_ones(queries, keys).tril(self.first)
        if queries == keys:
            even = visible.to(probabilities.dtype) / visible.sum(-1, keepdim=True).clamp_min(1)
            even = even if even.ndim == 4 else even.unflatten(0, (-1, self.heads))
            self.uniform = even[..., :keys]  # less the column of a sink
        return _MeanDerivative.apply(scores, probabilities.detach(), visible)  # type: ignore[return-value]


class OneSide(TorchFunctionMode):
    """Calls of one attention module in which scores depend on queries alone, or on keys alone.

    Args:
        module: the attention module.
        side: which of the two keeps its derivative.

    Attributes:
        products: the number of products of queries and keys that were seen.
    """

    def __init__(self, module: nn.Module, side: Side) -> None:
        super().__init__()
        self.side, self.products = side, 0
        self._parameters = _storages(module)
        self._scored = False  # products after the softmax are those of values

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function of torch, with one factor detached in a product of queries and keys."""
        kwargs = dict(kwargs or {})
        if function in SUMS_OF_PRODUCTS:
            args = (*args, *(kwargs.pop(name) for name in ("batch1", "batch2") if name in kwargs))
        self._scored |= function in SOFTMAX
        first = 0 if function in PRODUCTS else 1 if function in SUMS_OF_PRODUCTS else None
        if first is not None and not self._scored:
            factors = args[first : first + 2]
            if all(factor.requires_grad and not self._is_weight(factor) for factor in factors):
                self.products += 1
                fixed = first + (self.side == "query")
                args = (*args[:fixed], args[fixed].detach(), *args[fixed + 1 :])
        return function(*args, **kwargs)

    def _is_weight(self, factor: Tensor) -> bool:
        return factor.untyped_storage().data_ptr() in self._parameters


def _is_part(tensor: Any, whole: Tensor) -> bool:
    """Whether something is a view of a tensor."""
    return (
        isinstance(tensor, Tensor)
        and tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )


def _storages(module: nn.Module) -> set[int]:
    """Return the storage addresses of a module's parameters, which views of them share."""
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


class _MeanDerivative(torch.autograd.Function):
    """A softmax's recorded output, with the mean derivative on the line from zero scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, probabilities: Tensor, visible: Tensor) -> Tensor:
        ctx.save_for_backward(scores, visible)
        return probabilities.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scores, visible = ctx.saved_tensors
        dtype = scores.dtype
        work = torch.promote_types(dtype, torch.float32)
        (gradient,) = (part.to(work) for part in gradients)
        scores = scores.to(work).masked_fill(~visible, -torch.inf)
        total = torch.zeros_like(scores)
        for node, weight in zip(*_quadrature(NODES), strict=True):
            weighted = (node * scores).softmax(-1)
            weighted = weighted * (gradient - (weighted * gradient).sum(-1, keepdim=True))
            total += weight * weighted
        return total.to(dtype), None, None


def _quadrature(count: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
