"""Tiny random models of every family that is declared, and what they really compute.

The configurations are named by family and by what is special in them; dimensions differ from each other
wherever the family allows it, so that none is mistaken for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Emu3ForCausalLM, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.models.bloom.modeling_bloom import BloomGelu

from tests.reference.models import SMALL, Double, randomise, stay_in_float64

GPT = {"n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 64}
HEAD = {"head_dim": 10}
WINDOW = {"sliding_window": 4}
GEMMA = HEAD | {"query_pre_attn_scalar": 10}
FALCON = {"num_attention_heads": 6, "ffn_hidden_size": 44, "bias": True, "alibi": False}
EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "pad_token_id": 0,
}

# name: (model type, what the configuration has besides)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", HEAD),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", HEAD | {"attention_bias": True}),
    "gemma": ("gemma", HEAD | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | WINDOW | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
    "gemma2-biases": ("gemma2", GEMMA | {"attention_bias": True}),
    "gemma3": ("gemma3_text", GEMMA | WINDOW | {"rope_theta": 10000.0}),
    "phi3": ("phi3", {"pad_token_id": 0, "resid_pdrop": 0.3}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "exaone4": ("exaone4", WINDOW | {"head_dim": 6}),
    "smollm3": ("smollm3", {"pad_token_id": 0}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "helium": ("helium", {"head_dim": 6, "num_key_value_heads": 6}),
    "hunyuan": ("hunyuan_v1_dense", HEAD),
    "seed_oss": ("seed_oss", HEAD | {"attention_bias": True, "attention_out_bias": True}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "nemotron": ("nemotron", {"mlp_bias": True, "attention_bias": True}),
    "granite": ("granite", {"residual_multiplier": 0.3, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "glm4": ("glm4", HEAD | {"attention_bias": True, "pad_token_id": 0}),
    "cohere": ("cohere", {"logit_scale": 0.4, "pad_token_id": 0}),
    "cohere-norms": ("cohere", {"use_qk_norm": True, "pad_token_id": 0}),
    "cohere2": ("cohere2", WINDOW | {"logit_scale": 0.4, "pad_token_id": 0}),
    "phi": ("phi", {"hidden_size": 48}),
    "stablelm": ("stablelm", {"use_parallel_residual": False, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt2": ("gpt2", GPT | {"n_inner": 44}),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local", "local"], 1]], "window_size": 4},
    ),
    "gptj": ("gptj", GPT | {"n_inner": 44, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 44, "word_embed_proj_dim": 36}),
    "opt-350m": ("opt", {"ffn_dim": 44, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "openai-gpt": ("openai-gpt", GPT),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 6}),
    "bloom-normed": (
        "bloom",
        {"n_layer": 3, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    ),
    "falcon-7b": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": ("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True}),
    "mixtral": ("mixtral", EXPERTS),
    "olmoe": ("olmoe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS | HEAD | {"mlp_only_layers": [1]}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "gpt_oss": ("gpt_oss", EXPERTS | HEAD | WINDOW),
    "deepseek_v2": ("deepseek_v2", LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT),
}
FIRST = tuple(ZOO)  # every test of families runs on these, a lean choice of them on the families below

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GRANITE = {"residual_multiplier": 0.3, "logits_scaling": 3.0, "embedding_multiplier": 2.0}
SHARED = {
    **LATENT,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_local_experts": 6,
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
}
ZOO |= {
    "ministral": ("ministral", HEAD | WINDOW),
    "ministral3": (
        "ministral3",
        HEAD
        | {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}},
    ),
    "cwm": ("cwm", WINDOW | {"rope_parameters": ROPE}),
    "vaultgemma": ("vaultgemma", GEMMA | WINDOW),
    "glm": ("glm", HEAD | {"attention_bias": True, "pad_token_id": 0}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 5.0}),
    "minicpm3": ("minicpm3", LATENT | {"dim_model_base": 12, "scale_depth": 0.7}),
    "doge": ("doge", {}),
    "gpt_bigcode": ("gpt_bigcode", GPT | {"n_inner": 44}),
    "mpt": ("mpt", {"d_model": 36, "n_heads": 6, "n_layers": 3, "max_seq_len": 64}),
    "persimmon": ("persimmon", {"hidden_size": 48, "num_key_value_heads": 6}),
    "xglm": (
        "xglm",
        {"d_model": 36, "attention_heads": 6, "num_layers": 3, "ffn_dim": 44, "pad_token_id": 0},
    ),
    "codegen": ("codegen", GPT | {"num_attention_heads": 4, "n_head": 4, "n_inner": 44, "rotary_dim": 4}),
    "minimax_m2": ("minimax_m2", EXPERTS | {"head_dim": 6, "rotary_dim": 4}),
    "phimoe": ("phimoe", EXPERTS | {"attention_bias": True, "lm_head_bias": True}),
    "glm4_moe": ("glm4_moe", SHARED),
    "dots1": ("dots1", SHARED),
    "exaone_moe": ("exaone_moe", SHARED),
    "solar_open": ("solar_open", SHARED),
    "ernie4_5_moe": ("ernie4_5_moe", SHARED),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", SHARED | HEAD | {"moe_topk": 2}),
    "granitemoe": ("granitemoe", EXPERTS | GRANITE),
    "granitemoeshared": ("granitemoeshared", EXPERTS | GRANITE | {"shared_intermediate_size": 24}),
}
DELTA = HEAD | {
    "linear_num_value_heads": 6,
    "linear_num_key_heads": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 9,
    "mamba_n_groups": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_proj_bias": True,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CONVOLUTION = {
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_bias": True,
    "block_auto_adjust_ff_dim": False,
}
ZOO |= {
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", DELTA | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_next": ("qwen3_next", DELTA | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "olmo_hybrid": ("olmo_hybrid", DELTA | {"linear_allow_neg_eigval": True, "pad_token_id": 0}),
    "kimi_linear": (
        "kimi_linear",
        LATENT
        | {
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "linear_conv_kernel_dim": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_local_experts": 6,
        },
    ),
    "lfm2": ("lfm2", CONVOLUTION),
    "bamba": (
        "bamba",
        {key: value for key, value in MAMBA2.items() if key != "layer_types"} | {"attn_layer_indices": [1]},
    ),
    "granitemoehybrid": ("granitemoehybrid", MAMBA2 | EXPERTS | GRANITE | {"shared_intermediate_size": 24}),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        MAMBA2 | GRANITE | {"shared_intermediate_size": 24, "num_local_experts": 0},
    ),
}
ZOO |= {
    "internlm3": ("internlm3", HEAD | {"bias": True, "qkv_bias": True}),
    "iquestcoder": ("iquestcoder", HEAD),
    "jais2": ("jais2", {}),
    "mellum": ("mellum", EXPERTS | HEAD),
    "hy_v3": ("hy_v3", SHARED | {"head_dim": 6}),
    "flex_olmo": ("flex_olmo", EXPERTS),
    "afmoe": ("afmoe", EXPERTS | HEAD | {"num_shared_experts": 1, "num_dense_layers": 1}),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT | {"n_group": 1, "num_experts_per_tok": 3}),
    "lfm2_moe": ("lfm2_moe", CONVOLUTION | EXPERTS | {"num_dense_layers": 1}),
}
TINY = {
    "hidden_size": 8,
    "output_channels": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "mlp_dim": 8,
    "global_attn_indexes": [0],
}
# Decoders of encoder-decoders, alone.
DECODER = {
    "d_model": 36,
    "decoder_layers": 3,
    "encoder_layers": 1,
    "decoder_attention_heads": 6,
    "encoder_attention_heads": 6,
    "decoder_ffn_dim": 44,
    "encoder_ffn_dim": 44,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "pad_token_id": 0,
}
ZOO |= {
    **{name: (name, DECODER) for name in ("bart", "blenderbot-small", "marian", "mvp", "plbart", "trocr")},
    **{name: (name, DECODER) for name in ("bigbird_pegasus", "blenderbot", "mbart", "pegasus")},
    "whisper": ("whisper", DECODER | {"max_target_positions": 64}),
    "emu3": ("emu3_text_model", {"pad_token_id": 0}),
    "granite_swa": ("granite_swa", GRANITE | WINDOW),
    "granitemoe_swa": ("granitemoe_swa", EXPERTS | GRANITE | WINDOW | {"shared_intermediate_size": 24}),
    "hyperclovax": ("hyperclovax", GRANITE),
    "kolibri1": ("kolibri1", EXPERTS | HEAD | WINDOW | {"shared_expert_intermediate_size": 24}),
    "cohere_compass": (
        "cohere_compass_text",
        WINDOW
        | {"logit_scale": 0.4}
        | {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    ),
    "cohere2_moe": (
        "cohere2_moe",
        EXPERTS
        | WINDOW
        | {"logit_scale": 0.4, "num_shared_experts": 1}
        | {"shared_expert_combination_strategy": "sum", "first_k_dense_replace": 1},
    ),
    "gpt-sw3": ("gpt-sw3", GPT | {"n_inner": 44}),
    "flint": ("flint", EXPERTS | HEAD | WINDOW | {"shared_expert_intermediate_size": 24}),
    "aria": ("aria_text", {"moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "deepseek_v32": ("deepseek_v32", LATENT | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}),
    "glm_moe_dsa": ("glm_moe_dsa", LATENT | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}),
    "axk1": ("axk1", LATENT),
    "youtu": ("youtu", LATENT),
    "bitnet": ("bitnet", {}),
    "laguna": (
        "laguna",
        EXPERTS
        | HEAD
        | WINDOW
        | {"shared_expert_intermediate_size": 24, "moe_routed_scaling_factor": 1.7}
        | {"num_attention_heads_per_layer": [6, 4, 6], "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        LATENT | HEAD | WINDOW | {"v_head_dim": 8, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "ctrl": ("ctrl", GPT | {"dff": 44}),
    "lfm3": ("lfm3", CONVOLUTION | WINDOW | HEAD),
}
ZOO |= {
    "dots3_note": (
        "dots3_note_text",
        LATENT
        | {"layer_types": ["full_attention", "full_attention", "full_attention"]}
        | {"shared_experts_intermediate_size": 20, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    ),
    "moshi": ("moshi", {"ffn_dim": 44, "head_dim": 6, "num_codebooks": 2, "pad_token_id": 0}),
    "phi4_multimodal": (
        "phi4_multimodal",
        {
            "pad_token_id": 0,
            "vision_config": TINY,
            "audio_config": {"hidden_size": 8, "intermediate_size": 8, "num_blocks": 1}
            | {"num_attention_heads": 2, "ext_pw_out_channel": 8, "nemo_conv_channels": 8},
        },
    ),
}
MAMBA = {"state_size": 5, "expand": 2, "conv_kernel": 3, "time_step_rank": 4, "use_bias": True}
ZOO |= {
    "mamba": ("mamba", MAMBA),
    "falcon_mamba": ("falcon_mamba", MAMBA),
    "mamba2": ("mamba2", MAMBA | {"num_heads": 8, "head_dim": 9, "n_groups": 2}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 9,
            "n_groups": 2,
            "ssm_state_size": 7,
            "conv_kernel": 3,
            "head_dim": 10,
            "use_bias": True,
            "mlp_bias": True,
            "pad_token_id": 0,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "lru_width": 36,
            "conv1d_width": 3,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 6,
            "head_dim": 10,
            "attention_bias": True,
            "intermediate_size": 44,
            "hidden_activation": "gelu_pytorch_tanh",
            "logits_soft_cap": 5.0,
            "pad_token_id": 0,
        },
    ),
    "jamba": (
        "jamba",
        EXPERTS
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_dt_rank": 4, "pad_token_id": 0},
    ),
}
ZOO |= {
    "minimax": (
        "minimax",
        EXPERTS
        | HEAD
        | {"block_size": 4, "full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.7}
        | {"linear_attn_alpha_factor": 0.8, "linear_attn_beta_factor": 1.2}
        | {"mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.9},
    ),
    **{
        name: (
            f"{name}_text",
            HEAD
            | WINDOW
            | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
            | {"global_head_dim": 12, "num_global_key_value_heads": 3, "attention_k_eq_v": True}
            | {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0, "attention_bias": True},
        )
        for name in ("gemma4", "gemma4_unified")
    },
    "diffllama": ("diffllama", HEAD | {"attention_bias": True, "num_key_value_heads": 2}),
    **{
        name: (
            "falcon_h1",
            {key: value for key, value in MAMBA2.items() if key != "layer_types"}
            | {"head_dim": 6 + 4 * normed, "mamba_d_ssm": 72, "projectors_bias": True, "attention_bias": True}
            | {"mlp_multipliers": [1.7, 0.6], "ssm_multipliers": [0.8, 1.3, 0.7, 1.4, 0.9]}
            | {"attention_in_multiplier": 1.2, "attention_out_multiplier": 0.7, "key_multiplier": 0.8}
            | {"ssm_in_multiplier": 1.1, "ssm_out_multiplier": 0.8, "lm_head_multiplier": 1.5}
            | {"mamba_rms_norm": normed, "mlp_bias": True, "pad_token_id": 0},
        )
        for name, normed in (("falcon_h1", False), ("falcon_h1-normed", True))
    },
    "bailing_hybrid": (
        "bailing_hybrid",
        LATENT
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 6, "head_dim": 8}
        | {"short_conv_kernel_size": 3, "layer_group_size": 2, "first_k_dense_replace": 1},
    ),
}
# Encoders that are configured as decoders.
BERT = {"is_decoder": True, "pad_token_id": 0, "num_key_value_heads": 6, "hidden_act": "gelu"}
TEXT = SMALL | {"pad_token_id": 0}
ZOO |= {
    **{name: (name, BERT) for name in ("bert", "bert-generation", "big_bird", "ernie", "megatron-bert")},
    **{name: (name, BERT) for name in ("roformer", "roberta", "camembert", "data2vec-text")},
    **{name: (name, BERT) for name in ("xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm")},
    "roc_bert": ("roc_bert", BERT | {"pronunciation_vocab_size": 61, "shape_vocab_size": 61}),
    "rembert": ("rembert", BERT | {"output_embedding_size": 36, "input_embedding_size": 20}),
    "electra": ("electra", BERT | {"embedding_size": 36}),
    "git": ("git", BERT | {"vision_config": TINY}),
    "modernbert-decoder": (
        "modernbert-decoder",
        {
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "mlp_bias": True,
            "classifier_bias": True,
            "norm_bias": True,
        },
    ),
    "fuyu": (
        "fuyu",
        {
            "text_config": TEXT | {"model_type": "persimmon", "num_key_value_heads": 6, "hidden_size": 48},
            "patch_size": 2,
        },
    ),
    "got_ocr2": ("got_ocr2", {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": TINY}),
}
ALL = tuple(ZOO)
# Decoders with images around them, which AutoModelForCausalLM builds from the whole's configuration alone.
INSIDE: dict[str, Any] = {"emu3_text_model": Emu3ForCausalLM}


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Returns a tiny random model in evaluation mode, every parameter and learnt buffer randomised.

    Args:
        name: one of `ALL`.
        dtype: of the parameters; a model in float64 computes in float64 throughout.
        seed: of every parameter.
        changes: further settings of the configuration.
    """
    kind, settings = ZOO[name]
    config = AutoConfig.for_model(kind, **(SMALL | settings | changes))
    config._experts_implementation = "eager"  # the grouped kernel takes no float64
    inside = INSIDE.get(kind)
    model = AutoModelForCausalLM.from_config(config) if inside is None else inside(config)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for own, buffer in model.named_buffers():
        if own.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.2, 0.2, generator=generator)
        elif own.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    model.to(dtype=dtype).eval()
    if dtype == torch.float64:
        stay_in_float64(model)
    return model


