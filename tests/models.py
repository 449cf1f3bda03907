"""Tiny random models of every supported type, with every parameter randomised.

Default initialisation hides mistakes: with biases of zero and norm weights of one, an engine that forgets
them is still right. So here no parameter keeps its default, and no dimension equals another by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 61
WINDOW = 4

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

BUILDERS: dict[str, tuple[Callable[..., Any], Callable[..., PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-mlp-biases": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 10}),
    "qwen3-biases": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 10, "attention_bias": True}),
}

ALL = tuple(BUILDERS)
ONE_OF_EACH = ("llama", "mistral-window", "qwen2", "qwen3")
WITH_BIAS_COMPONENT = ("llama-biases", "llama-mlp-biases", "qwen2", "qwen2-window", "qwen3-biases")


def build(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Returns a tiny random model in evaluation mode.

    Args:
        name: one of `ALL`.
        dtype: of the parameters. In float64 the norms, which Transformers computes in float32 whatever the
            model's dtype, are computed in float64, so that sums can be checked to float64's precision.
        attention: Transformers' attention implementation.
        seed: of every parameter.
        changes: further settings of the configuration.
    """
    make_config, make_model, settings = BUILDERS[name]
    config = make_config(**(SMALL | settings | changes))
    config._attn_implementation = attention
    model = make_model(config)
    randomise(model, seed)
    model.to(dtype=dtype).eval()  # type: ignore[call-arg]
    if dtype == torch.float64:
        use_exact_norms(model)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Draws every parameter anew, in float32, so that a seed gives the same model in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.6, 1.4, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.4, generator=generator)
            elif "embed" in name:
                parameter.normal_(0.0, 0.8, generator=generator)
            else:
                parameter.normal_(0.0, 0.22, generator=generator)


def use_exact_norms(model: nn.Module) -> None:
    """Makes every RMS norm of the model compute in the dtype of its input."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and kind.forward is not _exact_rms_norm:
            module.__class__ = type(kind.__name__, (kind,), {"forward": _exact_rms_norm})


def _exact_rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale)


def prompt(length: int = 10, *, seed: int = 0) -> torch.Tensor:
    """Returns random token ids `[position]` that begin with the beginning-of-text token, as prompts do."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
    ids[0] = 1
    return ids


def padded(prompts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and mask `[batch, position]` of prompts, padded on the side `left` or `right`."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), 2)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        input_ids[row, place] = ids
        attention_mask[row, place] = 1
    return input_ids, attention_mask


@torch.no_grad()
def real_states(model: PreTrainedModel, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """Returns the residual states `[position, hidden]` of one prompt, as the model itself computes them.

    They are what enters each block and what leaves the last (`output_hidden_states` would give it normed).
    """
    states: list[torch.Tensor] = []
    blocks = list(model.model.layers)

    def entering(module: nn.Module, inputs: Any) -> None:
        states.append(inputs[0][0].clone())

    def leaving(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handles = [block.register_forward_pre_hook(entering) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leaving))
    try:
        model(input_ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def distance(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the L2 distance between two tensors, relative to the expected one's norm."""
    given, expected = given.detach().double(), expected.detach().double()
    return float((given - expected).norm() / expected.norm())
