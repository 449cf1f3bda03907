"""Process a call's prompts in batches."""

import math
from collections.abc import Callable
from typing import Any

from rich.progress import track

from depass_lightning.errors import DePassError
from depass_lightning.utils.distributed import from_all, place


def in_batches(
    kinds: list[tuple[Any, int]],
    batch_size: int,
    work: Callable[[list[int]], list[Any]],
    progress: bool,
    description: str = "attributing",
) -> list[Any]:
    """Process prompts in batches of one kind and similar length, and return the results in order.

    Inside `depass_lightning.utils.distributed.sharing` the batches are distributed among the processes.

    Args:
        kinds: for each prompt a key that all prompts of a batch must share, such as the layer and the rotary
            frequencies, and its number of tokens.
        batch_size: the maximum number of prompts in a batch.
        work: returns the results of the prompts with these indices.
        progress: show a progress bar.
        description: the label of the progress bar.

    Raises:
        DePassError: the batch size is less than one, or another process failed.
    """
    if batch_size < 1:
        raise DePassError(f"batch_size is {batch_size}; it must be at least 1")
    rank, world = place()
    most = min(batch_size, math.ceil(len(kinds) / world))  # work for every process
    batches: list[list[int]] = []
    for index in sorted(range(len(kinds)), key=lambda index: kinds[index]):
        if not batches or len(batches[-1]) == most or kinds[batches[-1][0]][0] != kinds[index][0]:
            batches.append([])
        batches[-1].append(index)

    def process_share() -> dict[int, Any]:
        results: dict[int, Any] = {}
        for batch in track(batches[rank::world], description=description, disable=not (progress and batches)):
            results.update(zip(batch, work(batch), strict=True))
        return results

    results = {index: result for share in from_all(process_share) for index, result in share.items()}
    return [results[index] for index in range(len(kinds))]
