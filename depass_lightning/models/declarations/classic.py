"""Decoders with attention and MLP in parallel, and older ones."""

from dataclasses import replace
from typing import Any

from depass_lightning.models.declarations.dense import PLAIN
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec

FOUR = MLPSpec(gate="dense_h_to_4h", up=None, down="dense_4h_to_h")
_BEFORE = AttentionSpec(norm="ln_1", module="attn")
CONV = MLPSpec(norm="ln_2", gate="c_fc", up=None, down="c_proj")
FUSED_ATTENTION = AttentionSpec(
    module="self_attention", value="query_key_value", layout="interleaved", output="dense"
)
OPT = FamilySpec(
    ("opt",),
    final_norm="final_layer_norm",
    attention=AttentionSpec(norm="self_attn_layer_norm", output="out_proj"),
    mlp=MLPSpec(module="", norm="final_layer_norm", gate="fc1", up=None, down="fc2"),
    when=lambda config: config.do_layer_norm_before,
)
BLOOM = FamilySpec(
    ("bloom",),
    blocks="h",
    final_norm="ln_f",
    attention=FUSED_ATTENTION,
    mlp=FOUR,
    when=lambda config: not config.apply_residual_connection_post_layernorm,
)


def _is_parallel(config: Any) -> bool:
    return bool(config.use_parallel_residual)


def _falcon(config: Any) -> str:
    """Which of Falcon's three kinds of blocks a configuration has."""
    if config.new_decoder_architecture and getattr(config, "num_ln_in_parallel_attn", None) != 1:
        return "two norms"
    return "one norm" if config.new_decoder_architecture or config.parallel_attn else "sequential"


_GPTJ = FamilySpec(
    ("gptj",),
    blocks="h",
    final_norm="ln_f",
    attention=replace(_BEFORE, output="out_proj"),
    mlp=MLPSpec(norm="ln_1", gate="fc_in", up=None, down="fc_out"),
    parallel=True,
)
_NEOX = FamilySpec(
    ("gpt_neox",),
    final_norm="final_layer_norm",
    attention=replace(FUSED_ATTENTION, module="attention"),
    mlp=FOUR,
    parallel=True,
    when=_is_parallel,
)
_FALCON = FamilySpec(
    ("falcon",),
    blocks="h",
    final_norm="ln_f",
    attention=replace(FUSED_ATTENTION, in_mask="alibi"),
    mlp=FOUR,
    when=lambda config: _falcon(config) == "sequential",
)


CLASSIC: list[FamilySpec] = [
    # Attention and MLP in parallel.
    FamilySpec(
        ("cohere", "cohere2"), mlp=MLPSpec(norm="input_layernorm"), parallel=True, logit_scale="logit_scale"
    ),
    FamilySpec(
        ("cohere_compass_text",),
        mlp=MLPSpec(norm="input_layernorm"),
        parallel=True,
        logit_scale=lambda config: 1.0 if config.logit_scale is None else config.logit_scale,
    ),
    FamilySpec(
        ("cohere2_moe",),
        mlp=MLPSpec(norm="input_layernorm", experts=ExpertsSpec(shared="shared_experts")),
        parallel=True,
        logit_scale="logit_scale",
        when=lambda config: (
            config.num_shared_experts == 0 or config.shared_expert_combination_strategy == "sum"
        ),
    ),
    FamilySpec(
        ("phi",),
        final_norm="final_layernorm",
        attention=AttentionSpec(output="dense"),
        mlp=MLPSpec(norm="input_layernorm", gate="fc1", up=None, down="fc2"),
        parallel=True,
    ),
    _GPTJ,
    replace(
        _GPTJ,
        model_types=("codegen",),
        attention=replace(_GPTJ.attention, value="qkv_proj", layout="quarters"),
    ),
    FamilySpec(("stablelm",), mlp=MLPSpec(norm="input_layernorm"), parallel=True, when=_is_parallel),
    FamilySpec(("stablelm",), when=lambda config: not _is_parallel(config)),
    _NEOX,
    replace(_NEOX, parallel=False, when=lambda config: not _is_parallel(config)),
    _FALCON,
    replace(
        _FALCON,
        mlp=replace(FOUR, norm="input_layernorm"),
        parallel=True,
        when=lambda config: _falcon(config) == "one norm",
    ),
    replace(
        _FALCON,
        attention=replace(_FALCON.attention, norm="ln_attn"),
        mlp=replace(FOUR, norm="ln_mlp"),
        parallel=True,
        when=lambda config: _falcon(config) == "two norms",
    ),
    # Older decoders, attention and MLP in sequence.
    FamilySpec(
        ("gpt2", "gpt_bigcode", "gpt-sw3"),
        blocks="h",
        final_norm="ln_f",
        attention=replace(_BEFORE, value="c_attn", layout="concatenated", output="c_proj"),
        mlp=CONV,
    ),
    FamilySpec(
        ("gpt_neo",),
        blocks="h",
        final_norm="ln_f",
        attention=replace(_BEFORE, module="attn.attention", output="out_proj"),
        mlp=CONV,
    ),
    OPT,
    BLOOM,
    FamilySpec(
        ("mpt",),
        blocks="blocks",
        final_norm="norm_f",
        attention=AttentionSpec(
            module="attn", norm="norm_1", value="Wqkv", layout="concatenated", output="out_proj"
        ),
        mlp=replace(PLAIN, module="ffn", norm="norm_2"),
    ),
    FamilySpec(
        ("persimmon", "fuyu"),
        final_norm="final_layernorm",
        attention=replace(FUSED_ATTENTION, module="self_attn"),
        mlp=FOUR,
    ),
    FamilySpec(
        ("gpt_neox_japanese",),
        final_norm="final_layer_norm",
        attention=replace(FUSED_ATTENTION, module="attention", output_bias="dense_bias"),
        mlp=FOUR,
    ),
    FamilySpec(
        ("ctrl",),
        blocks="h",
        final_norm="layernorm",
        attention=AttentionSpec(module="multi_head_attention", norm="layernorm1", value="Wv", output="dense"),
        mlp=replace(PLAIN, module="ffn", norm="layernorm2", gate="0", down="2"),
    ),
    FamilySpec(
        ("biogpt", "xglm", "blenderbot", "mbart", "pegasus", "whisper"),
        final_norm="layer_norm",
        attention=OPT.attention,
        mlp=OPT.mlp,
    ),
    FamilySpec(("bigbird_pegasus",), final_norm="layernorm_embedding", attention=OPT.attention, mlp=OPT.mlp),
]
