"""Rows that cannot be attributed, and what they cost an analysis."""

import json
from types import SimpleNamespace

import torch

from depass_lightning.depass import DePass
from depass_lightning.storage import read_rows
from tests.commands.test_analyze import good, jsonl, run, summary_of


def test_bad_rows_cost_only_themselves(tmp_path, capsys):
    """One that cannot be read, one with a word that the model lacks, one too long; the good ones are done."""
    strange = good("strange") | {"target": " Zarathustra"}
    long = good("long") | {"prompt": "Mary and John " * 2000 + "gave a drink to"}
    task = jsonl(tmp_path, good("first"), "not json\n", strange, long, good("last"))
    assert run(tmp_path, *task) == 1
    rows = read_rows(tmp_path / "attributions")
    assert [(row["id"], row["correct"]) for row in rows] == [("first", True), ("last", True)]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry.get("id", entry.get("row")) for entry in skipped] == [2, "strange", "long"]
    assert "Zarathustra" in skipped[1]["reason"]
    assert "context" in skipped[2]["reason"]
    assert summary_of(tmp_path)["skipped"] == 3
    assert "3 of 5 prompts were skipped" in capsys.readouterr().err


def test_any_exception_of_a_row_costs_that_row(tmp_path, monkeypatch):
    """Whatever it is, and in the shortest prompt too, which the settings are tried on."""
    attribute = DePass.attribute

    def failing(self, prompt=None, *arguments, **options):
        if any("Nobody" in own for own in ([prompt] if isinstance(prompt, str) else prompt or ())):
            raise IndexError("index out of range in self")  # what torch says of a token without an embedding
        return attribute(self, prompt, *arguments, **options)

    monkeypatch.setattr(DePass, "attribute", failing)
    task = jsonl(tmp_path, *map(good, "abc"), good("short") | {"prompt": "Nobody gave", "evidence": []})
    assert run(tmp_path, *task, "batch_size=3") == 1
    assert [row["id"] for row in read_rows(tmp_path / "attributions")] == ["a", "b", "c"]
    [skipped] = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["id"], skipped["reason"]) == ("short", "IndexError: index out of range in self")


def test_want_of_memory_halves_the_batch_for_good(tmp_path, monkeypatch, caplog):
    attribute, sizes = DePass.attribute, []

    def short_of_memory(self, prompt=None, *arguments, **options):
        sizes.append(1 if prompt is None or isinstance(prompt, str) else len(prompt))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return attribute(self, prompt, *arguments, **options)

    monkeypatch.setattr(DePass, "attribute", short_of_memory)
    monkeypatch.setattr(DePass, "estimate", lambda *_, **__: SimpleNamespace(seconds=0))
    assert run(tmp_path, "task.size=8", "batch_size=4", "faithfulness=none") == 0
    assert sizes == [1, 4, 2, 2, 2, 2]
    assert len(read_rows(tmp_path / "attributions")) == 8
    assert "memory ran out on 4 prompts; there are 2 in a pass now" in caplog.text


def test_nothing_but_bad_rows_is_no_crash(tmp_path, capsys):
    assert run(tmp_path, *jsonl(tmp_path, good("strange") | {"target": " Zarathustra"})) == 1
    assert read_rows(tmp_path / "attributions") == []
    assert summary_of(tmp_path)["prompts"] == 0
    assert "1 of 1 prompts were skipped" in capsys.readouterr().err
