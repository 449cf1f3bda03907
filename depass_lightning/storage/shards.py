"""Parquet shards: written as a run goes, merged by index when it ends.

Every process writes shards of its own, so no two write one file. A row carries its `index`, its place among
the prompts; the merge sorts by it, so the order of work and the number of processes leave no trace in the
result.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from depass_lightning.errors import DePassError
from depass_lightning.files import write_whole

INDEX = "index"


def write_shard(path: str | Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
    """Write rows as one Parquet file, whole or not at all.

    Args:
        path: the file to write; its folder is made where it is missing.
        rows: one mapping a row; a column that a row lacks is empty there.
        schema: the columns and their types. A key that is no column of it is refused.
    """
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise DePassError(f"rows have values for {', '.join(unknown)}, which the schema has no column for")
    return _write(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path)


def merge_shards(
    shards: Iterable[str | Path], to: str | Path, *, expected: Iterable[int] | None = None
) -> int:
    """Merge shards into one file, sorted by index, and return how many rows it has.

    A row that several shards hold (a batch that was done again after an interruption) is kept once. The
    shards are left where they are: whoever made them removes them once this has returned.

    Args:
        shards: the Parquet files, all of one schema.
        to: the file to write.
        expected: the indices that must be there.

    Raises:
        DePassError: there are no shards, or rows are missing.
    """
    paths = sorted(Path(shard) for shard in shards)
    if not paths:
        raise DePassError(f"there are no shards to merge into {to}")
    table = pa.concat_tables([pq.ParquetFile(path).read() for path in paths]).sort_by(INDEX)
    column = table[INDEX].to_pylist()
    first = [i for i, index in enumerate(column) if i == 0 or index != column[i - 1]]
    missing = sorted(set(expected or ()) - set(column))
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DePassError(f"{len(missing)} rows are in no shard: {some}. Run again to attribute them")
    _write(table.take(first).combine_chunks(), to)
    return len(first)


def read_rows(path: str | Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read rows in the order of their index.

    Args:
        path: a Parquet file, or a folder whose Parquet files are read together.
        columns: the columns to read; all where None.

    Raises:
        DePassError: there is nothing to read at `path`.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise DePassError(f"{path} holds no Parquet file; give a run's attributions folder, or a file in it")
    names = None if columns is None else list(dict.fromkeys([INDEX, *columns]))
    table = pa.concat_tables([pq.ParquetFile(file).read(columns=names) for file in files])
    return table.sort_by(INDEX).to_pylist()


def _write(table: pa.Table, path: str | Path) -> Path:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return write_whole(path, buffer.getvalue().to_pybytes())
