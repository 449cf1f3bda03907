"""Checksums of finished files, in `SHA256SUMS` next to them; `sha256sum -c SHA256SUMS` checks them, too.

A disk or a copy may flip a bit, and most flipped bits of a Parquet file still decode to a number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from depass_lightning.errors import DePassError
from depass_lightning.utils.atomic_files import file_hash, whole_file, write_whole

SUMS = "SHA256SUMS"


@contextmanager
def checked_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file as `whole_file` does, and record its checksum.

    The new checksum is written before the file gets its name, and the old one is removed afterwards: if the
    process is killed in between, one of the two fits the file.
    """
    with whole_file(path) as temporary:
        yield temporary
        line = (file_hash(temporary), path.name)
        _write(path.parent, [*_read(path.parent), line])
    _write(path.parent, [*(other for other in _read(path.parent) if other[1] != path.name), line])


def check_file(path: Path) -> None:
    """Compare a file with its checksum; a file without one is accepted.

    Raises:
        DePassError: the file is not what was written.
        OSError: the file cannot be read.
    """
    known = {digest for digest, name in _read(path.parent) if name == path.name}
    if known and file_hash(path) not in known:
        raise DePassError(f"{path} is damaged: it is not what was written ({SUMS} in its folder)")


def _read(folder: Path) -> list[tuple[str, str]]:
    """Return the recorded pairs of hash and file name."""
    path = folder / SUMS
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return [(digest, name) for digest, _, name in (line.partition("  ") for line in lines) if name]


def _write(folder: Path, lines: list[tuple[str, str]]) -> None:
    text = "".join(f"{digest}  {name}\n" for digest, name in sorted(set(lines), key=lambda line: line[1]))
    write_whole(folder / SUMS, text.encode())
