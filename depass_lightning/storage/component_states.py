"""Component states on disk: one safetensors file per prompt, written atomically."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from depass_lightning.errors import DePassError
from depass_lightning.results.component import Decomposition, from_columns, to_columns
from depass_lightning.utils.atomic_files import write_whole

HEADER = "decomposition"


def write_states(folder: str | Path, states: Mapping[int, Decomposition]) -> dict[int, str]:
    """Write every prompt's components at a layer to `<index>.safetensors`.

    Returns:
        The SHA-256 of each file, by the prompts' indices.
    """
    hashes = {}
    for index, state in states.items():
        # One entry: safetensors writes several in an order that differs between runs.
        known = {"layer": state.layer, "components": to_columns(state.components)}
        header = {HEADER: json.dumps(known, ensure_ascii=False)}
        content = save({"states": state.states.detach().cpu().contiguous()}, header)
        write_whole(state_path(folder, index), content)
        hashes[index] = hashlib.sha256(content).hexdigest()
    return hashes


def state_path(folder: str | Path, index: int) -> Path:
    """Return the file of a prompt's states."""
    return Path(folder) / f"{index}.safetensors"


def read_states(path: str | Path) -> Decomposition:
    """Read one prompt's components.

    Args:
        path: a file that `write_states` wrote.

    Raises:
        DePassError: the file is missing or has no component states.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            known = json.loads(file.metadata()[HEADER])
            components = from_columns(known.get("components", {}))
            return Decomposition(file.get_tensor("states"), components, known["layer"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DePassError(f"{path} has no component states ({error})") from error
