"""The finished part of a run: the shards of all its processes in one shared folder.

Processes communicate through the folder only. Without collectives, nothing times out if one process
finishes hours before another, and nothing hangs if one is lost.
"""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.results.component import Decomposition
from depass_lightning.storage.attribution_rows import ATTRIBUTION_SCHEMA
from depass_lightning.storage.checksums import check_file, checked_file
from depass_lightning.storage.component_states import state_path, write_states
from depass_lightning.storage.shards import (
    INDEX,
    UNREADABLE,
    merge_shards,
    open_shard,
    read_indices,
    write_shard,
)
from depass_lightning.utils.atomic_files import (
    file_hash,
    read_json_lines,
    remove_halves,
    rename,
    write_json_lines,
)

PACKED = 64  # shards of one process that are packed into one, to keep the number of files small
SKIPPED = ".skipped.jsonl"
ENDED = ".ended"
SHARDS = "shards"
DIGITS = 16  # digits of the hash in a shard's name


class RunStore:
    """The shards of a run in `<folder>/attributions/shards`, and the file that they are merged into.

    A shard's name has the hash of its content and ends with its number of prompts, which can thus be counted
    without opening it. Each row has the hash of its prompt's states, and `SHA256SUMS` has the hash of the
    merged file.

    Args:
        folder: the run's folder.
        rows: the maximum number of rows per prompt; the index of a prompt's first row is the prompt's index
            times this.
    """

    def __init__(self, folder: str | Path, rows: int = 1) -> None:
        self.folder = Path(folder)
        self.rows = rows
        self._single: list[Path] = []

    @property
    def path(self) -> Path:
        """The file of all attributions, written at the end."""
        return self.folder / "attributions" / "attributions.parquet"

    @property
    def skipped_path(self) -> Path:
        """The file that lists skipped prompts; absent if there are none."""
        return self.folder / "skipped.jsonl"

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self.path.parent / SHARDS

    @property
    def states(self) -> Path:
        """The folder of component states, if they are stored."""
        return self.path.parent / "states"

    def skipped(self) -> list[dict[str, Any]]:
        """Return the skipped prompts with their reasons; available once the shards are merged."""
        return read_json_lines(self.skipped_path) if self.skipped_path.exists() else []

    def clear(self) -> None:
        """Remove all results, if they belong to no known run."""
        for folder in (self.shards, self.states):
            shutil.rmtree(folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)
        self.skipped_path.unlink(missing_ok=True)

    def damaged(self) -> list[Path]:
        """Return damaged files, and missing files of states."""
        tables = [path for path in self._tables() if not _intact(path)]
        return [*tables, *self._states_of(self._lost(tables))]

    def tidy(self) -> list[Path]:
        """Remove unfinished and damaged files, and rows whose states are damaged or missing.

        Skipped prompts are tried again.

        Returns:
            The damaged or missing files.
        """
        damaged = [path for path in self._tables() if not _intact(path)]
        for path in damaged:
            path.unlink()
        if lost := self._lost():
            damaged += self._states_of(lost)
            for path in self._tables():
                self._leave_out(path, lost)
        remove_halves(self.path.parent)
        for pattern in (f"*{SKIPPED}", f"*{ENDED}"):
            for path in self.shards.glob(pattern):
                path.unlink()
        self.skipped_path.unlink(missing_ok=True)
        return damaged

    def done(self) -> set[int]:
        """Return the indices of the attributed prompts."""
        return {index // self.rows for path in self._tables() for index in read_indices(path)}

    def counted(self) -> int:
        """Return the number of prompts in the shards, including skipped ones."""
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
        """Store the results of a batch.

        Args:
            rank: the rank of the process.
            rows: rows of `ATTRIBUTION_SCHEMA`.
            skipped: `index`, `id` and `reason` of prompts that could not be attributed.
            prompts: the number of prompts in `rows` and `skipped`.
            states: the component states by the prompts' indices, if they are stored.

        Raises:
            DePassError: the files cannot be written.
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
                f"{self.shards} cannot be written to: {error.strerror or error}. Finished results are kept "
                f"there ({self.counted():,} prompts); start the same command again once it is writable"
            ) from error

    def end(self, rank: int) -> None:
        """Mark a process as finished."""
        self.shards.mkdir(parents=True, exist_ok=True)
        (self.shards / f"rank{rank:04d}-0{ENDED}").touch()

    def ended(self) -> int:
        """Return the number of finished processes."""
        return len(list(self.shards.glob(f"*{ENDED}")))

    def merge(self, expected: Sequence[int] | None, before: Sequence[Mapping[str, Any]] = ()) -> None:
        """Merge the shards of all processes into one file, and list skipped prompts in another.

        Args:
            expected: the indices of prompts that must be attributed or skipped; None skips the check.
            before: prompts skipped before the run; they are listed with the rest.

        Raises:
            DePassError: a prompt is missing, or a shard is damaged.
        """
        for path in self._tables():
            if not _intact(path):
                raise DePassError(
                    f"{path} is damaged: it is not what was written. Start the same command again: the "
                    "prompts of this file are attributed again, and the rest is kept"
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
        """Write a shard and name it after its content."""
        draft = self.shards / f".draft.{uuid.uuid4().hex[:8]}.half"
        write(draft)
        path = self.shards / f"rank{rank:04d}-{file_hash(draft)[:DIGITS]}-{prompts}{ending}"
        rename(draft, path)
        return path

    def _pack(self, rank: int) -> None:
        """Pack this process's shards into one."""
        prompts = sum(map(_prompts, self._single))
        self._keep(rank, prompts, ".parquet", lambda draft: merge_shards(self._single, draft))
        for path in self._single:  # after a crash before this, rows exist twice; the merge keeps one
            path.unlink()
        self._single = []

    def _states_of(self, indices: Sequence[int]) -> list[Path]:
        """Return the files of the states of rows' prompts."""
        return [state_path(self.states, prompt) for prompt in sorted({i // self.rows for i in indices})]

    def _lost(self, without: Sequence[Path] = ()) -> list[int]:
        """Return the indices of rows whose prompt's states are missing or damaged."""
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
        """Rewrite a file without the lost rows."""
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
    """Return whether a file of rows is undamaged, by the hash in its name or in `SHA256SUMS`."""
    try:
        if path.parent.name == SHARDS:
            return path.name.split(".", 1)[0].split("-")[1] == file_hash(path)[:DIGITS]
        check_file(path)
        read_indices(path)  # it may have no checksum
    except (DePassError, *UNREADABLE):
        return False
    return True


def _prompts(path: Path) -> int:
    """Return the number of prompts in a file, from its name."""
    number = path.name.split(".", 1)[0].rpartition("-")[2]
    return int(number) if number.isdigit() else 0
