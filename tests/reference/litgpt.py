"""LitGPT's `GPT` built again with its names and structure, because the package is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Config:
    """The part of LitGPT's configuration that its blocks read."""

    n_layer: int = 2
    n_head: int = 4
    n_query_groups: int = 2
    n_embd: int = 24
    head_size: int = 6
    intermediate_size: int = 40
    padded_vocab_size: int = 61
    block_size: int = 32
    bias: bool = False
    lm_head_bias: bool = False
    parallel_residual: bool = False
    shared_attention_norm: bool = False
    post_norms: bool = False
    mlp_class_name: str = "LLaMAMLP"
    rotary_percentage: float = 1.0
    final_logit_softcapping: float | None = None

    @property
    def rope_n_elem(self) -> int:
        return int(self.rotary_percentage * self.head_size)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.n_embd) if self.bias else nn.RMSNorm(self.n_embd, eps=1e-6)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        outputs = (config.n_head + 2 * config.n_query_groups) * config.head_size
        self.qkv = nn.Linear(config.n_embd, outputs, bias=config.bias)
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any = None, *_positions: Any) -> Tensor:
        config, size, rotary = self.config, self.config.head_size, self.config.rope_n_elem
        sizes = [count * size for count in (config.n_head, config.n_query_groups, config.n_query_groups)]
        split = self.qkv(x).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in split)
        q, k = (torch.cat([rotated(part[..., :rotary], cos, sin), part[..., rotary:]], -1) for part in (q, k))
        k, v = (part.repeat_interleave(config.n_head // config.n_query_groups, 1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.gelu(self.fc(x)))


class LLaMAMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.silu(self.fc_1(x)) * self.fc_2(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.norm_1 = config.norm()
        self.attn = CausalSelfAttention(config)
        self.post_attention_norm = config.norm() if config.post_norms else nn.Identity()
        self.norm_2 = None if config.shared_attention_norm else config.norm()
        self.mlp = (GptNeoxMLP if config.mlp_class_name == "GptNeoxMLP" else LLaMAMLP)(config)
        self.post_mlp_norm = config.norm() if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *mask_and_positions: Any) -> Tensor:
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, cos, sin, *mask_and_positions))
        if self.config.parallel_residual:
            normed = normed if self.norm_2 is None else self.norm_2(x)
            x = attended + x
        else:
            x = attended + x
            assert self.norm_2 is not None
            normed = self.norm_2(x)
        return self.post_mlp_norm(self.mlp(normed)) + x


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": config.norm(),
            }
        )
        self.max_seq_length = config.block_size

    def forward(self, idx: Tensor) -> Tensor:
        rotary, x = self.config.rope_n_elem, self.transformer["wte"](idx)
        frequencies = 1 / 10_000 ** (torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
        angles = (torch.arange(idx.shape[1])[:, None] * frequencies).repeat(1, 2).to(x.dtype)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x, angles.cos()[None], angles.sin()[None], None, None, None)
        logits = self.lm_head(self.transformer["ln_f"](x))
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


GPT.__module__, GPT.__qualname__ = "litgpt.model", "GPT"  # where LitGPT has it
