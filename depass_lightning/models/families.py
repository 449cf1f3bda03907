"""The decoder families that are supported, one declaration each."""

from depass_lightning.errors import DePassError
from depass_lightning.models.spec import FamilySpec

FAMILIES: tuple[FamilySpec, ...] = (
    # Pre-norm RMSNorm decoders with a gated MLP; Qwen2's biases and Qwen3's head norms need no mention:
    # the former are read from the modules, the latter only act through the attention probabilities.
    FamilySpec(model_types=("llama", "mistral", "qwen2", "qwen3")),
)


def supported_model_types() -> list[str]:
    """List every `config.model_type` that has a declaration."""
    return sorted(name for family in FAMILIES for name in family.model_types)


def family_of(model_type: str) -> FamilySpec:
    """Find the declaration of a model type.

    Args:
        model_type: the model's `config.model_type`.

    Raises:
        DePassError: no family declares this model type.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise DePassError(
        f"model type '{model_type}' is not supported: its residual attention blocks are not declared; "
        f"supported: {', '.join(supported_model_types())}"
    )
