"""Writing files so that a reader never meets half of one."""

import os
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path` whole or not at all, and return the path.

    The bytes go to a hidden neighbour first, which then takes the name. Missing folders are made. The file
    gets the permissions that any new file gets (`tempfile` and safetensors' own writer make theirs private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
