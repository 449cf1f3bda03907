"""Decoders with norms before each sublayer and a dense MLP, most of them gated."""

from dataclasses import replace
from typing import Any

from depass_lightning.models.spec import AttentionSpec, FamilySpec, MLPSpec

PLAIN = MLPSpec(gate="up_proj", up=None)
FUSED = MLPSpec(gate="gate_up_proj", up="gate_up_proj")
_SANDWICH = FamilySpec(
    ("gemma2", "gemma3_text", "gemma3"),
    attention=AttentionSpec(post_norm="post_attention_layernorm"),
    mlp=MLPSpec(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
)
LATENT = AttentionSpec(
    value="kv_b_proj", layout="interleaved", latent=("kv_a_proj_with_mqa", "kv_a_layernorm")
)


def _two_sublayers(config: Any) -> bool:
    """Whether Gemma 4's blocks have no third sublayer and no experts, and share no values."""
    names = ("hidden_size_per_layer_input", "num_kv_shared_layers", "enable_moe_block")
    return not any(getattr(config, name, 0) for name in names)


def _gemma4(block: Any) -> tuple[AttentionSpec, MLPSpec]:
    """Gemma 4's sublayers; in some blocks the keys' projection gives the values too."""
    attention = replace(_SANDWICH.attention, value_norm="v_norm")
    if block.self_attn.v_proj is None:
        attention = replace(attention, value="k_proj")
    return attention, _SANDWICH.mlp_with(residual_weight="layer_scalar", output_weight="layer_scalar")


DENSE: list[FamilySpec] = [
    # Pre-norm decoders with a gated MLP. Biases, head norms, windows and layers without rotary positions are
    # not declared: biases are read from the modules, the rest acts only through the probabilities.
    FamilySpec(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "ernie4_5", "helium")),
    FamilySpec(("hunyuan_v1_dense", "seed_oss", "ministral", "ministral3", "cwm")),
    FamilySpec(("internlm3", "iquestcoder", "emu3", "emu3_text_model", "got_ocr2")),
    FamilySpec(("vaultgemma",), mlp=MLPSpec(norm="pre_feedforward_layernorm")),
    FamilySpec(
        ("moshi",),
        attention=AttentionSpec(value="v_proj.linear", output="o_proj.linear"),
        mlp=MLPSpec(gate="fc1", up="fc1", down="fc2"),
    ),
    FamilySpec(("glm",), mlp=FUSED),
    FamilySpec(("nanochat",), mlp=replace(PLAIN, gate="fc1", down="fc2")),
    FamilySpec(
        ("minicpm3",),
        attention=LATENT,
        residual_scale=lambda config: config.scale_depth / config.num_hidden_layers**0.5,
        logit_divisor="logits_scaling",
    ),
    FamilySpec(
        ("doge",),
        attention=AttentionSpec(residual_weight="input_residual"),
        mlp=MLPSpec(residual_weight="post_attention_residual"),
        when=lambda config: not config.is_moe,
    ),
    FamilySpec(("granite",), residual_scale="residual_multiplier", logit_divisor="logits_scaling"),
    FamilySpec(
        ("granite_swa",),
        attention=AttentionSpec(scaled_heads=True),
        residual_scale="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    FamilySpec(
        ("bitnet",),
        attention=AttentionSpec(inner_norm="attn_sub_norm"),
        mlp=MLPSpec(inner_norm="ffn_sub_norm"),
    ),
    FamilySpec(
        ("hyperclovax",),
        attention=AttentionSpec(post_norm="post_norm1"),
        mlp=MLPSpec(post_norm="post_norm2"),
        residual_scale="residual_multiplier",
        logit_scale="logits_scaling",
    ),
    FamilySpec(("arcee", "nemotron", "jais2"), mlp=PLAIN),
    FamilySpec(
        ("apertus",),
        attention=AttentionSpec(norm="attention_layernorm"),
        mlp=replace(PLAIN, norm="feedforward_layernorm"),
    ),
    FamilySpec(("starcoder2",), mlp=MLPSpec(gate="c_fc", up=None, down="c_proj")),
    FamilySpec(
        ("phi3", "phi4_multimodal"),
        attention=AttentionSpec(value="qkv_proj", layout="concatenated"),
        mlp=FUSED,
    ),
    # Norms before and after each sublayer.
    _SANDWICH,
    FamilySpec(
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        by_block=_gemma4,
        when=_two_sublayers,
    ),
    FamilySpec(
        ("glm4",),
        attention=AttentionSpec(post_norm="post_self_attn_layernorm"),
        mlp=replace(FUSED, post_norm="post_mlp_layernorm"),
    ),
    # Norms after each sublayer only.
    FamilySpec(
        ("olmo2", "olmo3", "exaone4"),
        attention=AttentionSpec(norm=None, post_norm="post_attention_layernorm"),
        mlp=MLPSpec(norm=None, post_norm="post_feedforward_layernorm"),
    ),
]
