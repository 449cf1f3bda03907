"""The timeline of a training: every step's scores are in the page, and a run's folder becomes one."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from depass_lightning import Attribution, DePassError
from depass_lightning.callbacks import DePassCallback
from depass_lightning.commands.timeline import read_losses, write_timelines
from depass_lightning.reports.timeline_page import Frame, write_timeline
from depass_lightning.results.component import Component
from depass_lightning.storage import (
    ATTRIBUTION_SCHEMA,
    attribution_to_row,
    read_attributions,
    write_json,
    write_shard,
)
from tests.reference.attributions import ioi
from tests.reference.training import PROMPTS, OwnModule, fit, trainer
from tests.reports.test_page import drawn


def frames(count: int = 3) -> list[Frame]:
    """Steps at which one prompt's scores grow, and another prompt is there at the first alone."""
    own = ioi()
    steps = [
        replace(own, scores=own.scores * (1 + step), value=own.value * (1 + step), rank=count - 1 - step)
        for step in range(count)
    ]
    made = [Frame(f"step {10 * i}", 10 * i, {"a": given}) for i, given in enumerate(steps)]
    return [Frame("step 0", 0, {"gone": own} | dict(made[0].attributions)), *made[1:]]


def page_of(folder: Path, given: list[Frame], **options: Any) -> str:
    write_timeline(folder / "timeline.html", given, title="a training timeline", **options)
    return (folder / "timeline.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_every_steps_scores_and_answers_are_in_the_page(tmp_path: Path) -> None:
    given = frames()
    page = page_of(tmp_path, given, lines={"loss": [(0, 2.0), (20, 1.0)]})
    timeline = data_of(page)["timeline"]
    assert timeline["labels"] == ["step 0", "step 10", "step 20"]
    assert timeline["steps"] == [0, 10, 20]
    assert timeline["lines"] == {"loss": [[0, 2.0], [20, 1.0]]}
    (steps,) = timeline["frames"]
    for frame, shown in zip(given, steps, strict=True):
        own = frame.attributions["a"]
        assert shown["scores"]["tokens"] == pytest.approx(own.scores.tolist(), rel=1e-4)
        assert shown["value"] == pytest.approx(own.value, rel=1e-4)
        assert shown["rank"] == own.rank
    assert [prompt["id"] for prompt in data_of(page)["prompts"]] == ["a"]


def test_what_an_example_has_of_one_step_is_not_shown_for_all(tmp_path: Path) -> None:
    known = {"a": {"evidence": [(5, 9)], "evidence_first": True, "correct": True}}
    (prompt,) = data_of(page_of(tmp_path, frames(), examples=known))["prompts"]
    assert (prompt["first"], prompt["right"]) == (None, None)
    assert prompt["share"] is not None


def test_a_report_is_no_timeline(tmp_path: Path) -> None:
    ioi().to_html(tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["timeline"] is None


def test_timelines_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(DePassError, match="two steps or more; there is 1"):
        write_timeline(tmp_path / "timeline.html", frames()[:1], title="")
    first, second, *_ = frames()
    renamed = replace(first.attributions["a"], components=first.attributions["a"].components[::-1])
    with pytest.raises(DePassError, match="over the same components"):
        write_timeline(tmp_path / "timeline.html", [second, Frame("other", 1, {"a": renamed})], title="")
    with pytest.raises(DePassError, match="holds no maps of DePassCallback"):
        write_timelines(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_neurons_of_all_steps_are_the_same_in_the_page(tmp_path: Path) -> None:
    """Of many components each page shows the strongest; a timeline those that are strong at any step."""
    count = 400
    many = Attribution(
        **(
            vars(ioi())
            | {
                "scores": torch.zeros(count),
                "components": [Component("neuron", f"neuron {i}", 0, i) for i in range(count)],
                "source": "neurons",
                "metadata": {},
            }
        )
    )
    early, late = torch.linspace(0, 1, count), torch.linspace(1, 0, count)
    page = page_of(
        tmp_path,
        [
            Frame("early", 0, {"a": replace(many, scores=early)}),
            Frame("late", 1, {"a": replace(many, scores=late)}),
        ],
    )
    (prompt,), ((before, after),) = data_of(page)["prompts"], data_of(page)["timeline"]["frames"]
    shown = [name or "" for name in prompt["views"]["tokens"]["names"]]
    assert len(before["scores"]["tokens"]) == len(after["scores"]["tokens"]) == len(shown)
    assert {"neuron 0", f"neuron {count - 1}"} <= set(shown)


def test_a_runs_folder_becomes_a_timeline(tmp_path: Path) -> None:
    maps = tmp_path / "depass" / "mine"
    for frame in frames():
        rows = [
            attribution_to_row(own) | {"id": id, "index": i, "evidence": [[0, 3]]}
            for i, (id, own) in enumerate(frame.attributions.items())
        ]
        write_shard(maps / f"step-{int(frame.step):06d}.parquet", rows, ATTRIBUTION_SCHEMA)
    write_json(maps / "history.json", {"steps": [0, 10, 20], "curves": {"probability": [0.1, None, 0.3]}})
    logs = tmp_path / "csv"
    logs.mkdir()
    with (logs / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["step", "train/loss", "accuracy"], [5, 2.0, ""], [15, "", 0.5], [20, "nan", 0.6]])
    assert read_losses(tmp_path) == {"train/loss": [(5.0, 2.0)]}
    (page,) = write_timelines(tmp_path)
    assert page == maps / "timeline.html"
    timeline = data_of(page.read_text(encoding="utf-8"))["timeline"]
    assert timeline["labels"] == ["step 0", "step 10", "step 20"]
    assert timeline["lines"]["train/loss"] == [[5.0, 2.0]]
    assert timeline["lines"]["all probes: probability"] == [[0.0, 0.1], [20.0, 0.3]]


def test_a_file_that_is_broken_costs_a_timeline_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        for frame in frames():
            rows = [
                attribution_to_row(own) | {"id": id, "index": i}
                for i, (id, own) in enumerate(frame.attributions.items())
            ]
            write_shard(
                tmp_path / "depass" / name / f"step-{int(frame.step):06d}.parquet", rows, ATTRIBUTION_SCHEMA
            )
    (tmp_path / "depass/a/history.json").write_text('{"steps": [0')
    (tmp_path / "depass/a/step-000010.parquet").write_bytes(b"PAR1")
    (tmp_path / "depass/b/history.json").write_text('{"steps": [0], "curves": {"value": [1, 2]}}')
    (tmp_path / "metrics.csv").write_text("step,loss\n1,much\n")
    pages = write_timelines(tmp_path)
    timelines = [data_of(page.read_text(encoding="utf-8"))["timeline"] for page in pages]
    assert [timeline["labels"] for timeline in timelines] == [
        ["step 0", "step 20"],
        ["step 0", "step 10", "step 20"],
    ]
    told = capsys.readouterr().err
    for name in ("a/history.json", "a/step-000010.parquet", "b/history.json", "metrics.csv"):
        assert f"{name} is left out: " in told


@pytest.mark.parametrize("sources", [["tokens"], ["tokens", "heads"]])
def test_every_probe_set_and_source_of_a_training_has_its_timeline(
    tmp_path: Path, sources: list[str]
) -> None:
    sets = {"names": list(PROMPTS[:1]), "places": list(PROMPTS[1:3])}
    fit(trainer(tmp_path, [DePassCallback(sets, source=sources, faithfulness=0)]), OwnModule())
    folders = {
        name: [name] if len(sources) == 1 else [f"{name}/{source}" for source in sources] for name in sets
    }
    pages = write_timelines(tmp_path)
    maps = tmp_path / "depass"
    assert pages == sorted(maps / folder / "timeline.html" for own in folders.values() for folder in own)
    for name, own in folders.items():
        for folder, source in zip(own, sources, strict=True):
            page = (maps / folder / "timeline.html").read_text(encoding="utf-8")
            assert f"{folder}: what the answers relied on" in page
            shown = data_of(page)
            assert [prompt["id"] for prompt in shown["prompts"]] == [
                f"{name}-{i}" for i in range(len(sets[name]))
            ]
            assert shown["timeline"]["steps"] == [0, 2, 4, 6]
            rows = read_attributions(maps / folder / "step-000004.parquet")
            for row, steps in zip(rows, shown["timeline"]["frames"], strict=True):
                [scores] = steps[2]["scores"].values()
                assert row.source == source
                assert sorted(scores) == pytest.approx(sorted(row.scores.tolist()), rel=1e-3, abs=1e-5)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_the_timeline_and_what_changed(tmp_path: Path) -> None:
    write_timeline(
        tmp_path / "timeline.html",
        frames(),
        title="a training timeline",
        lines={"loss": [(0, 2.0), (20, 1.0)]},
    )
    page = drawn(tmp_path, "timeline.html")
    assert 'id="timeline-slider"' in page
    assert "step 20</output>" in page
    assert "What changed since step 0" in page
    assert re.search(r"loss<b>1</b>", page)


def test_settings_that_differ_between_models_are_not_shown_as_shared(tmp_path: Path) -> None:
    one, other = frames()[:2]
    own = other.attributions["a"]
    renamed = replace(own, metadata=dict(own.metadata) | {"model": "second-model"})
    page = page_of(tmp_path, [one, Frame("other", 1, {"a": renamed})])
    assert "second-model" not in page
    assert "softmax" in page
