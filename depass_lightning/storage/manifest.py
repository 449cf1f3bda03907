"""The manifest of a run's rows: what they depend on, so that rows of different runs never mix."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depass_lightning.errors import DePassError
from depass_lightning.utils.atomic_files import write_json

NAME = "manifest.json"


class OtherRunError(DePassError):
    """A folder has the results of another run, which are not changed."""


@dataclass(frozen=True)
class Manifest:
    """Everything that determines the numbers of a run.

    Attributes:
        settings: the configuration, without what changes no number (batches, processes, loggers, reports).
        weights: the model's fingerprint.
        task: the fingerprint of the prompts.
        prompts: the number of prompts.
        versions: the versions of the packages that compute; recorded but not compared, since they affect
            only rounding.
        settings_hash: 16 hexadecimal digits that identify the settings.
    """

    settings: Mapping[str, Any]
    weights: str
    task: str
    prompts: int
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_hash: str = field(init=False)

    def __post_init__(self) -> None:
        # Through JSON, so that a manifest that was read equals the one that was written.
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))
        object.__setattr__(self, "settings_hash", fingerprint(self.settings))

    def differences(self, other: "Manifest") -> list[str]:
        """Describe the differences from another run, one line each: "source.layer was 0 and is 3"."""
        then, now = _flat(self.settings), _flat(other.settings)
        differences = [
            f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        ]
        if self.weights != other.weights:
            differences.append(f"the model's weights differ ({self.weights} then, {other.weights} now)")
        if self.task != other.task:
            differences.append(f"the prompts differ ({self.prompts} then, {other.prompts} now)")
        return differences

    def write(self, folder: str | Path) -> Path:
        """Write the manifest into the folder of the rows."""
        return write_json(Path(folder) / NAME, asdict(self))


def read_manifest(folder: str | Path) -> Manifest | None:
    """Read the manifest of a folder of rows; None if there is none.

    Raises:
        OtherRunError: the file is not a manifest.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content.pop("settings_hash")
        manifest = Manifest(**content)
        if manifest.settings_hash != written:
            raise ValueError("the settings do not fit their hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OtherRunError(
            f"{path} is damaged, or is not the manifest of a run ({error}); restore the original, or give "
            "another folder (hydra.run.dir=...)"
        ) from error
    return manifest


def keep_manifest(manifest: Manifest, folder: str | Path) -> bool:
    """Check that a run may add rows to a folder, and write its manifest if the folder has no rows.

    Returns:
        Whether the folder has rows of the same run.

    Raises:
        OtherRunError: the folder has rows of another run (the message names the differences) or of an unknown
            one.
    """
    if not any(Path(folder).rglob("*.parquet")):
        manifest.write(folder)
        return False
    before = read_manifest(folder)
    if before is None:
        raise OtherRunError(
            f"{folder} has results, but no {NAME} to identify their run; restore it, or start with "
            "resume=false to use another folder"
        )
    if differences := before.differences(manifest):
        raise OtherRunError(
            f"{Path(folder).parent} holds the results of another run: {'; '.join(differences)}. Use the "
            "earlier settings to continue it, or resume=false to start over in another folder"
        )
    return True


def fingerprint(content: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value."""
    written = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on the name, shape, type and value of every weight.

    Parameters and stored buffers are hashed (SHA-256) in the order of their names, one tensor on the CPU at
    a time. The device does not matter; the floating-point type does, since it changes what the model
    computes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # a quantised layer's extra state
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def task_fingerprint(examples: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits that identify a task's prompts, answers and evidence, and their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


def _flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat
