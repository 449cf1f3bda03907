"""Decoders with linear mixers in attention's place in some blocks."""

from dataclasses import replace
from typing import Any, Literal

from depass_lightning.models.declarations.dense import LATENT
from depass_lightning.models.declarations.mixtures import GRANITE_MOE
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec

_QWEN_HYBRID = FamilySpec(
    ("qwen3_5", "qwen3_5_text"),
    attention=AttentionSpec(gate="q_proj", mixers=(("linear_attn", "gated_delta"),)),
)
_LFM2 = FamilySpec(
    ("lfm2", "lfm2_moe"),
    final_norm="embedding_norm",
    attention=AttentionSpec(norm="operator_norm", output="out_proj", mixers=(("conv", "short_convolution"),)),
    mlp=MLPSpec(module="feed_forward", norm="ffn_norm", gate="w1", up="w3", down="w2", experts=ExpertsSpec()),
)
_MAMBA2 = AttentionSpec(mixers=(("mamba", "state_space"),))

_MAMBA = FamilySpec(
    ("mamba", "falcon_mamba"),
    final_norm="norm_f",
    attention=AttentionSpec(norm="norm", mixers=(("mixer", "selective_scan"),)),
    mlp=None,
)


def _nemotron(block: Any) -> Literal["attention", "mixer", "mlp"]:
    kinds: dict[str, Literal["attention", "mixer"]] = {
        "full_attention": "attention",
        "linear_attention": "mixer",
    }
    return kinds.get(block.block_type, "mlp")


_OLMO_HYBRID = FamilySpec(("olmo_hybrid",), attention=AttentionSpec(mixers=(("linear_attn", "gated_delta"),)))
# Its attention blocks have norms after each sublayer only, as OLMo 2 has.
_OLMO_ATTENTION = FamilySpec(
    ("olmo_hybrid",),
    attention=AttentionSpec(norm=None, post_norm="post_attention_layernorm"),
    mlp=MLPSpec(norm=None, post_norm="post_feedforward_layernorm"),
)


HYBRIDS: list[FamilySpec] = [
    replace(
        _OLMO_HYBRID,
        by_block=lambda block: _OLMO_HYBRID if hasattr(block, "linear_attn") else _OLMO_ATTENTION,
    ),
    _MAMBA,
    FamilySpec(
        ("recurrent_gemma",),
        final_norm="final_norm",
        attention=AttentionSpec(
            module="temporal_block",
            norm="temporal_pre_norm",
            mixers=(("temporal_block", "gated_recurrence"),),
        ),
        mlp=MLPSpec(module="mlp_block", norm="channel_pre_norm"),
    ),
    replace(
        _MAMBA,
        model_types=("mamba2",),
        attention=AttentionSpec(norm="norm", mixers=(("mixer", "state_space"),)),
    ),
    FamilySpec(
        ("nemotron_h",),
        final_norm="norm_f",
        attention=AttentionSpec(module="mixer", norm="norm", mixers=(("mixer", "state_space"),)),
        mlp=MLPSpec(module="mixer", norm="norm", gate="up_proj", up=None),
        sublayer=_nemotron,
        when=lambda config: "moe" not in config.layers_block_type,
    ),
    FamilySpec(
        ("jamba",),
        final_norm="final_layernorm",
        attention=AttentionSpec(mixers=(("mamba", "selective_scan"),)),
        mlp=MLPSpec(module="feed_forward", norm="pre_ff_layernorm", experts=ExpertsSpec()),
    ),
    _QWEN_HYBRID,
    replace(
        _QWEN_HYBRID,
        model_types=("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_expert", shared_gate="shared_expert_gate")),
    ),
    FamilySpec(
        ("kimi_linear",),
        attention=replace(LATENT, mixers=(("self_attn", "gated_delta"),)),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_experts")),
    ),
    _LFM2,
    replace(
        _LFM2,
        model_types=("lfm3",),
        attention=replace(_LFM2.attention, output="o_proj", gate="g_proj", post_norm="post_operator_norm"),
        mlp=_LFM2.mlp_with(post_norm="post_ffn_norm"),
    ),
    FamilySpec(
        ("bamba",),
        final_norm="final_layernorm",
        attention=_MAMBA2,
        mlp=MLPSpec(module="feed_forward", norm="pre_ff_layernorm"),
    ),
    replace(
        GRANITE_MOE,
        model_types=("granitemoehybrid",),
        attention=_MAMBA2,
        when=lambda config: config.num_local_experts > 0,
    ),
    replace(
        GRANITE_MOE,
        model_types=("granitemoehybrid",),
        attention=_MAMBA2,
        mlp=GRANITE_MOE.mlp_with(module="shared_mlp", experts=None),
        when=lambda config: config.num_local_experts == 0,
    ),
]
