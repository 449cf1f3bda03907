"""Rotary positions whose frequencies depend on the longest row of a batch.

LongRoPE uses its long factors as soon as one row is longer than the original context. Dynamic NTK computes
frequencies for the longest row and keeps them. Prompts therefore share a batch only where they would get the
same frequencies alone, and a model's frequencies are reset to those of a fresh model before each run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from depass_lightning.errors import DePassError

Regime = tuple[int, ...]


def _settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration, one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


def is_rotary(config: Any) -> bool:
    """Whether a model has rotary positions, which no table limits."""
    return any(_settings(config))


def regime(config: Any, length: int) -> Regime:
    """Name the settings that depend on a prompt; prompts with the same name may be padded to one batch.

    Rotary frequencies depend on the length; the keys that sparse attention selects (DeepSeek's), on padding.

    Args:
        config: the configuration of a model's decoder.
        length: the prompt's number of tokens.
    """
    names = [length] if getattr(config, "index_topk", None) else []
    context = getattr(config, "max_position_embeddings", 0)
    for settings in _settings(config):
        kind = settings.get("rope_type", settings.get("type"))
        if kind == "longrope":
            original = settings.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or context
            names.append(int(length > original))
        elif kind is not None and "dynamic" in kind:
            names.append(length if length > context else 0)
    return tuple(names)


def position_limit(decoder: Any, config: Any, asked: int | None) -> int | None:
    """Return the maximum number of tokens of a prompt; None where nothing limits them.

    Args:
        decoder: the decoder or encoder, with its embeddings.
        config: its configuration.
        asked: the number that the user asked for; None for what the configuration states.

    Raises:
        DePassError: it is no whole number, or there are fewer positions.
    """
    stated: int | None = getattr(config, "max_position_embeddings", None)
    table: Any = getattr(getattr(decoder, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(table, "padding_idx", None)
    if stated is not None and padding is not None:  # RoBERTa numbers positions from the padding's on
        stated -= padding + 1
    if asked is None:
        return stated
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise DePassError(f"max_positions is {asked!r}; it must be a whole number of at least 1")
    if stated is not None and asked > stated and not is_rotary(config):
        raise DePassError(
            f"max_positions is {asked}, but '{config.model_type}' has a table of {stated} positions and none "
            "after them; only models with rotary positions can be asked beyond their context"
        )
    return asked


class Frequencies:
    """The frequencies of a model's rotary modules that change them, saved to be restored."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (
                module,
                dict(vars(module)),
                {name: (tensor, tensor.clone()) for name, tensor in _tensors(module).items()},
            )
            for module in model.modules()
            if _changes(getattr(module, "rope_type", None))
        ]

    def __bool__(self) -> bool:
        return bool(self._saved)

    def reset(self, *_hook: Any) -> None:
        """Reset the frequencies to those of a fresh model; usable as a forward hook."""
        for module, *_ in self._saved:
            for name, original in _tensors(module).items():
                if name.endswith("original_inv_freq"):
                    prefix = name.removesuffix("original_inv_freq")
                    # A copy: LongRoPE writes into it.
                    setattr(module, f"{prefix}inv_freq", original.clone())
                    setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", 0))

    def restore(self) -> None:
        """Restore the saved frequencies."""
        for module, attributes, tensors in self._saved:
            for name in set(vars(module)) - set(attributes):
                delattr(module, name)
            vars(module).update(attributes)
            for name, (tensor, value) in tensors.items():
                setattr(module, name, tensor)
                with torch.no_grad():
                    tensor.copy_(value)


def _changes(kind: Any) -> bool:
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in kinds)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    return plain | dict(module.named_buffers(recurse=False))
