"""Decoders with norms on the residual stream itself, and encoders, also those configured as decoders."""

from dataclasses import replace

from depass_lightning.models.declarations.classic import BLOOM, CONV, FOUR, FUSED_ATTENTION, OPT
from depass_lightning.models.declarations.dense import FUSED
from depass_lightning.models.spec import AttentionSpec, FamilySpec, HeadSpec, MLPSpec

_OPT_POST = replace(
    OPT,
    final_norm=None,
    final_projection="project_out",
    attention=AttentionSpec(
        norm=None, post_norm="self_attn_layer_norm", output="out_proj", residual="post_norm"
    ),
    mlp=OPT.mlp_with(norm=None, post_norm="final_layer_norm", residual="post_norm"),
    when=lambda config: not config.do_layer_norm_before,
)
_BERT = FamilySpec(
    ("bert", "ernie", "roc_bert", "roformer"),
    blocks="encoder.layer",
    final_norm=None,
    head=HeadSpec("cls.predictions.transform"),
    attention=AttentionSpec(
        module="attention",
        norm=None,
        post_norm="attention.output.LayerNorm",
        value="self.value",
        output="output.dense",
        weights="self",
        residual="post_norm",
    ),
    mlp=MLPSpec(
        module="",
        norm=None,
        post_norm="output.LayerNorm",
        gate="intermediate.dense",
        up=None,
        down="output.dense",
        residual="post_norm",
    ),
    causal=lambda config: getattr(config, "is_decoder", False),
)
# The same with norms before each sublayer.
_BERT_PRE_NORM = replace(
    _BERT,
    model_types=("megatron-bert",),
    final_norm="encoder.ln",
    attention=replace(_BERT.attention, norm="attention.ln", post_norm=None, residual="none"),
    mlp=_BERT.mlp_with(norm="ln", post_norm=None, residual="none"),
)
_MODERNBERT = FamilySpec(
    ("modernbert-decoder",),
    decoder="model",
    final_norm="final_norm",
    head=HeadSpec("lm_head", norm="norm"),
    attention=AttentionSpec(module="attn", norm="attn_norm", output="Wo"),
    mlp=replace(FUSED, norm="mlp_norm", gate="Wi", up="Wi", down="Wo"),
)
_ROBERTA_HEAD = HeadSpec("lm_head", norm="layer_norm")

POST_NORM: list[FamilySpec] = [
    # Norms on the residual stream itself: of each sum (post-norm), or of what each sublayer adds to.
    _OPT_POST,
    replace(
        _OPT_POST,
        model_types=("bart", "blenderbot-small", "marian", "mvp", "plbart", "trocr"),
        when=lambda _config: True,
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
        mlp=replace(CONV, norm=None, post_norm="ln_2", residual="post_norm"),
    ),
    replace(
        BLOOM,
        attention=replace(FUSED_ATTENTION, residual="norm"),
        mlp=replace(FOUR, residual="norm"),
        when=lambda config: config.apply_residual_connection_post_layernorm,
    ),
    # Encoders, which may be configured as decoders.
    _BERT,
    replace(
        _BERT,
        model_types=("distilbert",),
        blocks="transformer.layer",
        head=HeadSpec("", dense="vocab_transform", norm="vocab_layer_norm", activation="activation"),
        attention=replace(
            _BERT.attention, post_norm="sa_layer_norm", value="v_lin", output="out_lin", weights=None
        ),
        mlp=_BERT.mlp_with(module="ffn", post_norm="output_layer_norm", gate="lin1", down="lin2"),
    ),
    replace(_BERT, model_types=("big_bird",), attention=replace(_BERT.attention, weights=None)),
    replace(_BERT, model_types=("rembert",), head=HeadSpec("cls.predictions")),
    replace(_BERT, model_types=("electra",), head=HeadSpec("generator_predictions")),
    replace(_BERT, model_types=("bert-generation",), head=None),
    replace(
        _BERT,
        model_types=("git",),
        head=None,
        causal=lambda _config: True,
    ),
    replace(
        _BERT,
        model_types=("roberta", "camembert", "data2vec-text", "xlm-roberta"),
        head=_ROBERTA_HEAD,
    ),
    _BERT_PRE_NORM,
    replace(
        _BERT_PRE_NORM,
        model_types=("roberta-prelayernorm",),
        head=_ROBERTA_HEAD,
        final_norm="LayerNorm",
        attention=replace(_BERT_PRE_NORM.attention, norm="attention.LayerNorm"),
        mlp=_BERT_PRE_NORM.mlp_with(norm="intermediate.LayerNorm"),
    ),
    replace(
        _BERT_PRE_NORM,
        model_types=("xlm-roberta-xl",),
        head=_ROBERTA_HEAD,
        final_norm="encoder.LayerNorm",
        attention=replace(_BERT_PRE_NORM.attention, norm="attention.self_attn_layer_norm"),
        mlp=_BERT_PRE_NORM.mlp_with(norm="LayerNorm"),
    ),
    replace(
        _BERT,
        model_types=("deberta-v2",),
        attention=replace(_BERT.attention, value="self.value_proj"),
        causal=lambda _config: False,
    ),
    _MODERNBERT,
    replace(
        _MODERNBERT,
        model_types=("modernbert",),
        head=HeadSpec("head", norm="norm"),
        attention=replace(_MODERNBERT.attention, value="Wqkv", layout="concatenated"),
        causal=lambda _config: False,
    ),
]
