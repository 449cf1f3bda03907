"""Attention and a state space in parallel, as in Falcon-H1 (arXiv 2507.22448): both read one norm's output.

Both are linear once frozen, so they are one mixer: attention's heads, then the state space's. Heads are as
wide as the wider of the two kinds, and what a head lacks is zero.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.models.affine import AffineMap, Projection, has_bias
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen
from depass_lightning.models.mixers.state_space import StateSpace


@dataclass(frozen=True)
class JoinedHeads(Projection):
    """The value maps, or the output maps, of two kinds of heads as one map.

    Args:
        heads: how many heads each part has.
        size: the size of a head in the joined map.
        weights: a factor of each part's weight.
        biases: a factor of each part's bias.
        reads: whether heads are the maps' inputs, and not their outputs.
    """

    parts: tuple[Projection, ...] = ()
    heads: tuple[int, ...] = ()
    size: int = 0
    weights: tuple[float, ...] = (1.0, 1.0)
    biases: tuple[float, ...] = (1.0, 1.0)
    reads: bool = False

    @cached_property
    @override
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.parts[0].shape
        width = sum(self.heads) * self.size
        return (outputs, width) if self.reads else (width, inputs)

    @override
    def linear(self, dtype: torch.dtype) -> AffineMap:
        side = 1 if self.reads else 0
        read = [part.linear(dtype) for part in self.parts]
        weights = [
            widened(affine.weight * factor, side, count, self.size)
            for affine, factor, count in zip(read, self.weights, self.heads, strict=True)
        ]
        constants = [
            affine.weight.new_zeros(len(affine.weight)) if affine.bias is None else affine.bias * factor
            for affine, factor in zip(read, self.biases, strict=True)
        ]
        weight = torch.cat(weights, side)
        if all(affine.bias is None for affine in read):
            return AffineMap(weight, None)
        if self.reads:
            return AffineMap(weight, torch.stack(constants).sum(0))
        pairs = zip(constants, self.heads, strict=True)
        return AffineMap(weight, torch.cat([widened(part, 0, count, self.size) for part, count in pairs]))


def widened(table: Tensor, side: int, heads: int, size: int) -> Tensor:
    """Fill up each of the heads on one side of a table with zeros, to a size."""
    split = table.movedim(side, -1).unflatten(-1, (heads, -1))
    return nn.functional.pad(split, (0, size - split.shape[-1])).flatten(-2).movedim(-1, side)


class SideBySide(Mixer):
    """Falcon-H1's attention and Mamba-2, each with a factor of what it reads and of what it writes."""

    kind = "attention_and_state_space"

    @override
    def __init__(self, module: Any) -> None:
        attention, self.space = module.self_attn, StateSpace(module.mamba)
        self.softmax = attention
        counts = attention.o_proj.in_features // attention.head_dim, self.space.heads
        self.counts, self.heads = counts, sum(counts)
        self.size = max(attention.head_dim, module.mamba.head_dim)
        self.convolution, self.recorded = self.space.convolution, self.space.recorded
        rows = torch.arange(attention.v_proj.out_features).view(-1, attention.head_dim)
        rows = rows.repeat_interleave(counts[0] // len(rows), 0).flatten()  # one value head for each head
        values = Projection(attention.v_proj, rows), self.space.value
        scale = float(module.mamba.mup_vector.flatten()[self.space.channels])
        self.value = JoinedHeads(
            nn.ModuleList(part.module for part in values),
            parts=values,
            heads=counts,
            size=self.size,
            weights=(module.attention_in_multiplier, module.mamba.ssm_in_multiplier * scale),
            biases=(1.0, scale),
        )
        outputs = Projection(attention.o_proj), self.space.output
        self._maps = (*values, *outputs)
        factors = module.attn_out_multiplier, module.ssm_out_multiplier
        self.output = JoinedHeads(
            nn.ModuleList(part.module for part in outputs),
            parts=outputs,
            heads=counts,
            size=self.size,
            weights=factors,
            biases=factors,
            reads=True,
        )

    @property
    @override
    def has_biases(self) -> bool:
        return self.space.has_biases or any(has_bias(part.module) for part in self._maps)

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        space, first = self.space.mixing(seen, dtype), self.counts[0] * self.size
        assert space.slopes is not None

        def channels(table: Tensor, fill: float) -> Tensor:
            """The state space's channels after those of attention."""
            wide = widened(table, -1, self.counts[1], self.size)
            return torch.cat([wide.new_full((*wide.shape[:-1], first), fill), wide], -1)

        taps = channels(space.taps.T, 0.0).T.clone()
        taps[:first, -1] = 1
        return Mixing(
            matrix=torch.cat([seen["probabilities"][1].to(dtype), space.matrix], 1),
            before=None,
            taps=taps,
            constants=None if space.constants is None else channels(space.constants, 0.0),
            slopes=channels(space.slopes, 1.0),
            gates=channels(space.gates, 1.0),
        )
