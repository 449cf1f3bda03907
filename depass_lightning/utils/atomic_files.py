"""Write files atomically, under names that stay in their folder."""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden temporary path in the same folder, which is renamed to `path` once it is on the disk.

    If writing fails, the temporary file is removed. Missing folders are created. The file gets the
    permissions of any new file (those of `tempfile` and of safetensors' writer are private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.half")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a crash of the machine may leave an empty file
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def rename(path: Path, to: Path) -> None:
    """Rename a file within its folder, and return once the new name is on the disk."""
    path.replace(to)
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot open folders
        folder = os.open(to.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_halves(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of killed processes, in all subfolders."""
    for path in Path(folder).rglob(".*.half"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.half", path.name):
            path.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path` atomically, and return the path."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write one JSON object, indented, with its keys in order."""
    return write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line."""
    return write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_json_lines` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_limited(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a file of limited size.

    Args:
        path: the file.
        limit: the maximum size in bytes.

    Raises:
        DePassError: the file is too large, or not a regular file (reading a pipe may never end).
        OSError: the file is missing or cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise DePassError(f"{path} is not a regular file; give one")
    if size > limit:
        raise DePassError(f"{path} is too large: {size:,} bytes, of at most {limit:,}")
    return path.read_bytes()


def safe_name(name: str) -> str:
    """Return a name as a single, valid component of a path.

    A valid name is not changed. In any other, invalid characters are replaced, the text is cut after 100
    bytes, and eight digits of its hash are appended, so that different names stay different.

    Args:
        name: any text, such as a probe set's name or a model's.
    """
    encoded = name.encode("utf-8", errors="surrogatepass")
    safe = re.sub(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff/\\:*?"<>|]', "-", name).lstrip(". ").rstrip(". ")
    safe = safe.encode()[:100].decode(errors="ignore")
    return safe if safe == name and name else f"{safe}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def safe_path(name: str) -> Path:
    """Return a name with slashes as a relative path, each part through `safe_name`."""
    return Path(*map(safe_name, name.split("/")))
