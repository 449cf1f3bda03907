"""Lightning attention (arXiv 2401.04658), of MiniMax: attention without a softmax, with one decay a head.

With queries `q` and keys `k` held fixed, a head with decay rate `r` computes the sum over `k <= n` of
`exp(-r (n - k)) q[n] . k[k] v[k]`, where `v` is the activation of the value map's output.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.models.affine import Projection, features
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen, gates_of_norm, parameters_of


class LightningAttention(Mixer):
    """MiniMax's linear attention."""

    kind = "lightning_attention"

    @override
    def __init__(self, module: Any) -> None:
        self.module, self.heads = module, module.num_attention_heads
        self.convolution = nn.Identity()
        self.output = Projection(module.out_proj)
        rows = torch.arange(features(module.qkv_proj)[1]).view(self.heads, 3, -1)
        self.value = Projection(module.qkv_proj, rows[:, 2].flatten())
        self.recorded = {"projection": module.qkv_proj, "norm": module.norm, "gate": module.output_gate}

    @classmethod
    @override
    def fits(cls, module: nn.Module | None) -> bool:
        return hasattr(module, "slope_rate")  # attention has the same name in its blocks

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        before = seen["projection"][1].to(dtype).unflatten(2, (self.heads, 3, -1))
        after: Tensor = self.module.act_fn(before)
        query, key, value = after.unbind(3)  # [batch, position, head, size]
        (weight,) = parameters_of(self.module.norm, dtype, "weight")
        channels = value.flatten(2)
        norm = gates_of_norm(seen["norm"], weight, channels.shape[2], channels.shape)
        return Mixing(
            matrix=torch.einsum("bnhs,bkhs->bhnk", query, key) * self._decays(query),
            before=None,
            taps=value.new_ones(channels.shape[2], 1),
            constants=None,
            slopes=(value / before[:, :, :, 2]).nan_to_num().flatten(2),  # a value of zero has no slope
            gates=norm * seen["gate"][1].to(dtype).sigmoid(),
        )

    def _decays(self, like: Float[Tensor, "batch position head size"]) -> Float[Tensor, "head query key"]:
        """The decays between positions as the module rounds them, inside a block of positions and across."""
        names = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
        rate, query, key, within = (getattr(self.module, name).to(like) for name in names)
        size: int = self.module.block_size
        positions = torch.arange(like.shape[1], device=like.device)
        block, place = positions // size, positions % size
        apart = block[:, None] - block
        across = query[:, place] * key[:, place].mT * (-rate * size).exp() ** (apart - 1).clamp(min=0)
        return torch.where(apart == 0, within[0][:, place][:, :, place], across * (apart > 0))
