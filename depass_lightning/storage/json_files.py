"""JSON files, written atomically."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from depass_lightning.utils.atomic_files import write_whole


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write one JSON object, indented, with its keys in order."""
    return write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line."""
    return write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_json_lines` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
