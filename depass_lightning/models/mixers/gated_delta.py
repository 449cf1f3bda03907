"""Gated DeltaNet (Yang et al., arXiv 2412.06464), of Qwen3.5 and OLMo Hybrid: a delta rule with a decay.

With queries `q`, keys `k`, step sizes `beta` and decays `g` held fixed, a head's state
`S[n] = exp(g[n]) (I - beta[n] k[n] k[n]^T) S[n-1] + beta[n] k[n] v[n]^T` and its output `q[n]^T S[n]` are
linear in its values `v`. With `D[n,j] = exp(sum of g over j < i <= n)`, what each position writes solves
`u[n] = beta[n] (v[n] - sum over j < n of D[n,j] (k[n] . k[j]) u[j])`, and the output is
`sum over j <= n of D[n,j] (q[n] . k[j]) u[j]`: one triangular system for all positions. Kimi Delta Attention
(arXiv 2510.26692) has a decay for each channel of the keys, inside these products.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import override

from depass_lightning.models.affine import Projection, features
from depass_lightning.models.mixers.base import Mixer, Mixing, Seen, decays, gates_of_norm, parameters_of


class GatedDelta(Mixer):
    """A gated delta rule, with its projections apart, or fused in one of two ways."""

    kind = "gated_delta"

    @override
    def __init__(self, module: Any) -> None:
        self.module = module
        by_channel = hasattr(module, "forget_gate")  # as in Kimi Linear
        if by_channel:
            self.heads = self.key_heads = module.num_heads
            self.key_size = self.value_size = module.head_dim
        else:
            self.heads, self.key_heads = module.num_v_heads, module.num_k_heads
            self.key_size, self.value_size = module.head_k_dim, module.head_v_dim
        self.convolution = module.conv1d
        apart = hasattr(module, "q_proj")  # as in OLMo Hybrid and Kimi Linear
        self.norm: nn.Module = module.o_norm if apart else module.norm
        self.output = Projection(module.o_proj if apart else module.out_proj)
        self.largest_step = 2.0 if getattr(module, "allow_neg_eigval", False) else 1.0
        keys, values = self.key_heads * self.key_size, self.heads * self.value_size
        if apart:
            parts = [Projection(part) for part in (module.q_proj, module.k_proj, module.v_proj)]
            steps = [Projection(part) for part in (module.b_proj, getattr(module, "a_proj", None)) if part]
        elif hasattr(module, "in_proj_qkvz"):  # each key head's queries, keys, values and gates in turn
            grouped = torch.arange(features(module.in_proj_qkvz)[1]).view(self.key_heads, -1)
            sizes = [self.key_size, self.key_size, values // self.key_heads, values // self.key_heads]
            rows = [part.flatten() for part in grouped.split(sizes, 1)]
            parts = [Projection(module.in_proj_qkvz, index) for index in rows[:3]]
            both = torch.arange(2 * self.heads).view(self.key_heads, 2, -1)
            steps = [Projection(module.in_proj_ba, both[:, index].flatten()) for index in (0, 1)]
        else:
            fused = module.in_proj_qkv
            ends = (slice(0, keys), slice(keys, 2 * keys), slice(2 * keys, 2 * keys + values))
            parts = [Projection(fused, rows) for rows in ends]
            steps = [Projection(module.in_proj_b), Projection(module.in_proj_a)]
        self.value = parts[2]
        names = ("query", "key", "value", "step", "decay")
        self._parts = dict(zip(names[: 3 + len(steps)], parts + steps, strict=True))
        self.recorded = {name: part.module for name, part in self._parts.items()} | {"norm": self.norm}
        if by_channel:
            self.recorded["logs"] = module.forget_gate

    @classmethod
    @override
    def fits(cls, module: nn.Module | None) -> bool:
        return hasattr(module, "conv1d")  # in Kimi Linear, attention has the same name in its blocks

    @override
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        read = {name: part.of(seen[name][1]).to(dtype) for name, part in self._parts.items()}
        query, key, value = read["query"], read["key"], read["value"]
        taps, bias, after = self._convolved(torch.cat([query, key, value], 2))
        query, key, value = after.split([query.shape[2], key.shape[2], value.shape[2]], 2)
        slopes = value.sigmoid()  # SiLU over its input
        query, key = (self._unit(torch.nn.functional.silu(part)) for part in (query, key))
        beta = self.largest_step * read["step"].sigmoid()
        logs = seen["logs"][1].to(dtype) if "logs" in seen else self._logs(read["decay"])
        (weight,) = parameters_of(self.norm, dtype, "weight")
        activation = ACT2FN[getattr(self.norm, "activation", "silu")]
        channels = value.shape[2]
        return Mixing(
            matrix=delta_rule(query * self.key_size**-0.5, key, beta, logs),
            before=None,
            taps=taps[-channels:],
            constants=None if bias is None else bias[-channels:],
            slopes=slopes,
            gates=gates_of_norm(seen["norm"], weight, self.value_size, value.shape, activation),
        )

    def _logs(self, decay: Float[Tensor, "batch position head"]) -> Float[Tensor, "batch position head"]:
        """The logarithms of the decays."""
        rate, shift = parameters_of(self.module, decay.dtype, "A_log", "dt_bias")
        return -rate.exp() * torch.nn.functional.softplus(decay + shift)

    def _unit(
        self, states: Float[Tensor, "batch position channel"]
    ) -> Float[Tensor, "batch position head size"]:
        """Queries or keys of length one, for every value head."""
        heads = states.unflatten(2, (self.key_heads, -1))
        heads = heads * (heads.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return heads.repeat_interleave(self.heads // self.key_heads, 2)


def delta_rule(
    query: Float[Tensor, "batch position head size"],
    key: Float[Tensor, "batch position head size"],
    beta: Float[Tensor, "batch position head"],
    decay: Float[Tensor, "batch position head"] | Float[Tensor, "batch position head size"],
) -> Float[Tensor, "batch head query key"]:
    """The matrix from values to outputs for keys of length one, step sizes, and the decays' logarithms."""
    steps = beta.transpose(1, 2)[..., None]  # [batch, head, position, 1]
    overlap = _decayed(key, key, decay) * steps
    same = torch.eye(key.shape[1], device=key.device, dtype=key.dtype)
    written = torch.linalg.solve_triangular(
        overlap.tril(-1) + same, same * steps, upper=False, unitriangular=True
    )
    return _decayed(query, key, decay) @ written


def _decayed(
    reading: Float[Tensor, "batch position head size"],
    written: Float[Tensor, "batch position head size"],
    decay: Tensor,
) -> Float[Tensor, "batch head query key"]:
    """The products of what reads with what was written, less what has decayed since."""
    if decay.ndim == 3:
        return torch.einsum("bnhs,bkhs->bhnk", reading, written) * decays(decay)
    total = reading.new_zeros(())
    for channel in range(decay.shape[3]):  # the terms of all channels are never held
        pair = (part[..., channel].transpose(1, 2) for part in (reading, written))  # [batch, head, position]
        first, second = pair
        total = total + first[..., None] * second[..., None, :] * decays(decay[..., channel])
    return total
