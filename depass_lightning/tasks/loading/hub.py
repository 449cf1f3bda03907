"""Read public data sets by name, and folders that `datasets` saved.

`hub:owner/name` is a data set on the Hugging Face hub, `hub:owner/name:configuration` one of its
configurations; `@split` after either selects a split:
`hub:truthfulqa/truthful_qa:generation@validation`.
"""

import re
from pathlib import Path
from typing import Any

import datasets

from depass_lightning.errors import DePassError

HUB = "hub:"
_NAME = re.compile(r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<configuration>[\w.-]+))?(@(?P<split>[\w.-]+))?")


def hub_rows(address: str) -> list[dict[str, Any]]:
    """Load the rows of a data set from the hub, or from the cache of an earlier load.

    Args:
        address: `hub:owner/name`, with `:configuration` and `@split` if there are several.

    Raises:
        DePassError: the address is invalid, the data set cannot be loaded, or a split must be chosen.
    """
    parts = _NAME.fullmatch(address)
    if parts is None:
        raise DePassError(
            f"{address!r} does not name a data set; write hub:owner/name[:configuration][@split]"
        )
    name, configuration, split = parts["name"], parts["configuration"], parts["split"]
    try:
        loaded = datasets.load_dataset(name, configuration)
    except Exception as error:  # the class depends on huggingface_hub's HTTP client
        raise DePassError(
            f"the data set {name!r} cannot be loaded from the hub ({type(error).__name__}: {error}); without "
            f"network access, download it on another machine, "
            f"datasets.load_dataset({name!r}, {configuration!r}).save_to_disk('folder'), and give path=folder"
        ) from error
    return _split(loaded, split, address)


def saved_rows(folder: Path) -> list[dict[str, Any]]:
    """Load the rows of a data set that was saved by `save_to_disk`.

    Raises:
        DePassError: the folder has no saved data set, or several splits.
    """
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # broken files may raise any error
        raise DePassError(
            f"the folder {folder} has no data set saved by datasets; give one, or a JSON file"
        ) from error
    return _split(loaded, None, str(folder))


def _split(loaded: Any, split: str | None, address: str) -> list[dict[str, Any]]:
    """Return the rows of the requested split, or of the only one."""
    if isinstance(loaded, datasets.Dataset):
        return list(loaded)  # type: ignore[arg-type]
    splits = list(loaded)
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        choose = (
            f"{address.partition('@')[0]}@{splits[0]}"
            if address.startswith(HUB)
            else f"{address}/{splits[0]}"
        )
        wrong = "several splits" if split is None else f"no split {split!r}"
        raise DePassError(f"{address} has {wrong}; there are {', '.join(splits)}: path={choose}")
    return list(loaded[split])
