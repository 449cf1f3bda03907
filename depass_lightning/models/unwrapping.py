"""The model itself, inside what compiles it or adds adapters to it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from depass_lightning.errors import DePassError


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside of what compiles a model or adds adapters to it.

    Raises:
        DePassError: its adapters are no linear maps.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):  # peft: the layers with adapters are in the model's own places
        _check_adapter(inner)
        inner = inner.get_base_model()
    return getattr(inner, "_orig_mod", inner)


def original(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, inside what compiles it or adds adapters to it.

    Raises:
        DePassError: it is none, or its adapters are no linear maps.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise DePassError(
            f"{type(inner).__name__} is not a Hugging Face causal language model; pass the model itself, for "
            "instance AutoModelForCausalLM.from_pretrained(...), or declare the class with "
            "depass_lightning.register_family (docs/your-own-model.md)"
        )
    return inner


def check_values(model: nn.Module) -> None:
    """Refuse a model without values; those that `accelerate` fetches when they are needed are there.

    Raises:
        DePassError: a parameter is on the meta device.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    empty = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if empty is not None:
        raise DePassError(
            f"'{empty}' of {type(model).__name__} is on the meta device, where it has no values; load the "
            "model's weights (from_pretrained), or fill it by model.to_empty(device=...) and load_state_dict"
        )


def _check_adapter(model: Any) -> None:
    """Refuse adapters that are no linear maps of every position alike."""
    adapter = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(adapter, "peft_type", None), "value", "this adapter"))
    if getattr(adapter, "is_prompt_learning", False):
        raise DePassError(
            f"{kind} puts learnt states before or into every prompt, which are no tokens that could be "
            "explained; pass model.get_base_model() to explain the model without them"
        )
    if getattr(adapter, "alora_invocation_tokens", None):
        raise DePassError(
            f"{kind} with alora_invocation_tokens changes the model's maps from one position on; load it "
            "without them to explain it"
        )
