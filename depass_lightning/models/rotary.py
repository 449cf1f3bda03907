"""Rotary positions whose frequencies depend on how long the longest row of a batch is.

LongRoPE takes its long factors as soon as one row is longer than the original context, dynamic NTK computes
frequencies for the longest row and keeps them. So prompts share a batch only where each alone would get the
same frequencies, and a model's frequencies are those of a fresh model whenever it is run.
"""

from typing import Any

import torch
from torch import Tensor, nn

Regime = tuple[int, ...]


def _settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration, one a kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [own for own in found.values() if isinstance(own, dict)]
    return nested or [found]


def is_rotary(config: Any) -> bool:
    """Whether a model computes its positions by rotation, so that no table ends them.

    Args:
        config: the configuration of a model's decoder.
    """
    return any(own for own in _settings(config))


def regime(config: Any, length: int) -> Regime:
    """Name the frequencies that a model chooses for a prompt alone; equal names mean equal frequencies.

    Args:
        config: the configuration of a model's decoder.
        length: the prompt's tokens.
    """
    found = []
    for own in _settings(config):
        kind, context = own.get("rope_type", own.get("type")), getattr(config, "max_position_embeddings", 0)
        if kind == "longrope":
            original = own.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or context
            found.append(int(length > original))
        elif kind is not None and "dynamic" in kind:
            found.append(length if length > context else 0)
    return tuple(found)


class Frequencies:
    """The frequencies of all rotary modules of a model that change them, as they were found.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found = [
            (module, dict(vars(module)), {name: (own, own.clone()) for name, own in _tensors(module).items()})
            for module in model.modules()
            if _changes(getattr(module, "rope_type", None))
        ]

    def __bool__(self) -> bool:
        return bool(self._found)

    def reset(self, *_hook: Any) -> None:
        """Start as a fresh model does, whatever was run before; usable as a forward hook."""
        for module, *_ in self._found:
            for name, original in _tensors(module).items():
                if name.endswith("original_inv_freq"):
                    prefix = name.removesuffix("original_inv_freq")
                    # A tensor of its own: LongRoPE writes into it.
                    setattr(module, f"{prefix}inv_freq", original.clone())
                    setattr(module, f"{prefix}max_seq_len_cached", getattr(module, "original_max_seq_len", 0))

    def restore(self) -> None:
        """Put everything back as it was found."""
        for module, attributes, tensors in self._found:
            for name in set(vars(module)) - set(attributes):
                delattr(module, name)
            vars(module).update(attributes)
            for name, (own, value) in tensors.items():
                setattr(module, name, own)
                with torch.no_grad():
                    own.copy_(value)


def _changes(kind: Any) -> bool:
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(own, str) and ("dynamic" in own or own == "longrope") for own in kinds)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    plain = {name: own for name, own in vars(module).items() if isinstance(own, Tensor)}
    return plain | dict(module.named_buffers(recurse=False))
