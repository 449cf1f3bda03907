"""The decoder families that are supported, and those that are known not to be."""

from typing import Any

from torch import nn

from depass_lightning.errors import DePassError
from depass_lightning.models.declarations.classic import CLASSIC
from depass_lightning.models.declarations.dense import DENSE
from depass_lightning.models.declarations.hybrids import HYBRIDS
from depass_lightning.models.declarations.litgpt import LITGPT
from depass_lightning.models.declarations.mixtures import MIXTURES
from depass_lightning.models.declarations.post_norm import POST_NORM
from depass_lightning.models.spec import FamilySpec, class_name

FAMILIES: list[FamilySpec] = [*LITGPT, *DENSE, *CLASSIC, *POST_NORM, *MIXTURES, *HYBRIDS]

# Unsupported architectures, by what their blocks or inputs have that the decomposed pass does not cover.
REFUSED = {
    "a recurrence that is linear once its gates are frozen, but is not implemented": frozenset({"xlstm"}),
    "MLPs that also read the previous token's state": frozenset({"rwkv"}),
    "a shared transformer that reads the embeddings again and writes only into a mixer's input": frozenset(
        {"zamba", "zamba2"}
    ),
    "several residual streams, which each block mixes by weights that it computes from them": frozenset(
        {"deepseek_v4", "hy_v4", "qwen4_exp", "qwen4_exp_text", "gemma3n", "gemma3n_text", "inkling2_text"}
    ),
    "a third sublayer in its blocks, experts next to an MLP, or values of another block": frozenset(
        {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}
    ),
    "keys and values of another model": frozenset({"gemma4_assistant", "gemma4_unified_assistant"}),
    "two attentions and two MLPs in each block, and experts that write past the second attention": frozenset(
        {"longcat_flash"}
    ),
    "a third sublayer in its blocks, an adapter for each language": frozenset({"xmod"}),
    "blocks that are applied repeatedly, inside an outer recurrence": frozenset({"hrm_text"}),
    "norms with a gate for each dimension, which are more than a scale of each position": frozenset({"axk2"}),
    "a bias that is added to the residual stream itself, past each sublayer": frozenset({"zaya"}),
    "gates of the heads with a bias that no map adds, which is not implemented": frozenset({"beam"}),
    "convolutions after its MLPs, which mix positions": frozenset({"inkling_text"}),
    "query and output maps that a router selects for each position, which is not implemented": frozenset(
        {"jetmoe"}
    ),
    "queries, keys and values that are clamped, and experts of another layout, which is not implemented": (
        frozenset({"dbrx"})
    ),
    "experts whose inputs the router scales, which is not implemented": frozenset({"llama4", "llama4_text"}),
    "a gated MLP without an activation module, whose second factor is clamped": frozenset(
        {"minimax_m3_vl_text"}
    ),
    "bytes that are grouped into patches instead of tokens": frozenset({"blt"}),
    "learned embeddings before the prompt's tokens": frozenset({"cpmant"}),
    "blocks that read another modality by cross-attention and are skipped without it": frozenset(
        {"mllama", "musicgen", "musicgen_melody"}
    ),
    "attention that is not causal, or reads several streams of a prompt": frozenset(
        {"xlnet", "xlm", "prophetnet", "reformer"}
    ),
    "audio input that only its processor prepares": frozenset({"moss_transcribe_diarize"}),
    "an encoder of a kind that is not declared": frozenset(
        {"deberta", "albert", "t5", "mt5", "umt5", "m2m_100"}
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
    """Return the declarations of a model's class, if it is not of transformers; there may be none."""
    names = {class_name(kind) for kind in type(model).__mro__}
    config = getattr(model, "config", None)
    of_class = [family for family in FAMILIES if family.model and not names.isdisjoint(family.names)]
    return [family for family in of_class if family.when(config)]


def declared_families(config: Any) -> list[FamilySpec]:
    """Find the declarations that cover a model's configuration, which may be none.

    Raises:
        DePassError: the architecture is known to be unsupported.
    """
    kind = config.model_type
    for reason, kinds in REFUSED.items():
        if kind in kinds and not any(
            family.when(config) for family in FAMILIES if kind in family.model_types
        ):
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
