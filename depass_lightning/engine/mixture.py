"""How attention mixes values over positions: probabilities recomputed for a block of queries at a time.

A pass is recorded under a separate attention function, which keeps queries and keys instead of the
probabilities of every head and pair of positions, and computes the output by torch's fused kernel if that
supports the case. Where probabilities are needed, they are recomputed, a block of queries at a time.
A model whose attention does not go through the functions of Transformers is recorded under eager attention.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from typing_extensions import override

from depass_lightning.engine.score_path import ScorePath
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder

RECORDED = "depass_recorded"  # the name of the attention function
POSITIONS = ("position_ids", "cache_position")  # arguments already applied to queries and keys
_CPU_BYTES, _DEVICE_BYTES = 2**22, 2**28  # size of the probabilities of one block of queries


class Mixture(ABC):
    """How attention mixes values: a matrix over positions for each head."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """The number of query heads."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "batch head query key"]]]:
        """Compute the matrix a block of queries at a time, with the keys that the block can see."""

    @abstractmethod
    def weighted(self, value: float, uniform: float, even: Tensor | None) -> "Mixture":
        """Return the weighted sum of the recorded mixture and the even one over what each query sees.

        Args:
            value: the weight of the recorded mixture.
            uniform: the weight of the even mixture.
            even: the even mixture, if the recorded one cannot recompute it.
        """

    def whole(self) -> Float[Tensor, "batch head query key"]:
        """The matrix of all queries."""
        parts = list(self.blocks())
        keys = parts[-1][0].stop
        return torch.cat([nn.functional.pad(part, (0, keys - part.shape[-1])) for _, part in parts], 2)

    def mixed(self, values: Float[Tensor, "batch group key size"]) -> Float[Tensor, "batch head query size"]:
        """Mix values, each shared by a group of heads.

        Args:
            values: `[batch, value head, position, size]`.
        """
        parts = []
        for _, block in self.blocks():
            grouped = block.to(values).unflatten(1, (values.shape[1], -1)).flatten(2, 3)
            mixed = grouped @ values[:, :, : block.shape[-1]]  # [batch, group, head of it * query, size]
            parts.append(mixed.reshape(*block.shape[:3], -1))
        return torch.cat(parts, 2)

    def transposed(
        self, heads: Float[Tensor, "batch head query size"], groups: int
    ) -> Float[Tensor, "batch group key size"]:
        """Propagate derivatives with respect to mixed values back to the values.

        Args:
            heads: the derivatives, of several targets next to each other if there are several.
            groups: the number of value heads.
        """
        total = heads.new_zeros(len(heads), groups, *heads.shape[2:])
        for queries, block in self.blocks():
            grouped = block.to(heads).unflatten(1, (groups, -1)).flatten(2, 3)
            by_group = heads[:, :, queries].unflatten(1, (groups, -1)).flatten(2, 3)
            total[:, :, : block.shape[-1]] += grouped.mT @ by_group
        return total


@dataclass(frozen=True)
class DenseMixture(Mixture):
    """A mixture whose whole matrix is held in memory.

    Args:
        matrix: the weight of each key for each query.
    """

    matrix: Float[Tensor, "batch head query key"]

    @property
    @override
    def heads(self) -> int:
        return self.matrix.shape[1]

    @override
    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.matrix.shape[2]), self.matrix

    @override
    def weighted(self, value: float, uniform: float, even: Tensor | None) -> "DenseMixture":
        matrix = value * self.matrix
        return DenseMixture(matrix if even is None else matrix + uniform * even)


