"""Read the weights of a training checkpoint without running any code that the file names."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.folder import fault_of_file
from depass_lightning.models.weights import check_weights

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# The keys under which trainers store the weights.
HOLDERS = ("state_dict", "model_state_dict", "model", "module")
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # torch.compile's wrapper, around the model or around blocks


class _Inert:
    """Stand-in for every class of a checkpoint that is not a tensor; accepts any arguments, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def is_checkpoint(entry: str) -> bool:
    """Whether an entry names a checkpoint file, with or without a part of it."""
    return _parted(entry)[0].suffix in SUFFIXES


def load_checkpoint(model: nn.Module, entry: str | Path) -> None:
    """Load the weights of a checkpoint into a model.

    Args:
        model: a model of the trained architecture; changed in place.
        entry: the path of a Lightning checkpoint, a state dict (`torch.save`) or a safetensors file. Its
            weights may be anywhere in the trained module; where it holds several such models,
            `path#student` names the one whose weights' names begin with `student.`.

    Raises:
        DePassError: there is no such file, it cannot be read safely, it holds no such model or several, or
            weights of other names or sizes; or the model's own weights are offloaded.
    """
    path, part = _parted(str(entry))
    wanted = model.state_dict()
    if any(value.is_meta for value in wanted.values()):  # weights loaded into these would be lost silently
        raise DePassError(
            f"{path} cannot be put into a model whose weights are offloaded or on the meta device; leave "
            "device_map out"
        )
    state = read_weights(path)
    weights = state if part is None else _of_part(path, state, part)
    prefix = _prefix(model, path, weights)
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    tied = _tied(wanted)
    for key in wanted:
        other = next((name for name in tied[key] if name in weights), None)
        if key not in weights and other is not None:
            weights[key] = weights[other]
        elif other is not None and not torch.equal(weights[key], weights[other]):
            raise DePassError(
                f"{path} has a {key} and another {other}, which are one in {type(model).__name__}; save the "
                "trained model with save_pretrained and pass its folder"
            )
    sizes = {
        key: (weights[key].shape, value.shape)
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    }
    # All differ in their first dimension only: tokens were added.
    grown = sizes and all(held[1:] == needed[1:] for held, needed in sizes.values())
    hint = (
        "were tokens added, save the trained model and its tokenizer with save_pretrained and pass the folder"
        if grown
        else "name the model that was trained by model="
    )
    check_weights(
        model,
        str(path),
        missing=[key for key in wanted if key not in weights],
        unexpected=[key for key in weights if key not in wanted],
        sizes=sizes,
        hint=hint,
    )
    model.load_state_dict({key: weights[key] for key in wanted})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's weights by their names, without those of `torch.compile`'s wrappers.

    Raises:
        DePassError: there is no such file, it is truncated, or it holds no weights; the message names
            its content.
    """
    if path.is_dir():
        raise DePassError(
            f"{path} is a folder, as trainings with sharded weights write them; make one file of it "
            "(lightning.pytorch.utilities.consolidate_checkpoint, zero_to_fp32.py), or pass a model's folder"
        )
    if not path.is_file():
        raise DePassError(f"there is no checkpoint at {path}")
    content = _read(path)
    for holder in HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            content = content[holder]
            break
    state = content if isinstance(content, Mapping) else {}
    weights = {
        COMPILED.sub(r"\1", key): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not weights:
        held = f"the keys {', '.join(map(repr, list(state)[:5]))}" if state else f"a {type(content).__name__}"
        if isinstance(content, _Inert):
            held = "a whole pickled object"
        raise DePassError(f"{path} holds {held}, not weights; save the model's state_dict()")
    if any(".lora_" in key for key in weights):
        kind = (
            "a model with an adapter" if any(".base_layer." in key for key in weights) else "an adapter alone"
        )
        raise DePassError(
            f"{path} holds {kind}; save it with peft's save_pretrained and pass that folder, or merge "
            "it first (merge_and_unload)"
        )
    return weights


def _read(path: Path) -> Any:
    """Read a file; everything but tensors, containers and numbers becomes inert."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DePassError(f"{path} {fault_of_file(path) or f'cannot be read ({error})'}") from error
    try:
        names = []
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are not, and need no stand-ins
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        inert: list[Any] = [(_Inert, name) for name in names]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        message = str(error).split("\n")[0]
        fault = fault_of_file(path) or f"cannot be read safely: {message}; save the model's state_dict()"
        raise DePassError(f"{path} {fault}") from error
    except Exception as error:  # zip, pickle and torch raise different ones for a broken file
        fault = fault_of_file(path) or f"is no checkpoint, or cut ({type(error).__name__}); copy it again"
        raise DePassError(f"{path} {fault}") from error


def _parted(entry: str) -> tuple[Path, str | None]:
    """Split an entry into the path of a checkpoint and the part of it, if one is named."""
    name, mark, part = entry.rpartition("#")
    if mark and Path(name).suffix in SUFFIXES:
        return Path(name).expanduser(), part.strip(".")
    return Path(entry).expanduser(), None


def _of_part(path: Path, state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    weights = {key: value for key, value in state.items() if key.startswith(f"{part}.")}
    if not weights:
        parts = sorted({key.split(".")[0] for key in state})
        raise DePassError(f"{path} has no part {part!r}; its weights' names begin with {', '.join(parts)}")
    return weights


def _prefix(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> str:
    """The prefix of a model's weights in a checkpoint; empty where none of them is there."""
    wanted = model.state_dict()
    # A weight of a block: an embedding may be tied or left out.
    probe = list(wanted)[len(wanted) // 2]
    prefixes = [key[: -len(probe)] for key in state if key == probe or key.endswith(f".{probe}")]
    if len(prefixes) < 2:
        return prefixes[0] if prefixes else ""
    named = ", ".join(repr(prefix) for prefix in prefixes)
    raise DePassError(
        f"{path} holds {len(prefixes)} models like {type(model).__name__}, whose weights' names begin with "
        f"{named}; name one: checkpoint='{path.name}#{prefixes[-1].strip('.')}'"
    )


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name all names of the same tensor, such as tied embeddings."""
    same: dict[tuple[int, torch.Size], list[str]] = {}
    for key, value in wanted.items():
        same.setdefault((value.data_ptr(), value.shape), []).append(key)
    return {key: names for names in same.values() for key in names}
