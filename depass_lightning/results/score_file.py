"""The file of an attribution: its scores as a tensor, the rest as JSON in a safetensors header."""

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.utils.atomic_files import write_whole

FORMAT = "depass-attribution-4"  # 1 counted ranks from 0; 2 had names for components; 3 no sections


def write_scores(
    path: str | os.PathLike[str], scores: Float[Tensor, " component"], record: Mapping[str, Any]
) -> None:
    """Write scores and what is known about them, whole or not at all.

    Args:
        path: the file.
        scores: the scores.
        record: everything else; its metadata is the user's.

    Raises:
        DePassError: the metadata holds something that JSON cannot.
    """
    try:
        header = json.dumps(record, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DePassError(f"metadata cannot be JSON: {error}; keep plain values in it") from error
    content = save({"scores": scores.contiguous()}, {"format": FORMAT, "attribution": header})
    write_whole(path, content)


def read_scores(path: str | os.PathLike[str]) -> tuple[Float[Tensor, " component"], dict[str, Any]]:
    """Read the scores and the record that `write_scores` wrote.

    Args:
        path: the file.

    Raises:
        DePassError: the file is no saved attribution, or one of another version's format.
    """
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as opened:
            header = opened.metadata() or {}
            kind = header.get("format", "")
            scores = opened.get_tensor("scores") if kind == FORMAT else None
    except SafetensorError as error:
        raise DePassError(f"{name} is no safetensors file: {error}") from error
    if scores is None and kind.startswith(FORMAT.rstrip("0123456789")):
        raise DePassError(
            f"{name} is in the format {kind} of another version, and this one reads {FORMAT}; attribute "
            "the prompt again"
        )
    if scores is None:
        raise DePassError(f"{name} holds no attribution that Attribution.save wrote")
    return scores, json.loads(header["attribution"])
