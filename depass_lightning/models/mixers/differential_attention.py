"""Differential attention (Ye et al., arXiv 2410.05258), of DiffLlama: one softmax less a multiple of another.

With both softmaxes held fixed, the head of a pair mixes its values by `P - lambda P'`, where `lambda` is a
parameter of the block. The values of a head are those of two value heads.
"""

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from depass_lightning.models.affine import Projection, features
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen, gates_of_norm, parameters_of


class DifferentialAttention(Mixer):
    """DiffLlama's attention, whose heads are the pairs of softmaxes."""

    kind = "differential_attention"

    @override
    def __init__(self, module: Any) -> None:
        self.module = self.softmax = module
        self.size = 2 * module.head_dim
        self.convolution = nn.Identity()
        self.output = Projection(module.o_proj)
        self.heads = self.output.shape[1] // self.size
        # A value head of the first half of all, and the same of the second half, are one value head here.
        rows = torch.arange(features(module.v_proj)[1]).view(2, -1, module.head_dim)
        self.value = Projection(module.v_proj, rows.transpose(0, 1).flatten())
        self.recorded = {"norm": module.groupnorm}

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        first, second = seen["probabilities"][1].to(dtype).chunk(2, 1)  # [batch, head, query, key]
        batch, positions, channels = len(first), first.shape[2], self.value.shape[0]
        shape = torch.Size((batch, positions, self.heads * self.size))
        gates = gates_of_norm(seen["norm"], first.new_ones(self.size), self.size, shape)
        return Mixing(
            matrix=first - self._factor(dtype) * second,
            before=None,
            taps=first.new_ones(channels, 1),
            constants=None,
            slopes=None,
            gates=gates * (1 - self.module.lambda_init),
        )

    def _factor(self, dtype: torch.dtype) -> torch.Tensor:
        """What the second softmax is multiplied by."""
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        query, key, other_query, other_key = parameters_of(self.module, dtype, *names)
        return (query * key).sum().exp() - (other_query * other_key).sum().exp() + self.module.lambda_init
