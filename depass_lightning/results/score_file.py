"""The file of a result: its numbers as tensors, the rest as JSON in a safetensors header."""

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.utils.atomic_files import write_whole

FORMATS = {
    "attribution": "depass-attribution-4",  # 1 counted ranks from 0; 2 had names; 3 no sections
    "circuit": "depass-circuit-1",
}


def write_result(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a result's tensors and what is known about them, whole or not at all.

    Args:
        path: the file.
        kind: of the result, a key of `FORMATS`.
        tensors: its numbers by name.
        record: everything else; its metadata is the user's.

    Raises:
        DePassError: the metadata holds something that JSON cannot.
    """
    try:
        header = json.dumps(record, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DePassError(f"metadata cannot be JSON: {error}; keep plain values in it") from error
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, {"format": FORMATS[kind], kind: header}))


def read_result(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the record that `write_result` wrote.

    Raises:
        DePassError: the file is not a saved result of this kind, or has the format of another version.
    """
    name, expected = os.fspath(path), FORMATS[kind]
    try:
        with safe_open(name, framework="pt") as opened:
            header = opened.metadata() or {}
            written = header.get("format", "")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise DePassError(f"{name} is no safetensors file: {error}") from error
    if written == expected:
        return tensors, json.loads(header[kind])
    if written.startswith(expected.rstrip("0123456789")):
        raise DePassError(
            f"{name} is in the format {written} of another version, and this one reads {expected}; attribute "
            "the prompt again"
        )
    raise DePassError(f"{name} holds no {kind} that {kind.capitalize()}.save wrote")
