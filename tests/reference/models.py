"""Tiny random models of every supported type, with every parameter randomised.

Default initialisation hides mistakes: with biases of zero and norm weights of one, an engine that forgets
them is still right. So here no parameter keeps its default, and no dimension equals another by accident.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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
        dtype: of the parameters; a model in float64 computes in float64 throughout (`stay_in_float64`).
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
        stay_in_float64(model)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Randomises every parameter, in float32, so that a seed gives the same model in every dtype."""
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


class Double(TorchFunctionMode):
    """Keeps code on float64 tensors in float64 where it asks for float32, as norms and softmaxes do."""

    entered = 0

    def __enter__(self) -> Any:
        Double.entered += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Double.entered -= 1
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.full and isinstance(args[1], float):
            kwargs.setdefault("dtype", torch.float64)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if function is Tensor.float:
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return function(*args, **kwargs)


def stay_in_float64(model: nn.Module) -> None:
    """Makes every module of Transformers in a float64 model compute in float64 throughout.

    Transformers takes norms, softmaxes and routing in float32 whatever the model's dtype, and the sum of a
    softmax's row in float32 depends on the row's length and on the processor's vectors.
    """
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("transformers.") and not hasattr(kind, "in_float64"):
            module.__class__ = _in_float64(kind)


@cache
def _in_float64(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns a class whose `forward` always runs in `Double`."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if Double.entered else Double():
            return kind.forward(self, *args, **kwargs)

    names = {"forward": forward, "in_float64": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)


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