ACTIVATIONS = tuple(
    {own[0] if isinstance(own, tuple) else own for own in ACT2CLS.values()} | {nn.SiLU, nn.GELU, BloomGelu}
)
PRODUCTS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
HELD = (torch.rsqrt, torch.baddbmm, nn.functional.softplus)
HELD += (torch.softmax, nn.functional.softmax, Tensor.softmax)
SIGMOIDS = (torch.sigmoid, nn.functional.sigmoid, Tensor.sigmoid)


class Frozen(Double):
    """Lets the real model run with its norms, probabilities, routing and activations' slopes held fixed.

    It knows no family: an activation's output is marked, and its factor is held fixed too, or each
    of the two by half.
    """

    def __init__(self, *, half: bool = False) -> None:
        super().__init__()
        self.half = half
        self.before_gate = -1  # how many SiLUs come before that of a gate which is a part of the values' map
        self.slopes: list[Tensor] = []
        self.activated: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if function is nn.functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        if function in (nn.functional.rms_norm, torch.rms_norm):
            scaled = function(*args, **(kwargs or {}))
            return args[0] * (scaled / args[0]).detach()
        if function in PRODUCTS and len(args) == 2:
            first, second = args
            if self._among(second, self.activated):
                first, second = second, first
            if self._among(first, self.activated) and isinstance(second, Tensor):
                if self.half and second.requires_grad:
                    return (function(first, second.detach()) + function(first.detach(), second)) / 2
                return function(first, second.detach())
            result = function(*args)
            if self._among(first, self.slopes) or self._among(second, self.slopes):
                self.activated.append(result)
            return result
        if function is nn.functional.gelu:  # not of a module, as in a head
            z = args[0]
            return z * (super().__torch_function__(function, types, args, kwargs) / z).detach()
        if function is torch.tanh and args[0].requires_grad:  # the same
            z = args[0]
            return z * (super().__torch_function__(function, types, args, kwargs) / z).detach()
        if function is nn.functional.silu:  # not of a module, as after a mixer's convolution
            result = args[0] * torch.sigmoid(args[0].detach())
            if self.before_gate >= 0:
                self.before_gate -= 1
                if self.before_gate < 0:
                    return result.detach()
            if result.requires_grad:
                self.activated.append(result)
            return result
        result = super().__torch_function__(function, types, args, kwargs)
        if function in HELD or (function is torch.pow and isinstance(args[1], float)):  # a norm's scale
            return result.detach()
        if function in SIGMOIDS:
            self.slopes.append(result.detach())
            return self.slopes[-1]
        return result

    def gate_after(self, count: int) -> Any:
        """A hook after which the gate of a mixer without a gated norm has the SiLU after `count` others."""

        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            self.before_gate = count

        return hook

    def activation(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z = inputs[0]
        if not z.requires_grad:  # a gate that is held fixed
            return output.detach()
        self.activated.append(z * (output / z).detach())
        return self.activated[-1]

    @staticmethod
    def _among(given: Any, tensors: list[Tensor]) -> bool:
        return any(given is own for own in tensors)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (own.repeat_interleave(query.shape[1] // own.shape[1], 1) for own in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1).detach() @ value


def _layer_norm(
    states: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    scaled = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def mixer_values(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Which outputs of a linear mixer's input projections are values; all others are held fixed."""
    values = {}
    for module in model.modules():
        kind, parts = type(module).__name__, dict(module.named_children())
        inner: Any = module
        if kind.endswith(("GatedDeltaNet", "DeltaAttention")):
            none = torch.zeros(0, dtype=torch.long)
            held = ("in_proj", "q_proj", "k_proj", "a_proj", "b_proj", "g_", "forget")
            values |= {part: none for name, part in parts.items() if name.startswith(held)}
            if "q_proj" in parts:
                continue
            if "in_proj_qkvz" in parts:
                every = [
                    torch.arange(part.weight.shape[0])[None, None]
                    for part in (inner.in_proj_qkvz, inner.in_proj_ba)
                ]
                values[inner.in_proj_qkvz] = inner.fix_query_key_value_ordering(*every)[2].flatten()
            else:
                values[inner.in_proj_qkv] = torch.arange(2 * inner.key_dim, inner.conv_dim)
        elif kind.endswith("LightningAttention"):
            values[inner.output_gate] = torch.zeros(0, dtype=torch.long)
            values[inner.qkv_proj] = torch.arange(180).view(6, 3, 10)[:, 2].flatten()
        elif "rg_lru" in parts:
            values[inner.linear_y] = torch.zeros(0, dtype=torch.long)
        elif kind.endswith("ShortConv"):
            values[inner.in_proj] = torch.arange(72, 108)
        elif "x_proj" in parts:
            values[inner.in_proj] = torch.arange(inner.intermediate_size)
            values[inner.x_proj] = torch.zeros(0, dtype=torch.long)
        elif "D" in dict(module.named_parameters(recurse=False)):
            values[inner.in_proj] = torch.arange(inner.intermediate_size, 2 * inner.intermediate_size)
    return values


def hold(rows: Tensor) -> Any:
    """A hook that detaches all outputs but some."""

    def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        if not len(rows):
            return output.detach()
        free = torch.zeros(output.shape[-1], dtype=torch.bool)
        free[rows] = True
        return torch.where(free, output, output.detach())

    return hook


def hold_gate(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Detach a gated norm's gate."""
    states, gate = arguments
    return states, gate.detach()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder blocks, found as its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda own: sum(parameter.numel() for parameter in own.parameters())))


def derivatives(
    model: Any,
    ids: Tensor,
    token: int = 0,
    foil: int = 1,
    *,
    half: bool = False,
    position: int = -1,
    read: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, float, float]:
    """The derivative of a real model or classifier under a linear rule, without knowledge of its family.

    Args:
        model: the model.
        ids: a text's token ids.
        token: the token or label.
        foil: the one that it is compared with.
        half: the rule is `half`, not `taylor`.
        position: where both are read, if not for a whole text.
        read: computes the value from the last states `[position, hidden]` of a model without a head.

    Returns:
        Each position's state at the first block times the derivative of the difference of logits by it, the
        same of all biases together, and the difference itself before a soft cap.
    """
    entered: list[Tensor] = []
    unembedded: list[Tensor] = []
    frozen = Frozen(half=half)

    def enter(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        given = arguments[0] if arguments else keywords["hidden_states"]
        entered.append(given.detach().clone().requires_grad_())
        return (entered[0], *arguments[1:]), keywords | ({} if arguments else {"hidden_states": entered[0]})

    def leave(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        unembedded.append(output)

    handles = [
        blocks_of(model)[0].register_forward_pre_hook(enter, with_kwargs=True),
        *(
            head.register_forward_hook(leave)
            for head in [model.get_output_embeddings()]
            if head is not None  # a classifier has none
        ),
        *(
            module.register_forward_hook(frozen.activation)
            for module in model.modules()
            if isinstance(module, ACTIVATIONS)
        ),
        *(module.register_forward_hook(hold(rows)) for module, rows in mixer_values(model).items()),
        *(
            module.register_forward_hook(frozen.gate_after(0))
            for name, module in model.named_modules()
            if name.endswith("x_proj")
        ),
        *(
            module.in_proj.register_forward_hook(frozen.gate_after(1))
            for module in model.modules()
            if hasattr(module, "mup_vector") and isinstance(module.norm, nn.Identity)
        ),
        *(
            module.register_forward_pre_hook(hold_gate)
            for module in model.modules()
            if type(module).__name__.endswith("RMSNormGated")
        ),
    ]
    try:
        with frozen:
            output = model(ids[None], use_cache=False)
            logits = output.last_hidden_state if read else output.logits
            caps = (
                getattr(model.config, cap, None) for cap in ("final_logit_softcapping", "logits_soft_cap")
            )
            if unembedded and any(caps):
                logits = unembedded[0]
            if logits.ndim == 2:  # a classifier's, of its labels
                logits = logits[:, None]
            value = read(logits[0]) if read else logits[0, position, token] - logits[0, position, foil]
    finally:
        for handle in handles:
            handle.remove()
    biases = [
        own
        for name, own in model.named_parameters()
        if name.endswith("bias") and "dt_bias" not in name and own.requires_grad
    ]
    states, *others = torch.autograd.grad(value, [entered[0], *biases], allow_unused=True)
    # Of a mixer's convolution only the values' channels are no part of what is held fixed.
    free = {
        module.conv1d.bias: module.intermediate_size
        for module in model.modules()
        if hasattr(module, "conv1d") and module.conv1d.bias is not None
    }
    constants = [
        float((own * by)[: free.get(own)].sum().detach())
        for own, by in zip(biases, others, strict=True)
        if by is not None
    ]
    return (states * entered[0]).sum(-1)[0].detach(), sum(constants), float(value.detach())
