"""A call's prompts in batches."""

from collections.abc import Callable
from typing import Any

from rich.progress import track

from depass_lightning.errors import DePassError


def in_batches(
    kinds: list[tuple[int, int]], batch_size: int, work: Callable[[list[int]], list[Any]], progress: bool
) -> list[Any]:
    """Work in batches of the same layer and similar length, and put the results back in order.

    Args:
        kinds: each prompt's layer and its number of tokens.
        batch_size: how many prompts a batch has at most.
        work: gives the results of the prompts of the given numbers.
        progress: show a progress bar.

    Raises:
        DePassError: the batch size is less than one.
    """
    if batch_size < 1:
        raise DePassError(f"batch_size is {batch_size}; it must be at least 1")
    batches: list[list[int]] = []
    for index in sorted(range(len(kinds)), key=lambda index: kinds[index]):
        if not batches or len(batches[-1]) == batch_size or kinds[batches[-1][0]][0] != kinds[index][0]:
            batches.append([])
        batches[-1].append(index)
    results: dict[int, Any] = {}
    for batch in track(batches, description="attributing", disable=not progress):
        results.update(zip(batch, work(batch), strict=True))
    return [results[index] for index in range(len(kinds))]
