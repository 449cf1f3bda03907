"""Memory bounds: the size of the engine's steps, and where components are stored."""

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

# Pieces that stay in a CPU's cache are also the fastest there; accelerators want large products.
_CPU_BYTES = 24 * 2**20
_MOST_BYTES = 2**30  # on a GPU
_SHARED_BYTES = 2**28  # on an accelerator that shares the system's memory, or does not report its own


@dataclass(frozen=True)
class Budget:
    """Working memory for one step of the engine.

    Args:
        working: bytes for the temporary tensors of one attention or MLP step.
        recording: bytes that a recording may hold; beyond that, blocks are run again one at a time.
        backward: the same for a backward pass, which itself needs little more than the states.
        components: bytes of components that are kept in memory on a CPU; beyond that, they go to a file.
    """

    working: int
    recording: int
    backward: int
    components: int

    @classmethod
    def default(cls, device: torch.device, working: int | None = None) -> "Budget":
        """Choose a budget for a device.

        Args:
            device: the model's device.
            working: bytes of working memory; None for the device's default.

        Raises:
            DePassError: the working memory asked for is not positive.
        """
        if working is not None and working <= 0:
            raise DePassError(f"memory_budget is {working} bytes; it must be greater than zero")
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            # Inside a training the allocator keeps most of the memory: what it holds unused is free too.
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            # Steps are sized by the whole memory: what is free varies, and with it the last digits would.
            return cls(working or min(_MOST_BYTES, total // 16), free // 4, free // 4, free)
        if device.type == "cpu":
            return cls(working or _CPU_BYTES, 4 * 2**30, 2**27, available() // 2)
        return cls(working or _SHARED_BYTES, available() // 4, available() // 4, available() // 2)

    def kept(self, *, backward: bool) -> int:
        """The bytes that a recording may hold."""
        return self.backward if backward else self.recording

    def rows(self, width: int, dtype: torch.dtype) -> int:
        """The number of rows that may be processed at once."""
        return max(1, self.working // (width * dtype.itemsize))


def available() -> int:
    """Return the bytes of memory that can still be used, by what the system reports; at least 256 MiB."""
    bounds = []
    try:
        bounds.append(_numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024)
        # The limit of a container, where there is one; cached files can be dropped and do not count.
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        bounds.append(limit - used + _numbers(group / "memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):
        pass
    return max(2**28, min(bounds, default=8 * 2**30))


def _numbers(path: Path) -> dict[str, int]:
    """The names and numbers of a system file, one pair a line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(value) for name, value, *_ in lines}


@dataclass
class Storage:
    """The components' rows: in memory, or in a temporary file that is deleted with them.

    The file is as large as the rows: components x positions x hidden x 4 bytes in float32, so 3.2 GB for an
    MLP of 2048 neurons at 512 tokens of 768 hidden. It is created in Python's temporary
    folder (`TMPDIR`), which must be on a disk to save memory.

    Args:
        rows: the rows, initially zero.
        file: the mapped file, or None.
    """

    rows: Float[Tensor, "row hidden"]
    file: mmap.mmap | None = None

    @classmethod
    def of(cls, rows: int, like: Float[Tensor, "*any hidden"], budget: Budget) -> "Storage":
        """Allocate rows of zeros.

        Raises:
            DePassError: the disk, or an accelerator's memory, has no room for them.
        """
        shape = (rows, like.shape[-1])
        size = math.prod(shape) * like.dtype.itemsize
        if size <= budget.components:
            return cls(like.new_zeros(shape))
        if like.device.type != "cpu":
            raise DePassError(
                f"the components need {size / 2**30:.1f} GiB, more than is free on {like.device}; take fewer "
                "neurons (indices=, top=), a shorter prompt, or a linear rule (rule='half')"
            )
        with tempfile.TemporaryFile() as file:
            try:
                # Allocate the blocks now: a disk that fills up later would kill the process.
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
        """Return the file's pages to the system, which writes them to disk when it needs to."""
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)
