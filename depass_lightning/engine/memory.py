"""How large the pieces are that the engine works on, and where components are kept: memory is bounded."""

import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.errors import DePassError

# Pieces that stay in a CPU's cache are also the fastest there; a GPU wants large products.
_CPU_BYTES = 24 * 2**20
_GPU_BYTES = 1 * 2**30


@dataclass(frozen=True)
class Budget:
    """Working memory for one step of the engine.

    Args:
        working: bytes for the temporary tensors of one attention or MLP step.
        recording: bytes that a recording may hold; beyond, blocks are run again one at a time.
        components: bytes of components on a CPU that are kept in memory; beyond, they are kept in a file.
    """

    working: int
    recording: int
    components: int

    @classmethod
    def default(cls, device: torch.device, working: int | None = None) -> "Budget":
        """Choose a budget for a device.

        Args:
            device: where the model is.
            working: bytes of working memory, or None to choose.

        Raises:
            DePassError: the working memory asked for is not positive.
        """
        if working is not None and working <= 0:
            raise DePassError(f"memory_budget is {working} bytes; it must be greater than zero")
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return cls(working or min(_GPU_BYTES, free // 8), free // 4, free)
        return cls(working or _CPU_BYTES, 4 * 2**30, available() // 2)

    def rows(self, width: int, dtype: torch.dtype) -> int:
        """How many rows may be worked on at once.

        Args:
            width: how many numbers are alive for each row.
            dtype: their precision.
        """
        return max(1, self.working // (width * dtype.itemsize))


def available() -> int:
    """Bytes of memory that can still be used here, as far as the system tells; a quarter GiB at least."""
    found = []
    try:
        found.append(_numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024)
        # What a container may take, where there is a limit; files that were read are not in the way.
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        found.append(limit - used + _numbers(group / "memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):
        pass
    return max(2**28, min(found, default=8 * 2**30))


def _numbers(path: Path) -> dict[str, int]:
    """A system file's lines of a name and a number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(value) for name, value, *_ in lines}


@dataclass
class Storage:
    """Where components' rows are kept: in memory, or in a temporary file that has no name and ends with them.

    The file is as large as the rows: components x positions x hidden x 4 bytes in float32, so 3.2 GB for an
    MLP of 2048 neurons at 512 tokens of 768 hidden. It is made where Python's `tempfile` makes files
    (`TMPDIR`), which must be a disk for it to spare memory.

    Args:
        rows: the rows, zero at first.
        file: the mapped file, or None.
    """

    rows: Float[Tensor, "row hidden"]
    file: mmap.mmap | None = None

    @classmethod
    def of(cls, rows: int, like: Float[Tensor, "*any hidden"], budget: Budget) -> "Storage":
        """Keep so many rows.

        Args:
            rows: their number.
            like: a tensor with their width, precision and device.
            budget: says how many bytes may be kept in memory.

        Raises:
            DePassError: the disk has no room for them.
        """
        shape = (rows, like.shape[-1])
        size = math.prod(shape) * like.dtype.itemsize
        if like.device.type != "cpu" or size <= budget.components:
            return cls(like.new_zeros(shape))
        with tempfile.TemporaryFile() as file:
            try:
                # Room is taken now: a full disk would otherwise end the process in the middle.
                os.posix_fallocate(file.fileno(), 0, size) if hasattr(
                    os, "posix_fallocate"
                ) else file.truncate(size)
            except OSError as error:
                raise DePassError(
                    f"the components need {size / 2**30:.1f} GiB, more than there is in memory or in "
                    f"{tempfile.gettempdir()}; take fewer neurons (indices=), a shorter prompt, or a larger "
                    "disk (TMPDIR)"
                ) from error
            mapped = mmap.mmap(file.fileno(), size)
        return cls(torch.frombuffer(mapped, dtype=like.dtype).view(shape), mapped)

    def release_pages(self) -> None:
        """Give the file's pages back to the system, which writes them out when it needs to."""
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)
