"""Subspaces whose directions are kept in a file."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from depass_lightning.errors import DePassError
from depass_lightning.sources.subspaces import Subspace, directions_of


def load_subspace(path: str | os.PathLike[str], layer: int) -> Subspace:
    """Read the subspaces that a source splits a state into.

    Args:
        path: a `.safetensors` file, each of whose tensors spans a subspace of the tensor's name; or a `.npy`
            file with one array, whose subspace is called like the file. Each is a direction `[hidden]` or a
            matrix of them `[direction hidden]`.
        layer: the block whose input is split; negative counts from the end.

    Raises:
        DePassError: there is no such file, or it holds no directions.
    """
    path = Path(path)
    if not path.is_file():
        raise DePassError(f"there is no file {path} of directions")
    if path.suffix not in (".safetensors", ".npy"):
        raise DePassError(
            f"{path.name} is neither a .safetensors nor a .npy file; save the directions as one"
        )
    try:
        if path.suffix == ".npy":
            tensors = {path.stem: torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            tensors = load_file(path)
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise DePassError(f"{path.name} cannot be read: {error}") from error
    if not tensors:
        raise DePassError(f"{path.name} holds no directions")
    bases = []
    for name, tensor in tensors.items():
        try:
            bases.append(directions_of(tensor))
        except DePassError as error:
            raise DePassError(f"{path.name}, {name!r}: {error}") from error
    return Subspace(layer, bases, names=list(tensors))
