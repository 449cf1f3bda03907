"""The decoder families that are supported, one declaration each."""

from dataclasses import replace
from typing import Any

from torch import nn

from depass_lightning.errors import DePassError
from depass_lightning.models.litgpt import LITGPT
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec, class_name

_PLAIN = MLPSpec(gate="up_proj", up=None)
_FOUR = MLPSpec(gate="dense_h_to_4h", up=None, down="dense_4h_to_h")
_FUSED = MLPSpec(gate="gate_up_proj", up="gate_up_proj")
_BEFORE = AttentionSpec(norm="ln_1", module="attn")
_CONV = MLPSpec(norm="ln_2", gate="c_fc", up=None, down="c_proj")
_FUSED_ATTENTION = AttentionSpec(
    module="self_attention", value="query_key_value", layout="interleaved", output="dense"
)
_SANDWICH = FamilySpec(
    ("gemma2", "gemma3_text", "gemma3"),
    attention=AttentionSpec(post_norm="post_attention_layernorm"),
    mlp=MLPSpec(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
)
_OPT = FamilySpec(
    ("opt",),
    final_norm="final_layer_norm",
    attention=AttentionSpec(norm="self_attn_layer_norm", output="out_proj"),
    mlp=MLPSpec(module="", norm="final_layer_norm", gate="fc1", up=None, down="fc2"),
    when=lambda config: config.do_layer_norm_before,
)
_BLOOM = FamilySpec(
    ("bloom",),
    blocks="h",
    final_norm="ln_f",
    attention=_FUSED_ATTENTION,
    mlp=_FOUR,
    when=lambda config: not config.apply_residual_connection_post_layernorm,
)
_QWEN_HYBRID = FamilySpec(
    ("qwen3_5", "qwen3_5_text"),
    attention=AttentionSpec(gate="q_proj", mixers=(("linear_attn", "gated_delta"),)),
)
_MAMBA2 = AttentionSpec(mixers=(("mamba", "state_space"),))
_GRANITE_MOE = FamilySpec(
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
_LATENT = AttentionSpec(
    value="kv_b_proj", layout="interleaved", latent=("kv_a_proj_with_mqa", "kv_a_layernorm")
)


def _is_parallel(config: Any) -> bool:
    return bool(config.use_parallel_residual)


def _falcon(config: Any) -> str:
    """The kind of Falcon's three kinds of blocks that a configuration has."""
    if config.new_decoder_architecture and getattr(config, "num_ln_in_parallel_attn", None) != 1:
        return "two norms"
    return "one norm" if config.new_decoder_architecture or config.parallel_attn else "sequential"


_NEOX = FamilySpec(
    ("gpt_neox",),
    final_norm="final_layer_norm",
    attention=replace(_FUSED_ATTENTION, module="attention"),
    mlp=_FOUR,
    parallel=True,
    when=_is_parallel,
)
_FALCON = FamilySpec(
    ("falcon",),
    blocks="h",
    final_norm="ln_f",
    attention=replace(_FUSED_ATTENTION, in_mask="alibi"),
    mlp=_FOUR,
    when=lambda config: _falcon(config) == "sequential",
)

FAMILIES: list[FamilySpec] = [
    *LITGPT,
    # Pre-norm decoders with a gated MLP; biases, head norms, windows and layers without rotary positions need
    # no mention: the former are read from the modules, the rest acts only through the probabilities.
    FamilySpec(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "ernie4_5", "helium")),
    FamilySpec(("hunyuan_v1_dense", "seed_oss", "ministral", "ministral3", "cwm")),
    FamilySpec(("internlm3", "iquestcoder")),
    FamilySpec(("vaultgemma",), mlp=MLPSpec(norm="pre_feedforward_layernorm")),
    FamilySpec(("glm",), mlp=_FUSED),
    FamilySpec(("nanochat",), mlp=replace(_PLAIN, gate="fc1", down="fc2")),
    FamilySpec(
        ("minicpm3",),
        attention=_LATENT,
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
    FamilySpec(("arcee", "nemotron", "jais2"), mlp=_PLAIN),
    FamilySpec(
        ("apertus",),
        attention=AttentionSpec(norm="attention_layernorm"),
        mlp=replace(_PLAIN, norm="feedforward_layernorm"),
    ),
    FamilySpec(("starcoder2",), mlp=MLPSpec(gate="c_fc", up=None, down="c_proj")),
    FamilySpec(
        ("phi3",),
        attention=AttentionSpec(value="qkv_proj", layout="concatenated"),
        mlp=_FUSED,
    ),
    # Norms before and after each sublayer.
    _SANDWICH,
    FamilySpec(
        ("glm4",),
        attention=AttentionSpec(post_norm="post_self_attn_layernorm"),
        mlp=replace(_FUSED, post_norm="post_mlp_layernorm"),
    ),
    # Norms after each sublayer only.
    FamilySpec(
        ("olmo2", "olmo3", "exaone4"),
        attention=AttentionSpec(norm=None, post_norm="post_attention_layernorm"),
        mlp=MLPSpec(norm=None, post_norm="post_feedforward_layernorm"),
    ),
    # Attention and MLP in parallel.
    FamilySpec(
        ("cohere", "cohere2"), mlp=MLPSpec(norm="input_layernorm"), parallel=True, logit_scale="logit_scale"
    ),
    FamilySpec(
        ("phi",),
        final_norm="final_layernorm",
        attention=AttentionSpec(output="dense"),
        mlp=MLPSpec(norm="input_layernorm", gate="fc1", up=None, down="fc2"),
        parallel=True,
    ),
    FamilySpec(
        ("gptj",),
        blocks="h",
        final_norm="ln_f",
        attention=replace(_BEFORE, output="out_proj"),
        mlp=MLPSpec(norm="ln_1", gate="fc_in", up=None, down="fc_out"),
        parallel=True,
    ),
    FamilySpec(
        ("codegen",),
        blocks="h",
        final_norm="ln_f",
        attention=replace(_BEFORE, value="qkv_proj", layout="quarters", output="out_proj"),
        mlp=MLPSpec(norm="ln_1", gate="fc_in", up=None, down="fc_out"),
        parallel=True,
    ),
    FamilySpec(("stablelm",), mlp=MLPSpec(norm="input_layernorm"), parallel=True, when=_is_parallel),
    FamilySpec(("stablelm",), when=lambda config: not _is_parallel(config)),
    _NEOX,
    replace(_NEOX, parallel=False, when=lambda config: not _is_parallel(config)),
    _FALCON,
    replace(
        _FALCON,
        mlp=replace(_FOUR, norm="input_layernorm"),
        parallel=True,
        when=lambda config: _falcon(config) == "one norm",
    ),
    replace(
        _FALCON,
        attention=replace(_FALCON.attention, norm="ln_attn"),
        mlp=replace(_FOUR, norm="ln_mlp"),
        parallel=True,
        when=lambda config: _falcon(config) == "two norms",
    ),
    # Older decoders, attention and MLP in sequence.
    FamilySpec(
        ("gpt2", "gpt_bigcode"),
        blocks="h",
        final_norm="ln_f",
        attention=replace(_BEFORE, value="c_attn", layout="concatenated", output="c_proj"),
        mlp=_CONV,
    ),
    FamilySpec(
        ("gpt_neo",),
        blocks="h",
        final_norm="ln_f",
        attention=replace(_BEFORE, module="attn.attention", output="out_proj"),
        mlp=_CONV,
    ),
    _OPT,
    _BLOOM,
    FamilySpec(
        ("mpt",),
        blocks="blocks",
        final_norm="norm_f",
        attention=AttentionSpec(
            module="attn", norm="norm_1", value="Wqkv", layout="concatenated", output="out_proj"
        ),
        mlp=replace(_PLAIN, module="ffn", norm="norm_2"),
    ),
    FamilySpec(
        ("persimmon",),
        final_norm="final_layernorm",
        attention=replace(_FUSED_ATTENTION, module="self_attn"),
        mlp=_FOUR,
    ),
    FamilySpec(
        ("biogpt", "xglm"),
        final_norm="layer_norm",
        attention=_OPT.attention,
        mlp=_OPT.mlp,
    ),
    # Norms on the residual stream itself: of each sum (post-norm), or of what each sublayer adds to.
    replace(
        _OPT,
        final_norm=None,
        final_projection="project_out",
        attention=AttentionSpec(
            norm=None, post_norm="self_attn_layer_norm", output="out_proj", residual="post_norm"
        ),
        mlp=replace(_OPT.mlp, norm=None, post_norm="final_layer_norm", residual="post_norm"),
        when=lambda config: not config.do_layer_norm_before,
    ),
    FamilySpec(
        ("openai-gpt",),
        blocks="h",
        final_norm=None,
        attention=AttentionSpec(
            module="attn",
            norm=None,
            post_norm="ln_1",
            value="c_attn",
            layout="concatenated",
            output="c_proj",
            residual="post_norm",
        ),
        mlp=replace(_CONV, norm=None, post_norm="ln_2", residual="post_norm"),
    ),
    replace(
        _BLOOM,
        attention=replace(_FUSED_ATTENTION, residual="norm"),
        mlp=replace(_FOUR, residual="norm"),
        when=lambda config: config.apply_residual_connection_post_layernorm,
    ),
    # Mixtures of experts, with the routing held fixed.
    FamilySpec(
        ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "minimax_m2", "phimoe", "mellum"),
        mlp=MLPSpec(experts=ExpertsSpec()),
    ),
    FamilySpec(
        ("glm4_moe", "dots1", "exaone_moe", "solar_open", "ernie4_5_moe", "hy_v3"),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_experts")),
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
    FamilySpec(("hunyuan_v1_moe",), mlp=MLPSpec(experts=ExpertsSpec(shared="shared_mlp"))),
    _GRANITE_MOE,
    FamilySpec(
        ("qwen2_moe",),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_expert", shared_gate="shared_expert_gate")),
    ),
    FamilySpec(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        attention=_LATENT,
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_experts")),
    ),
    # Linear mixers in attention's place in some blocks.
    _QWEN_HYBRID,
    replace(
        _QWEN_HYBRID,
        model_types=("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
        mlp=MLPSpec(experts=ExpertsSpec(shared="shared_expert", shared_gate="shared_expert_gate")),
    ),
    FamilySpec(
        ("lfm2", "lfm2_moe"),
        final_norm="embedding_norm",
        attention=AttentionSpec(
            norm="operator_norm", output="out_proj", mixers=(("conv", "short_convolution"),)
        ),
        mlp=MLPSpec(
            module="feed_forward", norm="ffn_norm", gate="w1", up="w3", down="w2", experts=ExpertsSpec()
        ),
    ),
    FamilySpec(
        ("bamba",),
        final_norm="final_layernorm",
        attention=_MAMBA2,
        mlp=MLPSpec(module="feed_forward", norm="pre_ff_layernorm"),
    ),
    replace(
        _GRANITE_MOE,
        model_types=("granitemoehybrid",),
        attention=_MAMBA2,
        when=lambda config: config.num_local_experts > 0,
    ),
    replace(
        _GRANITE_MOE,
        model_types=("granitemoehybrid",),
        attention=_MAMBA2,
        mlp=replace(_GRANITE_MOE.mlp, module="shared_mlp", experts=None),
        when=lambda config: config.num_local_experts == 0,
    ),
]

# Unsupported architectures, by the reason why they cannot be decomposed into attention and MLPs.
REFUSED = {
    "linear attention or a state space, which has no attention probabilities": frozenset(
        {"minimax", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "zamba"}
        | {"zamba2", "rwkv", "recurrent_gemma", "nemotron_h", "kimi_linear", "xlstm"}
    ),
    "an encoder, not a causal decoder": frozenset(
        {"bert", "roberta", "distilbert", "deberta", "deberta-v2", "electra", "albert", "xlm-roberta", "t5"}
        | {"mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper", "m2m_100", "modernbert"}
    ),
}


def register_family(spec: FamilySpec) -> None:
    """Declare a decoder family; it takes precedence over the built-in ones.

    Args:
        spec: the model types that it covers and the names of its parts; checked against each model.
    """
    FAMILIES.insert(0, spec)


def supported_model_types() -> list[str]:
    """List every `config.model_type` that has a declaration."""
    return sorted({name for family in FAMILIES if family.model is None for name in family.names})


def families_of_class(model: nn.Module) -> list[FamilySpec]:
    """Find the declarations of a model's class that is not of transformers, which may be none.

    Args:
        model: any module.
    """
    names = {class_name(kind) for kind in type(model).__mro__}
    config = getattr(model, "config", None)
    of_class = [family for family in FAMILIES if family.model and not names.isdisjoint(family.names)]
    return [family for family in of_class if family.when(config)]


def declared_families(config: Any) -> list[FamilySpec]:
    """Find the declarations that cover a model's configuration, which may be none.

    Args:
        config: the model's configuration.

    Raises:
        DePassError: the architecture is known to be unsupported.
    """
    kind = config.model_type
    for reason, kinds in REFUSED.items():
        if kind in kinds:
            raise DePassError(f"model type '{kind}' is not supported: it is built with {reason}")
    if getattr(config, "is_encoder_decoder", False):
        raise DePassError(f"model type '{kind}' is not supported: it is an encoder and a decoder")
    of_type = [family for family in FAMILIES if kind in family.names]
    covering = [family for family in of_type if family.when(config)]
    if of_type and not covering:
        raise DePassError(
            f"this configuration of model type '{kind}' is covered by none of its declarations; supported: "
            f"{', '.join(supported_model_types())}"
        )
    return covering
