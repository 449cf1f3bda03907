"""What a disk, a copy or a hand may do to finished results: it is noticed, and costs nothing else."""

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from depass_lightning import DePassError
from depass_lightning.results.component import Decomposition
from depass_lightning.storage import RunStore, check_file, checked_file, read_rows, write_states
from depass_lightning.utils.atomic_files import write_whole
from tests.commands.test_analyze import run
from tests.reference.attributions import spans

FEW = ("task.size=6", "batch_size=2", "faithfulness=none", "report.figures=0")
DECOMPOSITION = Decomposition(torch.arange(12.0).reshape(3, 4), spans(["a", "b", "bias"], [None] * 3), 2)


def flip(path: Path, bit: int) -> bytes:
    """Change one bit of a file, and return what it was."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return before


def journal_of(folder: Path) -> RunStore:
    """Two prompts in two shards, with their states."""
    run_store = RunStore(folder)
    for index in range(2):
        row = {"index": index, "id": str(index), "scores": [0.5, index], "names": ["a", "b"], "value": 0.5}
        run_store.add(0, [row], [], 1, {index: DECOMPOSITION})
    return run_store


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.covering(1)
def test_every_changed_bit_is_noticed(tmp_path: Path, merged: bool) -> None:
    run_store = journal_of(tmp_path)
    if merged:
        run_store.merge(range(2))
    assert run_store.damaged() == []
    generator = random.Random(0)
    files = [*run_store.path.parent.rglob("*.parquet"), *run_store.states.iterdir()]
    assert len(files) == 4 - merged
    for path in files:
        for _ in range(100):
            before = flip(path, generator.randrange(8 * path.stat().st_size))
            assert run_store.damaged() == [path]
            path.write_bytes(before)
    assert run_store.damaged() == []


def test_pages_have_checksums(tmp_path: Path) -> None:
    """A reader that opens the file by other means is warned too."""
    path = journal_of(tmp_path)._parquet()[0]
    content = path.read_bytes()
    flip(path, 8 * content.index(b"PAR1", 0) + 8 * 40)
    with pytest.raises(OSError, match="CRC"):
        read_rows(path)


def test_a_shard_that_is_damaged_is_not_merged(tmp_path: Path) -> None:
    run_store = journal_of(tmp_path)
    shards = run_store._parquet()
    flip(shards[0], 800)
    with pytest.raises(DePassError, match=f"{shards[0].name} is damaged: .* the same command again"):
        run_store.merge(range(2))
    assert run_store.tidy() == [shards[0]]
    assert len(run_store.done()) == 1


def test_either_checksum_fits_while_a_file_is_replaced(tmp_path: Path) -> None:
    """A process may be killed between the checksum and the name."""
    path = tmp_path / "table"
    for content in (b"old", b"new"):
        with checked_file(path) as draft:
            draft.write_bytes(content)
            check_file(path)
        check_file(path)
    assert len((tmp_path / "SHA256SUMS").read_text().splitlines()) == 1

    with pytest.raises(FileNotFoundError), checked_file(path):
        pass  # nothing was written
    check_file(path)
    path.write_bytes(b"newest")
    with pytest.raises(DePassError, match="table is damaged"):
        check_file(path)


def test_a_checksum_is_of_one_file(tmp_path: Path) -> None:
    """Of several in a folder, listed by their names; a file or a line that is none of them is let be."""
    contents = {"c": b"1", "a": b"2", "b": b"3"}
    for name, content in contents.items():
        with checked_file(tmp_path / name) as draft:
            draft.write_bytes(content)
    sums = tmp_path / "SHA256SUMS"
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in "abc"]
    assert sums.read_text() == "".join(lines)
    assert [line[:64] for line in lines] != sorted(line[:64] for line in lines)
    for name in contents:
        check_file(tmp_path / name)
        for other in contents.keys() - {name}:
            (tmp_path / name).write_bytes(contents[other])
            with pytest.raises(DePassError, match=f"{name} is damaged"):
                check_file(tmp_path / name)
        (tmp_path / name).write_bytes(contents[name])
    (tmp_path / "none").write_bytes(b"4")
    sums.write_bytes(b"\xff no line of it\n" + sums.read_bytes())
    for name in (*contents, "none"):
        check_file(tmp_path / name)


def test_states_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    hashes = {write_states(tmp_path, {0: DECOMPOSITION})[0] for _ in range(20)}
    assert hashes == {hashlib.sha256((tmp_path / "0.safetensors").read_bytes()).hexdigest()}


def test_states_that_are_lost_or_cut_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of no other prompt, nor its scores."""
    folder = tmp_path / "run"
    assert run(folder, *FEW, "states=end") == 0
    states = folder / "attributions" / "states"
    before = {path.name: path.read_bytes() for path in states.iterdir()}
    (states / "0.safetensors").unlink()
    (states / "3.safetensors").write_bytes(before["3.safetensors"][:-50])
    added: list[int] = []
    add = RunStore.add

    def counted(run_store: RunStore, rank: int, rows: Sequence[Mapping[str, Any]], *more: Any) -> None:
        added.extend(row["index"] for row in rows)
        add(run_store, rank, rows, *more)

    monkeypatch.setattr(RunStore, "add", counted)
    assert run(folder, *FEW, "states=end") == 0
    assert sorted(added) == [0, 3]
    told = capsys.readouterr().err
    assert all(f"{number}.safetensors is damaged or missing" in told for number in (0, 3))
    assert "4 of 6 prompts have been attributed before" in told
    assert RunStore(folder).damaged() == []
    assert set(before) == {path.name for path in states.iterdir()}
    assert len(read_rows(folder / "attributions")) == 6


def test_results_without_a_manifest_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *FEW) == 0
    table = tmp_path / "attributions" / "attributions.parquet"
    before, manifest = table.read_bytes(), tmp_path / "attributions" / "manifest.json"
    written = manifest.read_text()
    manifest.unlink()
    assert run(tmp_path, *FEW) == 1
    assert "has results, but no manifest.json" in capsys.readouterr().err
    manifest.write_text(json.dumps(json.loads(written) | {"settings": {}}))
    assert run(tmp_path, *FEW) == 1
    assert "the settings do not fit their hash" in capsys.readouterr().err
    assert table.read_bytes() == before


def test_a_new_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it has its name, and the folder after."""
    synced: list[tuple[bool, bool]] = []

    def fsync(number: int) -> None:
        synced.append((Path(f"/dev/fd/{number}").resolve().is_dir(), (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "file", b"content")
    assert synced == [(False, False), (True, True)]
