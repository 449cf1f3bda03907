"""Decoders with linear mixers in attention's place in some blocks."""

from dataclasses import replace

from depass_lightning.models.declarations.dense import LATENT
from depass_lightning.models.declarations.mixtures import GRANITE_MOE
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec

_QWEN_HYBRID = FamilySpec(
    ("qwen3_5", "qwen3_5_text"),
    attention=AttentionSpec(gate="q_proj", mixers=(("linear_attn", "gated_delta"),)),
)
_KIMI = FamilySpec(
    ("kimi_linear",),
    attention=replace(LATENT, mixers=(("self_attn", "gated_delta"),)),
    mlp=MLPSpec(experts=ExpertsSpec(shared="shared_experts")),
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

_NEMOTRON = AttentionSpec(module="mixer", norm="norm")
_NEMOTRON_BLOCKS = {
    "full_attention": (_NEMOTRON, None),
    "linear_attention": (replace(_NEMOTRON, mixers=(("mixer", "state_space"),)), None),
    "mlp": (None, MLPSpec(module="mixer", norm="norm", gate="up_proj", up=None)),
}
_OLMO_LINEAR = AttentionSpec(mixers=(("linear_attn", "gated_delta"),)), MLPSpec()
# As in OLMo 2, norms after each sublayer only.
_OLMO_FULL = (
    AttentionSpec(norm=None, post_norm="post_attention_layernorm"),
    MLPSpec(norm=None, post_norm="post_feedforward_layernorm"),
)


HYBRIDS: list[FamilySpec] = [
    FamilySpec(
        ("falcon_h1",),
        final_norm="final_layernorm",
        attention=AttentionSpec(mixers=(("", "attention_and_state_space"),)),
        mlp=MLPSpec(
            module="feed_forward",
            norm="pre_ff_layernorm",
            gate_scale="gate_multiplier",
            output_weight="feed_forward.down_multiplier",
        ),
        logit_scale="lm_head_multiplier",
    ),
    FamilySpec(("diffllama",), attention=AttentionSpec(mixers=(("self_attn", "differential_attention"),))),
    FamilySpec(
        ("minimax",),
        attention=AttentionSpec(
            residual="norm",
            residual_weight="attn_alpha_factor",
            output_weight="attn_beta_factor",
            mixers=(("self_attn", "lightning_attention"),),
        ),
        mlp=MLPSpec(
            residual="norm",
            residual_weight="mlp_alpha_factor",
            output_weight="mlp_beta_factor",
            experts=ExpertsSpec(),
        ),
    ),
    FamilySpec(
        ("olmo_hybrid",),
        by_block=lambda block: _OLMO_LINEAR if hasattr(block, "linear_attn") else _OLMO_FULL,
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
        by_block=lambda block: _NEMOTRON_BLOCKS[block.block_type],
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
    _KIMI,
    replace(_KIMI, model_types=("bailing_hybrid",), attention=replace(_KIMI.attention, gate="g_proj")),
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
