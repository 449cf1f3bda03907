"""Writing files so that a reader never meets half of one."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a hidden neighbour of `path` to write to, which takes the name once it is on the disk.

    Where writing fails, nothing is left of it. Missing folders are made. The file gets the permissions that
    any new file gets (`tempfile` and safetensors' own writer make theirs private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.half")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a machine that dies may leave the name with nothing behind it
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_halves(folder: str | os.PathLike[str]) -> None:
    """Remove what processes that were killed have left of files that they were writing, in all subfolders."""
    for path in Path(folder).rglob(".*.half"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.half", path.name):
            path.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path` whole or not at all, and return the path."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)
