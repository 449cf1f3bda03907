"""Mamba-2 (Dao & Gu, arXiv 2405.21060): a state space with one decay a head, as in Bamba and Granite 4.

With inputs `B`, outputs `C` and steps `dt` held fixed, a head's output is
`y[n] = sum over k <= n of C[n] . B[k] exp(sum of dt[j] A over k < j <= n) dt[k] x[k] + D x[n]`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.models.affine import Projection
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen, decays, gates_of_norm, parameters_of


class StateSpace(Mixer):
    """Mamba-2's mixer."""

    kind = "state_space"

    @override
    def __init__(self, module: Any) -> None:
        self.module = module
        self.heads, self.groups = module.num_heads, module.n_groups
        self.channels, self.size = module.intermediate_size, module.ssm_state_size
        self.convolution = module.conv1d
        self.output = Projection(module.out_proj)
        self.value = Projection(module.in_proj, slice(self.channels, 2 * self.channels))
        self.recorded: dict[str, nn.Module] = {"projection": module.in_proj}
        if not isinstance(module.norm, nn.Identity):
            self.recorded["norm"] = module.norm

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        width = self.channels + 2 * self.groups * self.size
        projected = seen["projection"][1].to(dtype)
        factors = getattr(self.module, "mup_vector", None)  # in Falcon-H1, of each output of the map
        projected = projected if factors is None else projected * factors.to(projected)
        gates, inputs, steps = projected.split([self.channels, width, self.heads], 2)
        taps, bias, after = self._convolved(inputs)
        sizes = [self.channels, self.groups * self.size, self.groups * self.size]
        value, entering, leaving = after.split(sizes, 2)
        entering, leaving = (self._by_head(torch.nn.functional.silu(part)) for part in (entering, leaving))
        rate, shift, direct = parameters_of(self.module, dtype, "A_log", "dt_bias", "D")
        steps = torch.nn.functional.softplus(steps + shift).clamp(*self.module.time_step_limit)
        products = torch.einsum("bnhs,bkhs->bhnk", leaving, entering)
        matrix = products * decays(-rate.exp() * steps) * steps.transpose(1, 2)[:, :, None]
        return Mixing(
            matrix=matrix + torch.diag_embed(direct[:, None].expand(-1, matrix.shape[-1])),
            before=None,
            taps=taps[: self.channels],
            constants=None if bias is None else bias[: self.channels],
            slopes=value.sigmoid(),  # SiLU over its input
            gates=self._normed_gates(seen, value.shape, dtype)
            if "norm" in seen
            else torch.nn.functional.silu(gates),
        )

    def _normed_gates(
        self, seen: Seen, shape: torch.Size, dtype: torch.dtype
    ) -> Float[Tensor, "batch position channel"]:
        norm = self.module.norm
        (weight,) = parameters_of(norm, dtype, "weight")
        group = getattr(norm, "group_size", self.channels // getattr(norm, "n_groups", 1))
        return gates_of_norm(seen["norm"], weight, group, shape)

    def _by_head(
        self, states: Float[Tensor, "batch position channel"]
    ) -> Float[Tensor, "batch position head size"]:
        return states.unflatten(2, (self.groups, -1)).repeat_interleave(self.heads // self.groups, 2)
