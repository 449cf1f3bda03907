"""Parquet shards: written during a run, merged by index at its end.

Each process writes its shards to separate files. A row has an `index`, its place in the task's order; the
merge sorts by it, so the result does not depend on the order of work or the number of processes.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from depass_lightning.errors import DePassError
from depass_lightning.utils.atomic_files import whole_file

INDEX = "index"
ROW_GROUP = 2048  # rows of one row group in a merged file
MERGE_BYTES = 128 * 2**20  # encoded bytes of shards that a merge reads at a time
PARQUET_OPTIONS: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
UNREADABLE = (OSError, pa.ArrowException)  # errors that a damaged file raises


def write_shard(path: str | Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
    """Write rows to a Parquet file, atomically.

    Args:
        path: the file; its folder is created if it is missing.
        rows: one mapping per row; missing columns are null.
        schema: the columns and their types.

    Raises:
        DePassError: a row has a key that is not a column.
    """
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise DePassError(f"rows have values for {', '.join(unknown)}, which the schema has no column for")
    with whole_file(path) as temporary:
        pq.write_table(
            pa.Table.from_pylist([dict(row) for row in rows], schema=schema), temporary, **PARQUET_OPTIONS
        )
    return Path(path)


def open_shard(path: str | Path) -> pq.ParquetFile:
    """Open a Parquet file; pages are compared with their checksums when they are read."""
    return pq.ParquetFile(path, page_checksum_verification=True)


def merge_shards(
    shards: Iterable[str | Path],
    to: str | Path,
    *,
    expected: Iterable[int] | None = None,
    without: Collection[int] = (),
) -> int:
    """Merge shards into one file, sorted by index, and return how many rows it has.

    A row that several shards have (a batch that was repeated after an interruption) is kept once. The shards
    are not removed. Memory does not grow with the number of rows: they are merged in parts.

    Args:
        shards: the Parquet files, all of one schema.
        to: the file to write; it may be one of the shards.
        expected: the indices that must exist.
        without: the indices of rows to leave out.

    Raises:
        DePassError: there are no shards, or rows are missing.
    """
    paths = sorted(Path(shard) for shard in shards)
    if not paths:
        raise DePassError(f"there are no shards to merge into {to}")
    indices_of = {path: read_indices(path) for path in paths}
    indices = sorted(set().union(*indices_of.values()).difference(without))
    missing = sorted(set(expected or ()) - set(indices))
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DePassError(f"{len(missing)} rows are in no shard: {some}. Run again to attribute them")
    ranges = [(path, min(shard), max(shard)) for path, shard in indices_of.items() if shard]
    parts = 1 + sum(map(_encoded, paths)) // MERGE_BYTES
    # Whole row groups, so that the file does not depend on the number of parts.
    step = ROW_GROUP * -(-len(indices) // (parts * ROW_GROUP)) or ROW_GROUP
    schema = pq.read_schema(paths[0])
    with whole_file(to) as temporary, pq.ParquetWriter(temporary, schema, **PARQUET_OPTIONS) as writer:
        for start in range(0, len(indices), step):
            part = indices[start : start + step]
            table = _gathered(ranges, part[0], part[-1])
            if without:
                table = table.filter(pc.field(INDEX).isin(part))
            writer.write_table(table, row_group_size=ROW_GROUP)
    return len(indices)


def _gathered(ranges: Sequence[tuple[Path, int, int]], first: int, last: int) -> pa.Table:
    """Return the rows from index `first` to `last`, in order and without duplicates."""
    bounds = [(INDEX, ">=", first), (INDEX, "<=", last)]
    tables = [
        # Without partitioning: a folder's name, such as "model=tiny", is not a column.
        pq.read_table(
            path,
            filters=bounds,  # type: ignore[arg-type]
            partitioning=None,  # type: ignore[arg-type]
            page_checksum_verification=True,
        )
        for path, lowest, highest in ranges
        if lowest <= last and highest >= first
    ]
    table = pa.concat_tables(tables).sort_by(INDEX)
    index = table[INDEX].combine_chunks()
    # Of rows with equal indices, keep the first.
    fresh = pa.concat_arrays([pa.array([True]), pc.not_equal(index[1:], index[:-1])])  # type: ignore[attr-defined]
    return table.filter(fresh).combine_chunks()


def _encoded(path: Path) -> int:
    """Return the size of a file's rows before compression, in bytes."""
    metadata = pq.ParquetFile(path).metadata
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def read_indices(path: str | Path) -> list[int]:
    """Read the indices of a file's rows, and no other column."""
    return open_shard(path).read(columns=[INDEX])[INDEX].to_pylist()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read rows in the order of their index.

    Args:
        path: a Parquet file, or a folder of Parquet files.

    Raises:
        DePassError: there is no Parquet file at `path`.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise DePassError(f"{path} holds no Parquet file; give a run's attributions folder, or a file in it")
    table = pa.concat_tables([open_shard(file).read() for file in files])
    return table.sort_by(INDEX).to_pylist()


class RowFile:
    """The rows of a merged file; every iteration reads the file in batches.

    Args:
        path: the Parquet file.
        columns: the columns to read; None reads all.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.columns = columns

    def __len__(self) -> int:
        return pq.ParquetFile(self.path).metadata.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in open_shard(self.path).iter_batches(batch_size=64, columns=self.columns):
            yield from batch.to_pylist()

    def first(self, count: int) -> list[dict[str, Any]]:
        """Return the first `count` rows, or all if there are fewer."""
        return list(itertools.islice(self, count))
