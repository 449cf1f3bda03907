"""What a run has done so far: the shards of all its processes, in one folder that all of them see.

Processes speak to each other through the folder alone. No collective is needed while a run goes: none can
time out where one process ends hours before another, and none hangs where one is lost.
"""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.results.decomposition import Decomposition
from depass_lightning.storage.attribution_rows import ATTRIBUTION_SCHEMA
from depass_lightning.storage.checksums import check_file, checked_file
from depass_lightning.storage.component_states import state_path, write_states
from depass_lightning.storage.json_files import read_json_lines, write_json_lines
from depass_lightning.storage.shards import (
    INDEX,
    UNREADABLE,
    merge_shards,
    open_shard,
    read_indices,
    write_shard,
)
from depass_lightning.utils.atomic_files import file_hash, remove_halves, rename

PACKED = 64  # shards of one process that are made one, so that a folder never holds very many
SKIPPED = ".skipped.jsonl"
ENDED = ".ended"
SHARDS = "shards"
DIGITS = 16  # of a shard's hash, in its name


class Journal:
    """The shards of a run in `<folder>/attributions/shards`, and the file that they are merged into.

    A shard's name has its content's hash, and ends with how many prompts it is the result of: so much is
    counted without opening any. Each row has the hash of its prompt's states, and `SHA256SUMS` that of the
    merged file.

    Args:
        folder: the run's folder.
        rows: how many rows a prompt has at most; its first has the index of the prompt times this.
    """

    def __init__(self, folder: str | Path, rows: int = 1) -> None:
        self.folder = Path(folder)
        self.rows = rows
        self._single: list[Path] = []

    @property
    def path(self) -> Path:
        """The file that holds every attribution at the end."""
        return self.folder / "attributions" / "attributions.parquet"

    @property
    def skipped_path(self) -> Path:
        """The file that lists the prompts that were skipped, if there are any."""
        return self.folder / "skipped.jsonl"

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self.path.parent / SHARDS

    @property
    def states(self) -> Path:
        """The folder of components' states, where these are kept."""
        return self.path.parent / "states"

    def skipped(self) -> list[dict[str, Any]]:
        """Return the prompts that were skipped, and why, once the shards are merged."""
        return read_json_lines(self.skipped_path) if self.skipped_path.exists() else []

    def clear(self) -> None:
        """Remove everything, where what is there belongs to no run that is known."""
        for folder in (self.shards, self.states):
            shutil.rmtree(folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)
        self.skipped_path.unlink(missing_ok=True)

    def damaged(self) -> list[Path]:
        """Return the files that are not what was written, and those of states that are missing."""
        tables = [path for path in self._tables() if not _intact(path)]
        return [*tables, *(state_path(self.states, index) for index in self._lost(tables))]

    def tidy(self) -> list[Path]:
        """Remove what an earlier process left half done, what is damaged, and the rows whose states are.

        Prompts that were skipped are not done: they are tried again.

        Returns:
            The files that were damaged or missing.
        """
        damaged = [path for path in self._tables() if not _intact(path)]
        for path in damaged:
            path.unlink()
        if lost := self._lost():
            damaged += [state_path(self.states, index) for index in lost]
            for path in self._tables():
                self._leave_out(path, lost)
        remove_halves(self.path.parent)
        for pattern in (f"*{SKIPPED}", f"*{ENDED}"):
            for path in self.shards.glob(pattern):
                path.unlink()
        self.skipped_path.unlink(missing_ok=True)
        return damaged

    def done(self) -> set[int]:
        """Return the prompts that are attributed, by index."""
        return {index // self.rows for path in self._tables() for index in read_indices(path)}

    def counted(self) -> int:
        """Return how many prompts the shards are the result of, those that were skipped included."""
        if not self.shards.exists():
            return 0
        return sum(_prompts(path) for path in self.shards.iterdir() if not path.name.startswith("."))

    def add(
        self,
        rank: int,
        rows: Sequence[Mapping[str, Any]],
        skipped: Sequence[Mapping[str, Any]],
        prompts: int,
        states: Mapping[int, Decomposition] | None = None,
    ) -> None:
        """Keep what a batch came to.

        Args:
            rank: the process's number.
            rows: rows of `ATTRIBUTION_SCHEMA`.
            skipped: `index`, `id` and `reason` of prompts that could not be attributed.
            prompts: how many prompts both are the result of.
            states: components' states by the prompts' indices. A prompt that is done has its own.

        Raises:
            DePassError: it cannot be written.
        """
        try:
            hashes = write_states(self.states, states or {})
            if skipped:
                self._keep(rank, len(skipped), SKIPPED, lambda draft: write_json_lines(draft, skipped))
            if rows:
                known = [{**row, "states": hashes.get(row[INDEX] // self.rows)} for row in rows]
                path = self._keep(
                    rank,
                    prompts - len(skipped),
                    ".parquet",
                    lambda draft: write_shard(draft, known, ATTRIBUTION_SCHEMA),
                )
                self._single.append(path)
            if len(self._single) == PACKED:
                self._pack(rank)
        except OSError as error:
            raise DePassError(
                f"{self.shards} cannot be written to: {error.strerror or error}. What is done is kept there "
                f"({self.counted():,} prompts); start the same command again once it can"
            ) from error

    def end(self, rank: int) -> None:
        """Note that a process has done its share."""
        self.shards.mkdir(parents=True, exist_ok=True)
        (self.shards / f"rank{rank:04d}-0{ENDED}").touch()

    def ended(self) -> int:
        """Return how many processes have done their share."""
        return len(list(self.shards.glob(f"*{ENDED}")))

    def merge(self, expected: Sequence[int] | None, before: Sequence[Mapping[str, Any]] = ()) -> None:
        """Make one file of the shards of all processes, and one of what they skipped.

        Args:
            expected: the prompts that must be there, or be skipped; not checked where None.
            before: what was skipped before the run; it is listed with the rest.

        Raises:
            DePassError: some are neither, or a shard is damaged.
        """
        for path in self._tables():
            if not _intact(path):
                raise DePassError(
                    f"{path} is damaged: it is not what was written. Start the same command again: what was "
                    "in this file is attributed again, and the rest is kept"
                )
        skipped = [row for path in self.shards.glob(f"*{SKIPPED}") for row in read_json_lines(path)]
        skipped.sort(key=lambda row: row["index"])
        first = None
        if expected is not None:
            first = [i * self.rows for i in sorted(set(expected) - {row["index"] for row in skipped})]
        if self._parquet() or first:
            with checked_file(self.path) as draft:
                merge_shards(self._tables(), draft, expected=first)
        elif not self._tables():
            with checked_file(self.path) as draft:
                write_shard(draft, [], ATTRIBUTION_SCHEMA)
        if everything := [*before, *skipped]:
            write_json_lines(self.skipped_path, everything)
        shutil.rmtree(self.shards, ignore_errors=True)

    def _parquet(self) -> list[Path]:
        return sorted(path for path in self.shards.glob("*.parquet") if not path.name.startswith("."))

    def _tables(self) -> list[Path]:
        """Return all files of rows."""
        return [*self._parquet(), *([self.path] if self.path.exists() else [])]

    def _keep(self, rank: int, prompts: int, ending: str, write: Callable[[Path], Any]) -> Path:
        """Write a shard and name it after its content.

        Args:
            rank: the process's number.
            prompts: how many prompts the shard is the result of.
            ending: of its name.
            write: writes the path that it gets.
        """
        draft = self.shards / f".draft.{uuid.uuid4().hex[:8]}.half"
        write(draft)
        path = self.shards / f"rank{rank:04d}-{file_hash(draft)[:DIGITS]}-{prompts}{ending}"
        rename(draft, path)
        return path

    def _pack(self, rank: int) -> None:
        """Make one shard of this process's single ones."""
        prompts = sum(map(_prompts, self._single))
        self._keep(rank, prompts, ".parquet", lambda draft: merge_shards(self._single, draft))
        for path in self._single:  # a crash before leaves rows twice, which the merge expects
            path.unlink()
        self._single = []

    def _lost(self, without: Sequence[Path] = ()) -> list[int]:
        """Return the indices of rows whose prompt's states are missing or damaged.

        Args:
            without: files of rows that cannot be read.
        """
        lost = set()
        for path in self._tables():
            if path in without or "states" not in open_shard(path).schema_arrow.names:
                continue
            table = open_shard(path).read(columns=[INDEX, "states"])
            for index, digest in zip(*(column.to_pylist() for column in table.columns), strict=True):
                file = state_path(self.states, index // self.rows)
                if digest is not None and not (file.is_file() and file_hash(file) == digest):
                    lost.add(index)
        return sorted(lost)

    def _leave_out(self, path: Path, lost: Sequence[int]) -> None:
        """Write a file of rows again without some of them."""
        indices = set(read_indices(path))
        left = indices.difference(lost)
        if left == indices:
            return
        if path == self.path and left:
            with checked_file(path) as draft:
                merge_shards([path], draft, without=lost)
            return
        if left:
            rank, prompts = int(path.name[4:8]), len({index // self.rows for index in left})
            self._keep(rank, prompts, ".parquet", lambda draft: merge_shards([path], draft, without=lost))
        path.unlink()


def _intact(path: Path) -> bool:
    """Whether a file of rows is what was written: by its name, or by `SHA256SUMS`."""
    try:
        if path.parent.name == SHARDS:
            return path.name.split(".", 1)[0].split("-")[1] == file_hash(path)[:DIGITS]
        check_file(path)
        read_indices(path)  # it may have no checksum
    except (DePassError, *UNREADABLE):
        return False
    return True


def _prompts(path: Path) -> int:
    """How many prompts a file is the result of, by its name."""
    number = path.name.split(".", 1)[0].rpartition("-")[2]
    return int(number) if number.isdigit() else 0
