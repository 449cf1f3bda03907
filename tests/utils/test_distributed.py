"""Several processes that run the same program: what is shared out, and what a mistake in one does to all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from depass_lightning import DePassError
from depass_lightning.utils.batching import in_batches
from depass_lightning.utils.distributed import from_all, from_first, place, sharing


def on_processes(folder: Path, world: int, work: Callable[[int], Any]) -> list[Any]:
    """Return what some work comes to on each of several processes, or what goes wrong there."""

    def process(rank: int) -> None:
        torch.set_num_threads(1)
        meet = f"file://{folder}/meet"
        distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
        try:
            with sharing():
                found = work(rank)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        finally:
            distributed.destroy_process_group()
        (folder / f"{rank}.json").write_text(json.dumps(found))

    multiprocessing.start_processes(process, nprocs=world, start_method="fork")  # type: ignore[attr-defined]
    written = [folder / f"{rank}.json" for rank in range(world)]
    return [json.loads(path.read_text()) if path.exists() else "gone" for path in written]


KINDS = [(0, 5), (1, 2), (0, 3), (0, 4), (1, 9), (0, 5), (0, 1)]


@pytest.mark.parametrize(("world", "count"), [(2, 7), (3, 7), (3, 2)])
def test_each_takes_its_batches_and_all_have_every_result(tmp_path: Path, world: int, count: int) -> None:
    def work(rank: int) -> Any:
        taken: list[list[int]] = []

        def batch(numbers: list[int]) -> list[tuple[int, float]]:
            assert place() == (0, 1), "what is called inside of a batch is not shared out again"
            taken.append(numbers)
            return [(i, float(torch.tensor(10.0 * i))) for i in numbers]

        return in_batches(KINDS[:count], 3, batch, progress=False), taken

    shares = on_processes(tmp_path, world, work)
    assert all(found == [[i, 10.0 * i] for i in range(count)] for found, _ in shares)
    taken = [batch for _, own in shares for batch in own]
    assert sorted(i for batch in taken for i in batch) == list(range(count))
    assert all(len({KINDS[i][0] for i in batch}) == 1 for batch in taken)
    assert all(own for _, own in shares) == (count >= world)


def test_a_mistake_in_one_is_told_in_all(tmp_path: Path) -> None:
    """Nobody waits for the one that failed."""

    def work(rank: int) -> Any:
        def batch(numbers: list[int]) -> list[int]:
            if 4 in numbers:
                raise ValueError("prompt 4 is too long")
            return numbers

        return in_batches([(0, i) for i in range(6)], 1, batch, progress=False)

    first, second, third = on_processes(tmp_path, 3, work)
    assert second == "ValueError: prompt 4 is too long"
    assert first == third == "DePassError: process 2 of 3: ValueError: prompt 4 is too long"


def test_one_that_is_lost_is_not_waited_for(tmp_path: Path) -> None:
    first, second = on_processes(tmp_path, 2, lambda rank: from_all(lambda: os._exit(0) if rank else 1))
    assert second == "gone"
    assert first.startswith("DePassError: one of the 2 processes was lost (")


def test_one_does_it_and_all_know(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        def write() -> str:
            path = tmp_path / f"written by {rank}"
            path.touch()
            return path.name

        def fail() -> None:
            raise DePassError("there is no room left")

        told = [from_first(write)]
        try:
            from_first(fail)
        except DePassError as error:
            told.append(str(error))
        return [*told, *from_all(lambda: torch.tensor(rank).item())]

    first, second = on_processes(tmp_path, 2, work)
    assert first == ["written by 0", "there is no room left", 0, 1]
    assert second == ["written by 0", "process 1 of 2: there is no room left", 0, 1]
    assert [path.name for path in tmp_path.glob("written*")] == ["written by 0"]


def test_one_process_does_everything_itself() -> None:
    with sharing():
        assert place() == (0, 1)
        assert from_first(lambda: 1) == 1
        assert from_all(lambda: 2) == [2]
        with pytest.raises(ValueError, match="as it is"):
            in_batches([(0, 1)], 1, lambda numbers: [int("as it is")], progress=False)
