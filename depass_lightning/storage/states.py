"""Components' states on disk: one safetensors file a prompt, whole or absent."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from depass_lightning.errors import DePassError
from depass_lightning.files import write_whole
from depass_lightning.passes import Decomposition


def write_states(folder: str | Path, states: Mapping[int, Decomposition]) -> None:
    """Write every prompt's components at a layer, as `<index>.safetensors`.

    Args:
        folder: where to write; it is made where it is missing.
        states: by the prompts' indices.
    """
    for index, own in states.items():
        header = {"names": json.dumps(own.names, ensure_ascii=False), "layer": str(own.layer)}
        content = save({"states": own.states.detach().cpu().contiguous()}, header)
        write_whole(Path(folder) / f"{index}.safetensors", content)


def read_states(path: str | Path) -> Decomposition:
    """Read one prompt's components.

    Args:
        path: a file that `write_states` wrote.

    Raises:
        DePassError: there is no such file, or it is another one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            return Decomposition(file.get_tensor("states"), json.loads(header["names"]), int(header["layer"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DePassError(f"{path} holds no components' states ({error})") from error
