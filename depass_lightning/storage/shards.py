"""Parquet shards: written as a run goes, merged by index when it ends.

Every process writes shards of its own, so no two write one file. A row carries its `index`, its place among
the prompts; the merge sorts by it, so the order of work and the number of processes leave no trace in the
result.
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
GROUP = 2048  # rows that a merged file keeps together
AT_ONCE = 128 * 2**20  # bytes of shards, as they are encoded, that a merge has in memory
WRITTEN: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
UNREADABLE = (OSError, pa.ArrowException)  # what a damaged file raises


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
    with whole_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), temporary, **WRITTEN)
    return Path(path)


def open_shard(path: str | Path) -> pq.ParquetFile:
    """Open a Parquet file whose pages are compared with their checksums as they are read."""
    return pq.ParquetFile(path, page_checksum_verification=True)


def merge_shards(
    shards: Iterable[str | Path],
    to: str | Path,
    *,
    expected: Iterable[int] | None = None,
    without: Collection[int] = (),
) -> int:
    """Merge shards into one file, sorted by index, and return how many rows it has.

    A row that several shards hold (a batch that was done again after an interruption) is kept once. The
    shards are left where they are: whoever made them removes them once this has returned. Memory does not
    grow with their number: a part of the rows is merged at a time.

    Args:
        shards: the Parquet files, all of one schema.
        to: the file to write; it may be one of the shards.
        expected: the indices that must be there.
        without: the indices of rows to leave out.

    Raises:
        DePassError: there are no shards, or rows are missing.
    """
    paths = sorted(Path(shard) for shard in shards)
    if not paths:
        raise DePassError(f"there are no shards to merge into {to}")
    held = {path: read_indices(path) for path in paths}
    indices = sorted({index for own in held.values() for index in own}.difference(without))
    missing = sorted(set(expected or ()) - set(indices))
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DePassError(f"{len(missing)} rows are in no shard: {some}. Run again to attribute them")
    ranges = [(path, min(own), max(own)) for path, own in held.items() if own]
    parts = 1 + sum(map(_encoded, paths)) // AT_ONCE
    # Whole groups, so that the file does not tell how many parts there were.
    step = GROUP * -(-len(indices) // (parts * GROUP)) or GROUP
    schema = pq.read_schema(paths[0])
    with whole_file(to) as temporary, pq.ParquetWriter(temporary, schema, **WRITTEN) as writer:
        for start in range(0, len(indices), step):
            own = indices[start : start + step]
            table = _gathered(ranges, own[0], own[-1])
            if without:
                table = table.filter(pc.field(INDEX).isin(own))
            writer.write_table(table, row_group_size=GROUP)
    return len(indices)


def _gathered(ranges: Sequence[tuple[Path, int, int]], first: int, last: int) -> pa.Table:
    """Return the rows from one index to another, each once, in order."""
    bounds = [(INDEX, ">=", first), (INDEX, "<=", last)]
    tables = [
        # A folder's name, such as "model=tiny", is no column.
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
    own = table[INDEX].combine_chunks()
    # Of equal neighbours the first is kept.
    fresh = pa.concat_arrays([pa.array([True]), pc.not_equal(own[1:], own[:-1])])  # type: ignore[attr-defined]
    return table.filter(fresh).combine_chunks()


def _encoded(path: Path) -> int:
    """How large a file's rows are before they are compressed."""
    metadata = pq.ParquetFile(path).metadata
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def read_indices(path: str | Path) -> list[int]:
    """Return the indices of a file's rows, and read nothing else of it."""
    return open_shard(path).read(columns=[INDEX])[INDEX].to_pylist()


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
    table = pa.concat_tables([open_shard(file).read(columns=names) for file in files])
    return table.sort_by(INDEX).to_pylist()


class RowFile:
    """A merged file's rows, read anew each time that they are gone through, few of them in memory at a time.

    Args:
        path: the Parquet file.
        columns: the columns to read; all where None.
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
        """Return so many rows from the top, or fewer where there are no more."""
        return list(itertools.islice(self, count))
