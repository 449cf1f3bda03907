"""Rows on disk: shards are whole or absent, a merge leaves no trace of who wrote what."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from depass_lightning.commands.compare import labelled
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.maps import write_maps
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import block_components
from depass_lightning.storage import (
    ATTRIBUTION_SCHEMA,
    RowFile,
    RunStore,
    attribution_from_row,
    attribution_to_row,
    merge_shards,
    read_attributions,
    read_rows,
    shards,
    weights_fingerprint,
    write_shard,
)
from depass_lightning.utils.atomic_files import safe_path
from tests.reference.attributions import ioi, spans

SCHEMA = pa.schema([("index", pa.int64()), ("word", pa.string())])


def rows(*indices):
    return [{"index": i, "word": f"word {i}"} for i in indices]


def test_the_merge_leaves_no_trace_of_the_shards(tmp_path):
    """Other shards, in another order, with a row done twice: the same bytes."""
    write_shard(tmp_path / "a" / "rank0.parquet", rows(0, 1, 2, 3), SCHEMA)
    write_shard(tmp_path / "b" / "rank0.parquet", rows(3, 1), SCHEMA)
    write_shard(tmp_path / "b" / "rank1.parquet", rows(2, 0, 1), SCHEMA)
    for name in "ab":
        count = merge_shards((tmp_path / name).glob("*"), tmp_path / f"{name}.parquet", expected=range(4))
        assert count == 4
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert read_rows(tmp_path / "a.parquet") == rows(0, 1, 2, 3)


@pytest.mark.parametrize("at_once", [1, 300, 2**30])
def test_rows_are_merged_in_parts_that_leave_no_trace(tmp_path, monkeypatch, at_once):
    """However little fits into memory: the same rows in groups of one size; the first of equals stays."""
    monkeypatch.setattr(shards, "MERGE_BYTES", at_once)
    monkeypatch.setattr(shards, "ROW_GROUP", 2)
    for name, indices in (("a", (5, 0, 2)), ("b", (8, 9)), ("c", (2, 3, 8, 1, 4)), ("d", (7, 6)), ("e", ())):
        own = [row | {"word": f"{name}{row['index']}"} for row in rows(*indices)]
        write_shard(tmp_path / f"{name}.parquet", own, SCHEMA)
    merged = tmp_path / "merged"
    assert merge_shards(tmp_path.glob("*.parquet"), merged, without={3, 7}) == 8
    words = [row["word"] for row in read_rows(merged)]
    assert words == ["a0", "c1", "a2", "c4", "a5", "d6", "b8", "b9"]
    metadata = pq.ParquetFile(merged).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2] * 4


def test_a_merge_reads_no_more_at_a_time_than_fits(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{i}.parquet", rows(i), SCHEMA) for i in range(6)]
    monkeypatch.setattr(shards, "ROW_GROUP", 2)
    monkeypatch.setattr(shards, "MERGE_BYTES", sum(map(shards._encoded, paths)) // 3 + 1)
    gathered, gather = [], shards._gathered
    monkeypatch.setattr(
        shards, "_gathered", lambda ranges, *bounds: gathered.append(bounds) or gather(ranges, *bounds)
    )
    merge_shards(paths, tmp_path / "merged")
    assert gathered == [(0, 1), (2, 3), (4, 5)]


def test_there_must_be_shards(tmp_path):
    with pytest.raises(DePassError, match="no shards to merge"):
        merge_shards([], tmp_path / "merged")


def test_rows_of_a_file_are_read_each_time(tmp_path):
    file = RowFile(write_shard(tmp_path / "rows", rows(*range(130)), SCHEMA), ["word"])
    assert len(file) == 130
    assert [row["word"] for row in file] == [row["word"] for row in file] == [f"word {i}" for i in range(130)]
    assert file.first(2) == [{"word": "word 0"}, {"word": "word 1"}]
    assert len(file.first(200)) == 130


def test_the_merge_names_what_is_missing(tmp_path):
    shard = write_shard(tmp_path / "rank0.parquet", rows(0, 2), SCHEMA)
    with pytest.raises(DePassError, match=r"2 rows are in no shard: 1, 3. Run"):
        merge_shards([shard], tmp_path / "all.parquet", expected=range(4))
    assert not (tmp_path / "all.parquet").exists()
    with pytest.raises(DePassError, match=r"10 rows are in no shard: 1, 3, 4, 5, 6, 7, 8, 9, 10, 11. Run"):
        merge_shards([shard], tmp_path / "all.parquet", expected=range(12))
    with pytest.raises(
        DePassError, match=r"11 rows are in no shard: 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\.. R"
    ):
        merge_shards([shard], tmp_path / "all.parquet", expected=range(13))


def test_a_shard_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """A full disk, say: the file that was there stays, and no half of a new one."""
    path = write_shard(tmp_path / "rank0.parquet", rows(0), SCHEMA)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_shard(path, rows(0, 1), SCHEMA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_column_that_the_schema_lacks_is_refused(tmp_path):
    with pytest.raises(DePassError, match="colour"):
        write_shard(tmp_path / "rank0.parquet", [{"index": 0, "colour": "red"}], SCHEMA)


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(DePassError, match="attributions folder"):
        read_rows(tmp_path)


def test_the_files_of_a_folder_are_read_together(tmp_path):
    write_shard(tmp_path / "one.parquet", rows(2), SCHEMA)
    write_shard(tmp_path / "two.parquet", rows(1), SCHEMA)
    assert read_rows(tmp_path) == rows(1, 2)


def test_the_schema_has_a_column_for_every_field():
    """A field that the attribution gains must not be lost on the way to the disk."""
    row = attribution_to_row(ioi())
    assert {field.name for field in dataclasses.fields(Attribution)} - {"components"} <= row.keys()
    assert row.keys() <= set(ATTRIBUTION_SCHEMA.names)


def test_rows_of_an_earlier_version_are_refused():
    row = attribution_to_row(ioi())
    del row["kinds"]
    with pytest.raises(DePassError, match=r"no 'kinds' of the components: an earlier version wrote this"):
        attribution_from_row(row)


def test_an_attribution_comes_back_as_it_was(tmp_path):
    """Every field, with ranges of pairs and without, through the file."""
    full = Attribution(
        scores=torch.tensor([0.25, -1.5, 3.0]),
        components=spans(["<s>", " Mary", "bias"], [(0, 1), (1, 2), None]),
        value=1.7500001,
        target="' Mary' − ' John'",
        text="Mary",
        tokens=["<s>", " Mary"],
        token_ids=[1, 17],
        offsets=[(0, 0), (0, 4)],
        target_ids=[3, 4],
        method="atp",
        attention_path="control",
        source="tokens",
        rule="softmax",
        layer=0,
        position=1,
        prediction=" Mary",
        probability=0.5,
        rank=0,
        metadata={"model": "tiny", "temperature": 0.1},
    )
    bare = dataclasses.replace(
        full,
        text="",
        offsets=None,
        components=block_components((2,), "head", range(2))[0],
        groups=3,
        probability=None,
        rank=None,
        metadata={},
    )
    shard = [{"index": i, **attribution_to_row(a)} for i, a in enumerate((full, bare))]
    write_shard(tmp_path / "attributions.parquet", shard, ATTRIBUTION_SCHEMA)
    for written, read in zip((full, bare), read_attributions(tmp_path), strict=True):
        assert torch.equal(written.scores, read.scores)
        for field in dataclasses.fields(Attribution):
            if field.name != "scores":
                assert getattr(written, field.name) == getattr(read, field.name), field.name
    stored = pq.read_table(tmp_path / "attributions.parquet").to_pylist()[0]
    assert stored["completeness"] == pytest.approx(full.completeness)
    assert attribution_from_row(stored).completeness == full.completeness


def test_the_fingerprint_follows_every_weight():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), norm)
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        norm.get_buffer("running_mean")[1] += 1e-6
    changed = weights_fingerprint(model)
    assert changed != before
    assert weights_fingerprint(model.to(torch.bfloat16)) not in (before, changed)


@pytest.mark.parametrize("place", [(0, 0), (20, 17), (-1, -1)])
def test_the_fingerprint_follows_all_of_a_weight(place):
    model = torch.nn.Linear(40, 30)
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.weight[place] += 1
    assert weights_fingerprint(model) != before


class WithExtraState(torch.nn.Linear):
    """As a quantised layer, whose state is not tensors alone."""

    extra: str = "scale 1"

    def get_extra_state(self) -> str:
        return self.extra


def test_the_fingerprint_follows_other_state_and_what_comes_after_it():
    layer, last = WithExtraState(3, 2), torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(layer, last)
    assert "0._extra_state" in sorted(model.state_dict())
    found = {weights_fingerprint(model)}
    with torch.no_grad():
        last.weight[0, 0] += 1
    found.add(weights_fingerprint(model))
    layer.extra = "scale 2"
    found.add(weights_fingerprint(model))
    assert len(found) == 3
    assert {len(name) for name in found} == {16}


def test_the_marks_of_a_killed_run_are_removed(tmp_path):
    """Else prompts that it has skipped, and are tried again, would be listed twice."""
    skipped = {"index": 0, "id": "strange", "reason": "two tokens"}
    RunStore(tmp_path).add(0, [], [skipped], prompts=1)
    RunStore(tmp_path).end(0)
    again = RunStore(tmp_path)
    assert again.counted() == 1
    again.tidy()
    assert (again.counted(), again.ended(), list(again.shards.iterdir())) == (0, 0, [])


NAMES = [
    "../../../esc",
    "/tmp/esc",
    "..",
    "",
    ".",
    "a/../b",
    "a\\b",
    "x\0y",
    "n" * 300,
    "\ud800",
    "\ud801",
    " .",
]


def test_no_name_leads_out_of_its_folder(tmp_path):
    """Names that could be written to stay as they are, and two names never become one."""
    paths = [tmp_path / safe_path(name) for name in NAMES]
    for path in paths:
        assert path.resolve().is_relative_to(tmp_path)
        assert path != tmp_path
        assert ".." not in path.parts
        write_shard(path / "x", rows(0), SCHEMA)
    assert len(set(paths)) == len(paths)
    for name in ("held out", "ioi", "Wörter.v2", "pythia-70m@step1", "set/tokens"):
        assert safe_path(name).as_posix() == name


def test_probe_sets_are_written_below_the_runs_folder(tmp_path):
    history = SimpleNamespace(as_json=dict)
    for name in ("../../../esc", "/esc"):
        found: Any = SimpleNamespace(name=name, step=0, history=history, circuit=None, attributions=[])
        write_maps(found, tmp_path / "a" / "b")
    written = list(tmp_path.rglob("history.json"))
    assert len(written) == 2
    assert all(path.is_relative_to(tmp_path / "a" / "b" / "depass") for path in written)
    assert labelled(["..", "a/x", "b/x", "2-x"]) == ["1--5ec1f7e7", "2-x", "3-x", "4-2-x"]
