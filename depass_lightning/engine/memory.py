"""How large the pieces are that the engine works on, so that memory beside the components is bounded."""

from dataclasses import dataclass

import torch

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
    """

    working: int
    recording: int

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
            return cls(working or min(_GPU_BYTES, free // 8), free // 4)
        return cls(working or _CPU_BYTES, 4 * 2**30)

    def rows(self, width: int, dtype: torch.dtype) -> int:
        """How many rows may be worked on at once.

        Args:
            width: how many numbers are alive for each row.
            dtype: their precision.
        """
        return max(1, self.working // (width * dtype.itemsize))
