"""Gated short convolutions (LFM2, arXiv 2511.23404): `C * convolution(B * x)`, with both gates held fixed."""

from typing import Any

import torch
from typing_extensions import override

from depass_lightning.models.affine import Projection, features
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen


class ShortConvolution(Mixer):
    """One convolution of every channel over a few positions, which is one head."""

    kind = "short_convolution"

    @override
    def __init__(self, module: Any) -> None:
        self.heads, self.convolution = 1, module.conv
        self.output = Projection(module.out_proj)
        channels = features(module.in_proj)[1] // 3
        self.value = Projection(module.in_proj, slice(2 * channels, 3 * channels))
        self.recorded = {"projection": module.in_proj}

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        before, gates, values = seen["projection"][1].to(dtype).chunk(3, 2)
        taps, bias = self._taps(dtype)
        same = torch.eye(values.shape[1], device=values.device, dtype=dtype)
        return Mixing(
            matrix=same.expand(len(values), 1, -1, -1),
            before=before,
            taps=taps,
            constants=bias,
            slopes=None,
            gates=gates,
        )
