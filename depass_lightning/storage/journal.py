"""What a run has done so far: the shards of all its processes, in one folder that all of them see.

Processes speak to each other through the folder alone. No collective is needed while a run goes: none can
time out where one process ends hours before another, and none hangs where one is lost.
"""

import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from depass_lightning.errors import DePassError
from depass_lightning.files import remove_halves
from depass_lightning.passes import Decomposition
from depass_lightning.storage.json_files import read_json_lines, write_json_lines
from depass_lightning.storage.rows import ATTRIBUTION_SCHEMA
from depass_lightning.storage.shards import merge_shards, read_indices, write_shard
from depass_lightning.storage.states import write_states

PACKED = 64  # shards of one process that are made one, so that a folder never holds very many
SKIPPED = ".skipped.jsonl"
ENDED = ".ended"


class Journal:
    """The shards of a run in `<folder>/attributions/shards`, and the file that they are merged into.

    A shard's name ends with how many prompts it is the result of: so much is counted without opening any.

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
        return self.path.parent / "shards"

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

    def tidy(self) -> list[Path]:
        """Remove what an earlier process left half done, and return the shards that cannot be read.

        Prompts that were skipped are not done: they are tried again.
        """
        broken = []
        for path in [*self._parquet(), self.path]:
            try:
                if path.exists():
                    read_indices(path)
            except (OSError, pa.ArrowInvalid):
                path.unlink()
                broken.append(path)
        remove_halves(self.path.parent)
        for pattern in (f"*{SKIPPED}", f"*{ENDED}"):
            for path in self.shards.glob(pattern):
                path.unlink()
        self.skipped_path.unlink(missing_ok=True)
        return broken

    def done(self) -> set[int]:
        """Return the prompts that are attributed, by index."""
        files = [*self._parquet(), *([self.path] if self.path.exists() else [])]
        return {index // self.rows for path in files for index in read_indices(path)}

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
            write_states(self.states, states or {})
            if skipped:
                name = _name(rank, len(skipped), SKIPPED)
                write_json_lines(self.shards / name, skipped)
            if rows:
                path = self.shards / _name(rank, prompts - len(skipped), ".parquet")
                self._single.append(write_shard(path, rows, ATTRIBUTION_SCHEMA))
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
            DePassError: some are neither.
        """
        skipped = [row for path in self.shards.glob(f"*{SKIPPED}") for row in read_json_lines(path)]
        skipped.sort(key=lambda row: row["index"])
        first = None
        if expected is not None:
            first = [i * self.rows for i in sorted(set(expected) - {row["index"] for row in skipped})]
        shards = [*self._parquet(), *([self.path] if self.path.exists() else [])]
        if self._parquet() or first:
            merge_shards(shards, self.path, expected=first)
        elif not shards:
            write_shard(self.path, [], ATTRIBUTION_SCHEMA)
        if everything := [*before, *skipped]:
            write_json_lines(self.skipped_path, everything)
        shutil.rmtree(self.shards, ignore_errors=True)

    def _parquet(self) -> list[Path]:
        return sorted(path for path in self.shards.glob("*.parquet") if not path.name.startswith("."))

    def _pack(self, rank: int) -> None:
        """Make one shard of this process's single ones."""
        prompts = sum(map(_prompts, self._single))
        merge_shards(self._single, self.shards / _name(rank, prompts, ".parquet"))
        for path in self._single:  # a crash before leaves rows twice, which the merge expects
            path.unlink()
        self._single = []


def _name(rank: int, prompts: int, ending: str) -> str:
    """A name that no other process, and no earlier one, has given."""
    return f"rank{rank:04d}-{uuid.uuid4().hex[:12]}-{prompts}{ending}"


def _prompts(path: Path) -> int:
    """How many prompts a file is the result of, by its name."""
    number = path.name.split(".", 1)[0].rpartition("-")[2]
    return int(number) if number.isdigit() else 0