@dataclass(frozen=True)
class ScoredMixture(Mixture):
    """The softmax of scores, recomputed from queries and keys.

    Args:
        query: the queries, rotated.
        key: the keys, rotated; groups of heads share them.
        mask: which keys each query sees, or what is added to its scores; None where only `causal` hides keys.
        scale: what scores are multiplied by.
        softcap: the scores' soft cap, if any.
        sinks: each head's constant score that takes part in the softmax and has no value, if any.
        weight: the weight of the softmax.
        even: the weight of the even mixture over what each query sees, a sink included.
        causal: whether no query sees a later key.
    """

    query: Float[Tensor, "batch head query size"]
    key: Float[Tensor, "batch group key size"]
    mask: Bool[Tensor, "#batch #head query key"] | Float[Tensor, "#batch #head query key"] | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    weight: float = 1.0
    even: float = 0.0
    causal: bool = True

    @property
    @override
    def heads(self) -> int:
        return self.query.shape[1]

    def to(self, dtype: torch.dtype) -> "ScoredMixture":
        """Return the same with tensors in another precision."""
        sinks = None if self.sinks is None else self.sinks.detach().to(dtype)
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), sinks=sinks)

    @override
    def weighted(self, value: float, uniform: float, even: Tensor | None) -> "ScoredMixture":
        return replace(self, weight=value, even=uniform)

    @override
    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for queries in self.queries():
            yield queries, self.block(queries, self.query[:, :, queries], self.key[:, :, self.keys(queries)])

    def queries(self) -> list[slice]:
        """The queries of each block."""
        batch, heads, count, _ = self.query.shape
        limit = _CPU_BYTES if self.query.device.type == "cpu" else _DEVICE_BYTES
        step = max(1, limit // (batch * heads * count * self.query.dtype.itemsize))
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]

    def keys(self, queries: slice) -> slice:
        """The keys that a block of queries can see."""
        return slice(0, queries.stop if self.causal else self.key.shape[2])

    def block(
        self,
        queries: slice,
        query: Tensor,
        key: Tensor,
        sinks: Tensor | None = None,
        added: Tensor | float = 0.0,
    ) -> Float[Tensor, "batch head query key"]:
        """Compute the probabilities of a block of queries.

        Args:
            queries: the range of their positions.
            query: the queries.
            key: the keys that they can see.
            sinks: a constant score of each prompt and head, in place of the recorded ones.
            added: `[batch, 1, 1, 1]` the additional multiple of the mask that is added to scores.
        """
        work = torch.promote_types(query.dtype, torch.float32)
        # [batch, group, head of it * query, key]
        grouped = (query.to(work) * self.scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        scores = (grouped @ key.to(work).mT).view(*query.shape[:3], key.shape[2])
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        keys = self.keys(queries)  # without a sink's column
        if self.mask is None and self.causal:  # only the last keys are hidden from some of these queries
            count = queries.stop - queries.start
            later = torch.ones(count, count, device=query.device, dtype=torch.bool).triu(1)
            scores[..., queries].masked_fill_(later, -torch.inf)
        elif self.mask is not None:
            mask = self.mask[:, :, queries, keys]
            scores = (
                scores.masked_fill(~mask, -torch.inf)
                if mask.dtype == torch.bool
                else scores + mask * (1 + added)
            )
        if self.sinks is not None:
            sinks = self.sinks.view(1, -1, 1, 1) if sinks is None else sinks
            scores = torch.cat([scores, sinks.to(work).expand(*scores.shape[:3], 1)], -1)
        probabilities = torch.softmax(scores, -1)[..., keys]
        if self.weight == 1 and self.even == 0:
            return probabilities
        visible = (scores > torch.finfo(work).min / 2).to(work)
        even = visible / visible.sum(-1, keepdim=True).clamp_min(1)
        return self.weight * probabilities + self.even * even[..., keys]

    @override
    def mixed(self, values: Tensor) -> Tensor:
        kernel = self.softcap is None and self.sinks is None and self.even == 0 and self.weight == 1
        kernel &= self.query.shape[-1] == values.shape[-1] and self.query.dtype == values.dtype
        if not kernel or (self.mask is not None and self.mask.dtype != torch.bool):
            return super().mixed(values)
        repeats = self.heads // values.shape[1]
        key, values = (states.repeat_interleave(repeats, 1) for states in (self.key, values))
        return nn.functional.scaled_dot_product_attention(
            self.query, key, values, self.mask, is_causal=self.mask is None and self.causal, scale=self.scale
        )

    def with_gradient(
        self, values: Tensor, sinks: Tensor | None, added: Tensor | None, path: ScorePath | None
    ) -> Float[Tensor, "batch head query size"]:
        """Mix values so that derivatives reach queries, keys and sinks, a block of queries at a time.

        Args:
            values: the values, held fixed.
            sinks: zeros `[batch, head, 1, 1]` that are added to the sinks, if there are any.
            added: zeros `[batch, 1, 1, 1]`, the additional multiple of the mask that is added to scores; None
                for a mask that only hides positions.
            path: computes the softmax's mean derivative; None for its derivative.
        """
        return _ScoreGradients.apply(self, path, values.detach(), self.query, self.key, sinks, added)  # type: ignore[return-value]


class _ScoreGradients(torch.autograd.Function):
    """Mixed values whose derivatives for queries and keys are computed a block of queries at a time."""

    @staticmethod
    def forward(ctx: Any, mixture: ScoredMixture, path: Any, values: Tensor, *leaves: Tensor) -> Tensor:
        ctx.mixture, ctx.path = mixture, path
        ctx.save_for_backward(values, *leaves)
        return mixture.mixed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), mixture = gradients, ctx.mixture
        values, query, key, sinks, added = ctx.saved_tensors
        values = values.repeat_interleave(mixture.heads // values.shape[1], 1)
        totals = [None if leaf is None else torch.zeros_like(leaf) for leaf in (query, key, sinks, added)]
        for queries in mixture.queries():
            rows, keys = slice(None), mixture.keys(queries)
            parts = ((query, queries), (key, keys), (sinks, rows), (added, rows))
            leaves = [
                None if leaf is None else leaf[:, :, part].detach().requires_grad_() for leaf, part in parts
            ]
            if ctx.path is not None:
                ctx.path.first = queries.start
            with torch.enable_grad(), ctx.path or nullcontext():
                constant = None if leaves[2] is None else leaves[2] + mixture.sinks.detach().view(1, -1, 1, 1)
                more = 0.0 if leaves[3] is None else leaves[3]
                block = mixture.block(queries, leaves[0], leaves[1], constant, more)
            by_block = (gradient[:, :, queries] @ values[:, :, keys].mT).to(block)
            chosen = [leaf for leaf in leaves if leaf is not None]
            gradients_of_block = iter(torch.autograd.grad(block, chosen, by_block))
            for total, (_, part) in zip(totals, parts, strict=True):
                if total is not None:
                    total[:, :, part] += next(gradients_of_block)
        return None, None, None, *totals


def implementation(decoder: Decoder) -> str:
    """The attention function that a model is recorded under.

    Eager attention in half precision rounds scores and probabilities. Such a model is recorded as it is: with
    a fused kernel, components would sum to states with other rounding errors.
    """
    configured = getattr(decoder.config, "_attn_implementation", None)
    rounded = configured == "eager" and decoder.model_dtype.itemsize < torch.float32.itemsize
    return RECORDED if decoder.recomputes and not rounded else "eager"


Listener = Callable[[ScoredMixture, Tensor], Tensor]
_LISTENERS: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()


@contextmanager
def listening(module: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a function compute an attention module's mixed values, inside the context.

    Args:
        module: the attention module.
        listener: takes the mixture and the values, and returns `[batch, head, query, size]`.
    """
    _LISTENERS[module] = listener
    try:
        yield
    finally:
        del _LISTENERS[module]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for Transformers; see `AttentionInterface`."""
    scale, softcap, sinks = (options.pop(name, None) for name in ("scaling", "softcap", "s_aux"))
    unknown = [name for name, entry in options.items() if isinstance(entry, Tensor) and name not in POSITIONS]
    if unknown:
        raise DePassError(f"{type(module).__name__} passes '{unknown[0]}' to its attention function")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # As in transformers, a module without a mask is causal unless it says otherwise.
    causal = getattr(module, "is_causal", True)
    mixture = ScoredMixture(query, key, attention_mask, scale, softcap, sinks, causal=causal)
    listener = _LISTENERS.get(module, ScoredMixture.mixed)
    return listener(mixture, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(RECORDED, _attention)
AttentionMaskInterface.register(RECORDED, sdpa_mask)
