"""RG-LRU (De et al., arXiv 2402.19427), of RecurrentGemma: a recurrence with a gate for each channel.

With the input gates `i` and the decays `a` held fixed, `h[n] = a[n] h[n-1] + sqrt(1 - a[n]^2) i[n] x[n]` is
linear in the convolved values `x`; at the first position the square root is 1. Each channel mixes positions
by a separate matrix, so it is a head of size one. The other branch's activation is a gate on the output.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.models.affine import Projection
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen, decays, parameters_of


class GatedRecurrence(Mixer):
    """RecurrentGemma's recurrent block."""

    kind = "gated_recurrence"

    @override
    def __init__(self, module: Any) -> None:
        self.recurrence, self.heads = module.rg_lru, module.lru_width
        self.convolution = module.conv_1d
        self.value, self.output = Projection(module.linear_x), Projection(module.linear_out)
        self.recorded = {"recurrence": module.rg_lru, "gate": module.act_fn}

    @classmethod
    @override
    def fits(cls, module: nn.Module | None) -> bool:
        return hasattr(module, "rg_lru")  # attention has the same name in its blocks

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        taps, bias = self._taps(dtype)
        values = seen["recurrence"][0][0].to(dtype)  # [batch, position, channel], after the convolution
        (rate,) = parameters_of(self.recurrence, dtype, "recurrent_param")
        logs = -8 * self._gate("recurrent", values) * torch.nn.functional.softplus(rate)
        entering = (1 - (2 * logs).exp()).sqrt()
        entering[:, 0] = 1
        return Mixing(
            matrix=decays(logs),
            before=None,
            taps=taps,
            constants=bias,
            slopes=entering * self._gate("input", values),
            gates=seen["gate"][1].to(dtype),
        )

    def _gate(
        self, name: str, values: Float[Tensor, "batch position channel"]
    ) -> Float[Tensor, "batch position channel"]:
        """One of the gates, whose weights are a matrix for each group of channels."""
        names = (f"{name}_gate_weight", f"{name}_gate_bias")
        weight, bias = parameters_of(self.recurrence, values.dtype, *names)
        groups = torch.einsum("bngi,gio->bngo", values.unflatten(2, (len(weight), -1)), weight)
        return (groups + bias).flatten(2).sigmoid()
