"""Which weights a model needs, and whether a file holds just these."""

import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from depass_lightning.errors import DePassError

SHOWN = 3  # names in an error
# Constants that earlier versions of transformers saved with the weights: causal masks and rotary frequencies.
CONSTANTS = re.compile(
    r"\b(attn|attention|crossattention)\.(masked_)?bias$|rotary_emb|inv_freq|position_ids$"
)


def check_weights(
    model: nn.Module,
    holder: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    sizes: Mapping[str, tuple[object, object]] | None = None,
    hint: str = "",
) -> None:
    """Refuse weights that are not the model's: what is missing would be random, what is left over ignored.

    Args:
        model: the model.
        holder: the file or folder that holds the weights, for the error.
        missing: names of the model's weights that it lacks.
        unexpected: names of weights that it has and the model lacks; those outside of the model's decoder
            (another head, an image encoder) and saved constants are ignored.
        sizes: the size there and the size in the model, by name, where they differ.
        hint: what to do.

    Raises:
        DePassError: naming the weights.
    """
    faults = []
    if sizes:
        told = [
            f"{name} is {_written(there)}, not {_written(here)}"
            for name, (there, here) in sorted(sizes.items())
        ]
        faults.append(f"weights of other sizes than the model's: {_some(told)}")
    if lacking := sorted(missing):
        faults.append(f"no {_some(lacking)}")
    if extra := inside(model, unexpected):
        faults.append(f"weights that the model does not have: {_some(extra)}")
    if faults:
        raise DePassError(
            f"{holder} does not hold the weights of {type(model).__name__}: it has {'; it has '.join(faults)}"
            + (f"; {hint}" if hint else "")
        )


def inside(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names that lie inside a part of the model's decoder, saved constants left out.

    Args:
        model: the model.
        names: names of weights that the model does not have.
    """
    # Of modules, not of weights: a model that is declared without blocks has an empty list of them.
    parts = {name for name, _ in model.named_modules()} - {getattr(model, "base_model_prefix", "")}
    ignored = [CONSTANTS]
    if isinstance(model, PreTrainedModel):
        ignored += [re.compile(own) for own in model._keys_to_ignore_on_load_unexpected or ()]
    return sorted(
        name
        for name in names
        if not parts.isdisjoint(_ancestors(name)) and not any(own.search(name) for own in ignored)
    )


def _ancestors(name: str) -> list[str]:
    """The paths of all modules that a weight is in, the root left out."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _written(size: object) -> str:
    return str(list(size)) if isinstance(size, Iterable) else str(size)
