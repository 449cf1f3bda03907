"""LitGPT's `GPT` (github.com/Lightning-AI/litgpt, `litgpt/model.py`), in all configurations without experts.

Its configuration determines whether attention and MLP are parallel, whether they share a norm, and whether
the MLP is gated. Norms that a configuration omits are identities.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from depass_lightning.models.spec import AttentionSpec, FamilySpec, MLPSpec, ModelSpec

_MODEL = ModelSpec(
    embedding="transformer.wte",
    unembedding="lm_head",
    heads=lambda model: model.config.n_head,
    positions=lambda model: model.max_seq_length,
    soft_cap=lambda model: getattr(model.config, "final_logit_softcapping", None),
)
_ATTENTION = AttentionSpec(
    module="attn",
    norm="norm_1",
    post_norm="post_attention_norm",
    value="qkv",
    layout="concatenated",
    output="proj",
)
_GATED = MLPSpec(norm="norm_2", post_norm="post_mlp_norm", gate="fc_1", up="fc_2", down="proj")
_PLAIN = replace(_GATED, gate="fc", up=None)
_ORDERS = ((False, False), (True, False), (True, True))  # parallel; with one norm


def _covers(gated: bool, order: tuple[bool, bool]) -> Callable[[Any], bool]:
    def covers(config: Any) -> bool:
        gates = {"GptNeoxMLP": False, "LLaMAMLP": True, "GemmaMLP": True}
        chosen = bool(config.parallel_residual), bool(config.shared_attention_norm)
        return gates.get(config.mlp_class_name) is gated and chosen == order

    return covers


LITGPT = [
    FamilySpec(
        ("litgpt.model.GPT",),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention=_ATTENTION,
        mlp=replace(_GATED if gated else _PLAIN, norm="norm_1" if order[1] else "norm_2"),
        parallel=order[0],
        when=_covers(gated, order),
        model=_MODEL,
    )
    for gated, order in product((False, True), _ORDERS)
]
