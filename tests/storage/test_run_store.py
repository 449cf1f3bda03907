"""What a run's store counts and names: ranks, prompts of several rows, and when shards are packed."""

from typing import Any

import pytest
import torch

from depass_lightning.errors import DePassError
from depass_lightning.results.component import Decomposition
from depass_lightning.storage import RunStore, read_rows, run_store
from tests.reference.attributions import spans

ROWS = 3  # of a prompt whose generated tokens are explained


def rows(prompt: int, count: int = ROWS) -> list[dict[str, Any]]:
    return [{"index": prompt * ROWS + token, "id": f"{prompt}.{token}"} for token in range(count)]


def state(number: int) -> Decomposition:
    return Decomposition(torch.full((2, 4), float(number)), spans(["a", "b"], [None] * 2), 1)


def test_a_shard_is_named_by_its_rank_and_its_number_of_prompts(tmp_path) -> None:
    store = RunStore(tmp_path, rows=ROWS)
    skipped = {"index": 9, "id": "9", "reason": "empty"}
    store.add(7, [*rows(0), *rows(1)], [skipped], prompts=3)
    store.end(7)
    names = sorted(path.name for path in store.shards.iterdir())
    assert [name.split("-")[0] for name in names] == ["rank0007"] * 3
    assert sorted(name.rpartition("-")[2] for name in names) == ["0.ended", "1.skipped.jsonl", "2.parquet"]
    assert (store.counted(), store.ended(), store.done()) == (3, 1, {0, 1})


def test_states_belong_to_all_rows_of_their_prompt(tmp_path) -> None:
    """A prompt whose states are lost loses each of its rows, and no other prompt does."""
    store = RunStore(tmp_path, rows=ROWS)
    store.add(2, [*rows(0), *rows(1, 2)], [], prompts=2, states={0: state(0), 1: state(1)})
    (tmp_path / "attributions" / "states" / "0.safetensors").unlink()
    assert [path.name for path in store.damaged()] == ["0.safetensors"]
    again = RunStore(tmp_path, rows=ROWS)
    again.tidy()
    assert (again.done(), again.counted()) == ({1}, 1)
    (shard,) = again.shards.glob("*.parquet")
    assert shard.name.startswith("rank0002-")
    assert [row["id"] for row in read_rows(shard)] == ["1.0", "1.1"]
    again.add(2, rows(0), [], prompts=1, states={0: state(0)})
    again.merge([0, 1])
    assert [row["id"] for row in read_rows(again.path)] == ["0.0", "0.1", "0.2", "1.0", "1.1"]
    assert RunStore(tmp_path, rows=ROWS).damaged() == []


def test_a_prompt_counts_as_missing_by_its_first_row(tmp_path) -> None:
    store = RunStore(tmp_path, rows=ROWS)
    store.add(0, [*rows(0), *rows(2)], [], prompts=2)
    with pytest.raises(DePassError, match=r"\b3\b"):  # the first row of prompt 1
        store.merge([0, 1, 2])
    store.add(0, [], [{"index": 1, "id": "1", "reason": "empty"}], prompts=1)
    store.merge([0, 1, 2], before=[{"index": None, "id": "x", "reason": "unreadable"}])
    assert [row["id"] for row in store.skipped()] == ["x", "1"]
    assert not store.shards.exists()


def test_shards_of_one_process_are_packed_at_the_limit_and_not_before(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run_store, "PACKED", 3)
    stores = [RunStore(tmp_path), RunStore(tmp_path)]
    for prompt in range(4):
        for rank, store in enumerate(stores):
            index = 2 * prompt + rank
            store.add(rank, [{"index": index, "id": str(index)}], [], prompts=1)
        files = sorted(path.name.split("-")[0] for path in stores[0].shards.glob("*.parquet"))
        count = (1, 2, 1, 2)[prompt]  # three become one
        assert files == ["rank0000"] * count + ["rank0001"] * count
        assert stores[0].counted() == 2 * (prompt + 1)
    stores[0].merge(range(8))
    assert [row["id"] for row in read_rows(stores[0].path)] == [str(index) for index in range(8)]


def test_a_finished_run_loses_only_the_rows_of_lost_states(tmp_path) -> None:
    store = RunStore(tmp_path)
    for prompt in (0, 1):
        store.add(0, [{"index": prompt, "id": str(prompt)}], [], prompts=1, states={prompt: state(prompt)})
    store.merge([0, 1])
    (tmp_path / "attributions" / "states" / "1.safetensors").write_bytes(b"damaged")
    assert RunStore(tmp_path).tidy() == [tmp_path / "attributions" / "states" / "1.safetensors"]
    assert RunStore(tmp_path).done() == {0}
    (tmp_path / "attributions" / "states" / "0.safetensors").unlink()
    RunStore(tmp_path).tidy()
    assert RunStore(tmp_path).done() == set()
    assert not store.path.exists()


def test_what_cannot_be_written_is_named_with_what_is_kept(tmp_path, monkeypatch) -> None:
    store = RunStore(tmp_path)
    store.add(0, [{"index": 0, "id": "0"}], [], prompts=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store, "rename", full)
    with pytest.raises(DePassError, match=r"No space left on device.*1 prompts"):
        store.add(0, [{"index": 1, "id": "1"}], [], prompts=1)
