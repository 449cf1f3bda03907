"""Find the fault of a model's folder after loading it has failed."""

import json
import zipfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from safetensors import SafetensorError, safe_open

POINTER = b"version https://git-lfs"
INDEX = ".index.json"
ADAPTER = "adapter_config.json"
WEIGHTS = (".safetensors", ".bin")


def fault_of(folder: Path) -> str | None:
    """Describe which file of a model's folder is missing or broken; None where none is."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        return f"the folder {folder} is empty"
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            return (
                f"{folder} holds an adapter, not a model; name the model it was trained on, and pass the "
                "folder as checkpoint= or through peft's PeftModel.from_pretrained"
            )
        return f"there is no config.json in {folder}"
    for path in files:
        if fault := fault_of_file(path):
            return f"{path} {fault}"
    if not any(path.name.endswith((*WEIGHTS, *(suffix + INDEX for suffix in WEIGHTS))) for path in files):
        return f"there are no weights in {folder}: neither model.safetensors nor pytorch_model.bin"
    if not any(path.name.startswith(("tokenizer", "vocab", "spiece", "merges")) for path in files):
        return f"there is no tokenizer in {folder}; save it there with tokenizer.save_pretrained"
    return None


def fault_of_file(path: Path) -> str | None:
    """Describe the fault of one file of a model, as the end of a sentence; None where it has none."""
    with path.open("rb") as file:
        beginning = file.read(len(POINTER))
    if beginning == POINTER:
        return "is a Git LFS pointer, not the file it points to; run `git lfs pull`"
    if path.suffix in (".json", ".gguf", *WEIGHTS) and not beginning:
        return "is empty; copy it again"
    if path.suffix == ".json":
        return _fault_of_json(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return None
        except SafetensorError as error:
            return f"is cut or damaged ({error}); copy it again"
    if path.suffix == ".bin" and not (zipfile.is_zipfile(path) or beginning.startswith(b"\x80")):
        return "is cut or damaged; copy it again"
    if path.suffix == ".gguf":
        try:
            GGUFReader(path)
        except Exception as error:  # numpy's or the reader's, whichever part of the file is missing
            return f"is no GGUF file, or cut ({error}); copy it again"
    return None


def _fault_of_json(path: Path) -> str | None:
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is cut or damaged ({error}); copy it again"
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, not an object with keys"
    if not path.name.endswith(INDEX):
        return None
    parts = content.get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        return "has no weight_map with the file of each weight"
    absent = sorted({name for name in parts.values() if not (path.parent / name).is_file()})
    return f"names {absent[0]}, which is not there" if absent else None
