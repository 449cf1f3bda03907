"""Check that a file holds exactly the weights that a model needs."""

import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from depass_lightning.errors import DePassError

SHOWN = 3  # the most names in an error
# Constants that earlier versions of transformers saved with the weights: causal masks and rotary frequencies.
CONSTANTS = re.compile(
    r"\b(attn|attention|crossattention)\.(masked_)?bias$|rotary_emb|inv_freq|position_ids$"
)
SECOND_HEAD = re.compile(r"^cls\.seq_relationship\.")  # BERT was pretrained to predict the next sentence, too


def check_weights(
    model: nn.Module,
    holder: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    sizes: Mapping[str, tuple[object, object]] | None = None,
    hint: str = "",
) -> None:
    """Refuse weights that are not the model's: missing ones would be random, others ignored.

    Args:
        model: the model.
        holder: the file or folder that holds the weights, for the error.
        missing: names of the model's weights that the holder lacks.
        unexpected: names of the holder's weights that the model lacks; those outside the model's decoder
            (another head, an image encoder) and saved constants are ignored.
        sizes: by name, the size in the holder and the size in the model, where they differ.
        hint: the fix, for the error.

    Raises:
        DePassError: weights are missing, left over, or of other sizes; the message names them.
    """
    faults = []
    if sizes:
        differing = [
            f"{name} is {_written(held)}, not {_written(needed)}"
            for name, (held, needed) in sorted(sizes.items())
        ]
        faults.append(f"weights of other sizes than the model's: {_some(differing)}")
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
    """Return the names that are inside the model's decoder, without saved constants."""
    # Names of modules, not of weights: a model without blocks has an empty list of them.
    parts = {name for name, _ in model.named_modules()} - {getattr(model, "base_model_prefix", "")}
    ignored = [CONSTANTS, SECOND_HEAD]
    if isinstance(model, PreTrainedModel):
        ignored += [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return sorted(
        name
        for name in names
        if not parts.isdisjoint(_ancestors(name)) and not any(pattern.search(name) for pattern in ignored)
    )


def _ancestors(name: str) -> list[str]:
    """The paths of all modules that contain a weight, without the root."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _written(size: object) -> str:
    return str(list(size)) if isinstance(size, Iterable) else str(size)
