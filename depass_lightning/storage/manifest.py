"""What a run's rows depend on, kept beside them: rows of two different runs must never mix."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.storage.json_files import write_json

NAME = "manifest.json"


class OtherRunError(DePassError):
    """A folder holds the results of another run, which stay as they are."""


@dataclass(frozen=True)
class Manifest:
    """What decides every number of a run.

    Attributes:
        settings: the configuration, less what changes no number (batches, processes, loggers, reports).
        weights: the model's fingerprint.
        task: the fingerprint of the prompts.
        prompts: how many there are.
        versions: of the packages that compute. They decide digits only: they are kept and not compared.
        settings_hash: 16 hexadecimal digits for the settings.
    """

    settings: Mapping[str, Any]
    weights: str
    task: str
    prompts: int
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_hash: str = field(init=False)

    def __post_init__(self) -> None:
        # What JSON makes of it, so that one that was read equals one that was made.
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))
        object.__setattr__(self, "settings_hash", fingerprint(self.settings))

    def differences(self, other: "Manifest") -> list[str]:
        """Say what differs from another run's, a line each: "source.layer was 0 and is 3"."""
        then, now = _flat(self.settings), _flat(other.settings)
        found = [
            f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        ]
        if self.weights != other.weights:
            found.append(f"the model's weights are others ({self.weights} then, {other.weights} now)")
        if self.task != other.task:
            found.append(f"the prompts are others ({self.prompts} then, {other.prompts} now)")
        return found

    def write(self, folder: str | Path) -> Path:
        """Write it into the folder of the rows."""
        return write_json(Path(folder) / NAME, asdict(self))


def read_manifest(folder: str | Path) -> Manifest | None:
    """Read the manifest of a folder of rows; None where there is none.

    Raises:
        OtherRunError: what is there is no manifest.
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
            f"{path} is damaged, or no manifest of a run ({error}); put back the one that was there, or give "
            "another folder (hydra.run.dir=...)"
        ) from error
    return manifest


def keep_manifest(manifest: Manifest, folder: str | Path) -> bool:
    """Say whether a folder's rows can be added to, and write the manifest where it is the first.

    Args:
        manifest: of the run that begins.
        folder: the folder of its rows.

    Returns:
        Whether a run with the same manifest has been there before.

    Raises:
        OtherRunError: there are rows of another run, and the message says what differs, or of one that is not
            known.
    """
    if not any(Path(folder).rglob("*.parquet")):
        manifest.write(folder)
        return False
    before = read_manifest(folder)
    if before is None:
        raise OtherRunError(
            f"{folder} holds results, but no {NAME} to say of which run; put it back, or start with "
            "resume=false to begin in another folder"
        )
    if found := before.differences(manifest):
        raise OtherRunError(
            f"{Path(folder).parent} holds the results of another run: {'; '.join(found)}. Use the earlier "
            "settings to continue it, or resume=false to start over in another folder"
        )
    return True


def fingerprint(content: Any) -> str:
    """Return 16 hexadecimal digits that change with anything in a JSON value."""
    written = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def task_fingerprint(examples: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits that change with any prompt, its answer, its order or its evidence.

    Args:
        examples: `depass_lightning.tasks.Example`s.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


def _flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found
