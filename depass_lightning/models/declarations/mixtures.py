"""Mixtures of experts, with the routing held fixed."""

from dataclasses import replace

from depass_lightning.models.declarations.dense import LATENT
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec

GRANITE_MOE = FamilySpec(
    ("granitemoe", "granitemoeshared"),
    mlp=MLPSpec(
        module="",
        gate="input_linear",
        up="input_linear",
        down="output_linear",
        experts=ExpertsSpec("block_sparse_moe.experts", shared="shared_mlp"),
    ),
    residual_scale="residual_multiplier",
    logit_divisor="logits_scaling",
)
_SHARED = MLPSpec(experts=ExpertsSpec(shared="shared_experts"))


MIXTURES: list[FamilySpec] = [
    FamilySpec(
        ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "minimax_m2", "phimoe", "mellum"),
        mlp=MLPSpec(experts=ExpertsSpec()),
    ),
    FamilySpec(
        ("glm4_moe", "dots1", "exaone_moe", "solar_open", "ernie4_5_moe", "hy_v3", "aria_text"),
        mlp=_SHARED,
    ),
    FamilySpec(
        ("kolibri1",),
        attention=AttentionSpec(post_norm="post_self_attn_layernorm"),
        mlp=replace(_SHARED, post_norm="post_mlp_layernorm"),
    ),
    FamilySpec(
        ("dots3_note", "dots3_note_text"),
        attention=replace(LATENT, gate="g_proj", value_scale="kv_lora_scale"),
        mlp=_SHARED,
    ),
    FamilySpec(
        ("laguna",),
        attention=AttentionSpec(gate="g_proj", gate_activation="softplus"),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_experts", scale="moe_routed_scaling_factor")),
    ),
    FamilySpec(
        ("mimo_v2_flash",),
        attention=AttentionSpec(value_scale="v_scale"),
        mlp=MLPSpec(experts=ExpertsSpec()),
    ),
    FamilySpec(
        ("flex_olmo",),
        attention=AttentionSpec(norm=None, post_norm="post_attention_layernorm"),
        mlp=MLPSpec(norm=None, post_norm="post_feedforward_layernorm", experts=ExpertsSpec()),
    ),
    FamilySpec(
        ("afmoe",),
        attention=AttentionSpec(post_norm="post_attention_layernorm", gate="gate_proj"),
        mlp=MLPSpec(
            norm="pre_mlp_layernorm",
            post_norm="post_mlp_layernorm",
            experts=ExpertsSpec(shared="shared_experts"),
        ),
    ),
    FamilySpec(("flint",), mlp=MLPSpec(experts=ExpertsSpec(shared="shared_expert"))),
    FamilySpec(("hunyuan_v1_moe",), mlp=MLPSpec(experts=ExpertsSpec(shared="shared_mlp"))),
    GRANITE_MOE,
    replace(GRANITE_MOE, model_types=("granitemoe_swa",), attention=AttentionSpec(scaled_heads=True)),
    FamilySpec(
        ("qwen2_moe",),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_expert", shared_gate="shared_expert_gate")),
    ),
    FamilySpec(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        attention=LATENT,
        mlp=_SHARED,
    ),
    FamilySpec(("youtu",), attention=LATENT),
    FamilySpec(
        ("axk1",),
        attention=LATENT,
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_experts", post_norm="post_mlp_layernorm")),
    ),
]
