"""A stand-in for attention in a block that does not mix positions: heads that add zero."""

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from depass_lightning.models.affine import Projection
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen


class NoMixing(Mixer):
    """No mixing of positions.

    Args:
        module: the size of the residual stream and the number of heads, since there is no module.
    """

    kind = "absent"
    mixes = False

    @override
    def __init__(self, module: Any) -> None:
        hidden, self.heads = module
        self.recorded, self.convolution = {}, nn.Identity()
        maps = nn.Linear(hidden, self.heads, bias=False), nn.Linear(self.heads, hidden, bias=False)
        for linear in maps:
            nn.init.zeros_(linear.weight)
        self.value, self.output = (Projection(linear) for linear in maps)

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        state = seen["state"][1]
        batch, positions, _ = state.shape
        return Mixing(
            matrix=state.new_zeros((), dtype=dtype).expand(batch, self.heads, positions, positions),
            before=None,
            taps=state.new_ones(self.heads, 1, dtype=dtype),
            constants=None,
            slopes=None,
            gates=state.new_ones(batch, positions, self.heads, dtype=dtype),
        )
