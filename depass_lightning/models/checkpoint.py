"""Weights from a file that a training wrote, read without running any code that the file names."""

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
# Where trainers keep the weights among other things.
HOLDERS = ("state_dict", "model_state_dict", "model", "module")
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # torch.compile's wrapper, around the model or around blocks


class _Inert:
    """Replaces every class of a checkpoint that is no tensor: it takes anything, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def is_checkpoint(entry: str) -> bool:
    """Whether an entry names a checkpoint file, with or without the part of it that is meant.

    Args:
        entry: a path, perhaps with `#` and a prefix.
    """
    return _parted(entry)[0].suffix in SUFFIXES


def load_checkpoint(model: nn.Module, entry: str | Path) -> None:
    """Put the weights of a checkpoint into a model.

    Args:
        model: the model that was trained.
        entry: the path of a Lightning checkpoint, a state dict (`torch.save`) or a safetensors file. Its
            weights may be anywhere in the trained module; where it holds several such models,
            `path#student` names the one whose weights' names begin with `student.`.

    Raises:
        DePassError: there is no such file, it cannot be read safely, it holds no such model or several, or
            weights of other names or sizes; or the model's own weights are offloaded.
    """
    path, part = _parted(str(entry))
    wanted = model.state_dict()
    if any(value.is_meta for value in wanted.values()):  # what is loaded into these is lost without a word
        raise DePassError(
            f"{path} cannot be put into a model whose weights are offloaded or on the meta device; leave "
            "device_map out"
        )
    state = read_weights(path)
    own = state if part is None else _of_part(path, state, part)
    prefix = _prefix(model, path, own)
    own = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    tied = _tied(wanted)
    for key in wanted:
        other = next((name for name in tied[key] if name in own), None)
        if key not in own and other is not None:
            own[key] = own[other]
        elif other is not None and not torch.equal(own[key], own[other]):
            raise DePassError(
                f"{path} has a {key} and another {other}, which are one in {type(model).__name__}; save the "
                "trained model with save_pretrained and pass its folder"
            )
    sizes = {
        key: (own[key].shape, value.shape)
        for key, value in wanted.items()
        if key in own and own[key].shape != value.shape
    }
    # All differ in their first dimension alone: tokens were added.
    grown = sizes and all(there[1:] == here[1:] for there, here in sizes.values())
    hint = (
        "were tokens added, save the trained model and its tokenizer with save_pretrained and pass the folder"
        if grown
        else "name the model that was trained by model="
    )
    check_weights(
        model,
        str(path),
        missing=[key for key in wanted if key not in own],
        unexpected=[key for key in own if key not in wanted],
        sizes=sizes,
        hint=hint,
    )
    model.load_state_dict({key: own[key] for key in wanted})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint's weights by their names, without those of `torch.compile`'s wrappers.

    Args:
        path: the file.

    Raises:
        DePassError: there is no such file, it is cut, or it holds no weights; the error says what it holds.
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
    """A file's content, in which everything but tensors, containers and numbers is inert."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DePassError(f"{path} {fault_of_file(path) or f'cannot be read ({error})'}") from error
    try:
        names = []
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are none, and are read without stand-ins
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        inert: list[Any] = [(_Inert, name) for name in names]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        told = str(error).split("\n")[0]
        fault = fault_of_file(path) or f"cannot be read safely: {told}; save the model's state_dict()"
        raise DePassError(f"{path} {fault}") from error
    except Exception as error:  # zip, pickle and torch each have their own for a broken file
        fault = fault_of_file(path) or f"is no checkpoint, or cut ({type(error).__name__}); copy it again"
        raise DePassError(f"{path} {fault}") from error


def _parted(entry: str) -> tuple[Path, str | None]:
    """The path of a checkpoint, and the part of it that is meant."""
    name, mark, part = entry.rpartition("#")
    if mark and Path(name).suffix in SUFFIXES:
        return Path(name).expanduser(), part.strip(".")
    return Path(entry).expanduser(), None


def _of_part(path: Path, state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    own = {key: value for key, value in state.items() if key.startswith(f"{part}.")}
    if not own:
        parts = sorted({key.split(".")[0] for key in state})
        raise DePassError(f"{path} has no part {part!r}; its weights' names begin with {', '.join(parts)}")
    return own


def _prefix(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> str:
    """What a model's names begin with in a checkpoint; empty where no weight is found."""
    wanted = model.state_dict()
    # A weight of a block: a tied or left-out embedding is no proof of a model.
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
    """For each name those of the same tensor, as of tied embeddings."""
    same: dict[tuple[int, torch.Size], list[str]] = {}
    for key, value in wanted.items():
        same.setdefault((value.data_ptr(), value.shape), []).append(key)
    return {key: own for own in same.values() for key in own}
