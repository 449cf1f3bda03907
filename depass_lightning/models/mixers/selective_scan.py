"""Mamba (Gu & Dao, arXiv 2312.00752): a state-space model with a decay rate for each channel and state.

With inputs `B`, outputs `C` and steps `dt` held fixed, the output of channel `c` is `D x[n]` and the sum over
`k <= n` and states `s` of `C[n,s] B[k,s] exp(A[c,s] sum of dt[j,c] over k < j <= n) dt[k,c] x[k]`.
Each channel mixes positions by a separate matrix, so it is a head of size one.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.models.affine import Projection, parameter_of
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen, decays, parameters_of


class SelectiveScan(Mixer):
    """Mamba's mixer, with or without norms of its steps, inputs and outputs."""

    kind = "selective_scan"

    @override
    def __init__(self, module: Any) -> None:
        self.module = module
        self.heads, self.size = module.intermediate_size, module.ssm_state_size
        self.rank = int(module.time_step_rank)
        self.convolution = module.conv1d
        self.output = Projection(module.out_proj)
        self.value = Projection(module.in_proj, slice(0, self.heads))
        self.recorded = {"projection": module.in_proj, "selection": module.x_proj}
        norms = {name: getattr(module, f"{name}_layernorm", None) for name in ("dt", "b", "c")}
        self.recorded |= {name: norm for name, norm in norms.items() if isinstance(norm, nn.Module)}

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        values, gates = seen["projection"][1].to(dtype).chunk(2, 2)
        taps, bias, after = self._convolved(values)
        parts = seen["selection"][1].split([self.rank, self.size, self.size], 2)
        steps, entering, leaving = (
            (seen[name][1] if name in seen else part).to(dtype)
            for name, part in zip(("dt", "b", "c"), parts, strict=True)
        )
        rate, direct = parameters_of(self.module, dtype, "A_log", "D")
        (weight,) = parameters_of(self.module.dt_proj, dtype, "weight")
        shift = parameter_of(self.module.dt_proj, "bias", dtype)
        steps = steps @ weight.T  # [batch, position, channel]
        steps = torch.nn.functional.softplus(steps if shift is None else steps + shift)
        matrix = self._matrix(steps, entering, leaving, -rate.exp())
        return Mixing(
            matrix=matrix + torch.diag_embed(direct[:, None].expand(-1, matrix.shape[-1])),
            before=None,
            taps=taps,
            constants=bias,
            slopes=after.sigmoid(),  # SiLU over its input
            gates=torch.nn.functional.silu(gates),
        )

    def _matrix(
        self,
        steps: Float[Tensor, "batch position channel"],
        entering: Float[Tensor, "batch position state"],
        leaving: Float[Tensor, "batch position state"],
        rate: Float[Tensor, "channel state"],
    ) -> Float[Tensor, "batch channel query key"]:
        """Each channel's matrix, summed state by state, so that the terms of all states are never held."""
        total = steps.new_zeros(())
        for state in range(self.size):
            products = leaving[:, :, state, None] * entering[:, None, :, state]  # [batch, query, key]
            total = total + products[:, None] * decays(steps * rate[:, state])
        return total * steps.transpose(1, 2)[:, :, None]
