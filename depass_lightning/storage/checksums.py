"""Checksums of finished files, next to them in `SHA256SUMS`, which `sha256sum -c SHA256SUMS` reads too.

A disk or a copy may change a bit, and most changed bits of a Parquet file still decode to some number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from depass_lightning.errors import DePassError
from depass_lightning.utils.atomic_files import file_hash, whole_file, write_whole

SUMS = "SHA256SUMS"


@contextmanager
def checked_file(path: Path) -> Iterator[Path]:
    """Give a file to write to, as `whole_file` does, and keep its checksum.

    The new checksum is written before the file takes its name, and the old one is removed afterwards: a
    process that is killed in between leaves a file that one of the two fits.
    """
    with whole_file(path) as temporary:
        yield temporary
        line = (file_hash(temporary), path.name)
        _write(path.parent, [*_read(path.parent), line])
    _write(path.parent, [*(other for other in _read(path.parent) if other[1] != path.name), line])


def check_file(path: Path) -> None:
    """Compare a file with its checksum; a file that has none is taken as it is.

    Raises:
        DePassError: the file is not what was written.
        OSError: it cannot be read.
    """
    known = {digest for digest, name in _read(path.parent) if name == path.name}
    if known and file_hash(path) not in known:
        raise DePassError(f"{path} is damaged: it is not what was written ({SUMS} in its folder)")


def _read(folder: Path) -> list[tuple[str, str]]:
    """Return hashes and names."""
    path = folder / SUMS
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return [(digest, name) for digest, _, name in (line.partition("  ") for line in lines) if name]


def _write(folder: Path, lines: list[tuple[str, str]]) -> None:
    text = "".join(f"{digest}  {name}\n" for digest, name in sorted(set(lines), key=lambda line: line[1]))
    write_whole(folder / SUMS, text.encode())
