"""Rows that a study keeps while it runs, so that an interrupted run goes on after the last finished part."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from depass_lightning.errors import DePassError
from depass_lightning.storage import UNREADABLE, check_file, checked_file, write_shard
from depass_lightning.utils.distributed import from_first

log = logging.getLogger(__name__)
Rows = TypeVar("Rows")


def keep_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write one part's rows on the first process, whole and with a checksum."""

    def write() -> None:
        with checked_file(path) as draft:
            write_shard(draft, rows, schema)

    from_first(write)


def kept_rows(path: Path, read: Callable[[Path], Rows]) -> Rows | None:
    """Read what `keep_rows` wrote; None if there is no file, or it is damaged."""

    def read_checked() -> Rows | None:
        if not path.exists():
            return None
        try:
            check_file(path)
            return read(path)
        except (DePassError, *UNREADABLE) as error:
            log.warning("%s; this part is run again", error)
            return None

    return from_first(read_checked)
