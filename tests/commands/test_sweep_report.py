"""A sweep's report: each run's numbers and maps as they are in its folder, and no run left out in silence."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from depass_lightning import DePass, DePassError
from depass_lightning.commands import sweep_report
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.reports.sweep import Map, varying, write_sweep_page
from depass_lightning.storage import read_attributions, read_rows
from tests.commands.test_analyze import run
from tests.commands.test_timeline import data_of
from tests.reference.attributions import NASTY, Elements, nasty
from tests.reports.test_page import drawn

QUICK = ("report.figures=0", "report.prompts=2")
RUNS = {
    "0": ("task=ioi", "source=tokens"),
    "1": ("task=ioi", "source=heads"),
    "2": ("task=known", "source=tokens"),
    "3": ("task=known", "source=neurons"),
    "10": ("task=ioi", "source=tokens", "task.size=5"),
}
NOTHING = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's weights after a training that changed them."""
    model = DePass.from_pretrained("tiny").model
    state = {f"model.{name}": 1.01 * value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("training") / "last.ckpt"
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A sweep on the bundled model, of which no run has failed."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, asked in RUNS.items():
        assert run(folder / name, "task.size=3", *QUICK, *asked) == 0
    assert run(folder / "11", "task=ioi", "task.size=3", *QUICK, f"checkpoint={checkpoint}") == 0
    return folder


@pytest.fixture
def copied(sweep: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sweep, tmp_path / "sweep")


def page_of(folder: Path) -> str:
    return (folder / "sweep.html").read_text(encoding="utf-8")


def reported(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Report on a sweep, and return the table's rows and the page's data."""
    sweep_report.report_sweep(folder, NOTHING)
    return pq.ParquetFile(folder / "sweep.parquet").read().to_pylist(), data_of(page_of(folder))


def test_every_run_is_a_row_with_its_own_numbers(sweep: Path) -> None:
    rows, data = reported(sweep)
    assert [row["run"] for row in rows] == ["0", "1", "2", "3", "10", "11"]  # as a person counts
    for row in rows:
        summary = json.loads((sweep / row["run"] / "summary.json").read_text())
        config = OmegaConf.load(sweep / row["run"] / "config.yaml")
        assert (row["status"], row["model"], row["task"]) == ("done", "tiny", config.task.name)
        for name in ("prompts", "correct", "completeness_max", "seconds"):
            assert row[name] == summary[name]
        assert row["seconds_per_prompt"] == pytest.approx(summary["seconds"] / summary["prompts"])
        for name in ("patch_top_area", "evidence_first"):
            assert row[name] == summary.get(name, {"value": None})["value"]
            assert row[f"{name}_chance"] == summary.get(name, {"chance": None})["chance"]
        assert row["fingerprint"] == summary["model"]["fingerprint"]
        assert row["rule"] == ("shap" if row["source"].startswith("heads") else "half")
        assert Path(row["folder"]) == sweep / row["run"]
    assert [row["source"].split()[0] for row in rows] == [
        "tokens",
        "heads",
        "tokens",
        "neurons",
        "tokens",
        "tokens",
    ]
    assert [run["numbers"].get("patch_top_area", {}).get("value") for run in data["runs"]] == [
        row["patch_top_area"] for row in rows
    ]
    assert {axis["key"] for axis in data["axes"]} == {"checkpoint", "task", "source", "rule"}


def test_the_same_prompt_stands_side_by_side(sweep: Path) -> None:
    rows, data = reported(sweep)
    first = data["maps"][0]
    id = first["prompt"]
    assert id == read_rows(sweep / "0/attributions")[0]["id"]
    assert sorted(rows[place]["run"] for place, _ in first["of"]) == ["0", "1", "10", "11"]
    for place, shown in first["of"]:
        ids = [row["id"] for row in read_rows(sweep / rows[place]["run"] / "attributions")]
        attribution = read_attributions(sweep / rows[place]["run"] / "attributions")[ids.index(id)]
        view = data["prompts"][shown]["views"]["tokens"]
        assert sorted(view["scores"]) == pytest.approx(
            sorted(attribution.scores.tolist()), rel=1e-3, abs=1e-5
        )
    # two models under the same setting follow one another
    settings = [data["runs"][place]["setting"] for place, _ in first["of"]]
    assert settings == sorted(settings, key=settings.index)


def test_a_checkpoint_is_an_axis(sweep: Path, checkpoint: Path) -> None:
    rows, data = reported(sweep)
    assert rows[-1]["checkpoint"] == str(checkpoint)
    assert rows[-1]["fingerprint"] != rows[0]["fingerprint"]
    assert data["runs"][-1]["model"] == f"tiny + {checkpoint}"
    changed = [1.01 * read_attributions(sweep / "0/attributions")[0].value]
    assert read_attributions(sweep / "11/attributions")[0].value != pytest.approx(changed[0], rel=1e-3)


def test_runs_without_results_are_told_with_the_reason(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "0/summary.json").unlink()
    (copied / "1/summary.json").write_text('{"prompts": 3')
    (copied / "2/attributions/attributions.parquet").write_bytes(b"PAR1 and no more")
    (copied / "12/.hydra").mkdir(parents=True)
    shutil.copy(copied / "0/config.yaml", copied / "12/.hydra/config.yaml")
    (copied / "13").mkdir()
    (copied / "13/config.yaml").write_text("task_name: train\n")
    (copied / "14").mkdir()
    (copied / "14/config.yaml").write_text("task: [unclosed\n")
    assert sweep_report.report_sweep(copied, Console(width=200)) == 1
    said = capsys.readouterr().out
    rows, data = reported(copied)
    states = {row["run"]: (row["status"], row["reason"]) for row in rows if row["status"] != "done"}
    assert list(states) == ["0", "1", "2", "12", "13", "14"]
    assert states["0"][0] == "unfinished"
    assert states["0"][1].startswith("3 rows are done")
    for name, reason in {
        "1": "cannot be read",
        "2": "cannot be read",
        "12": "failed before it started",
    }.items():
        assert states[name][0] == "broken"
        assert reason in states[name][1]
    assert states["13"][1] == "it is not an analysis"
    assert "configuration cannot be read" in states["14"][1]
    text = Elements(page_of(copied)).text
    for name, (status, reason) in states.items():
        assert re.search(rf"{status} +{name}: ", said)
        assert reason.split("\n")[0] in text
    assert all(data["runs"][place]["page"] for own in data["maps"] for place, _ in own["of"])


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrst"))


def test_no_run_ends_the_others_report(copied: Path) -> None:
    """Whatever its files hold: that run is broken, with the reason in one line."""
    good = (copied / "0/config.yaml").read_text()
    configs = {
        "a bomb": BOMB + good,
        "too large": good + "#" * 2**18,
        "too deep": "task: " + "[" * 5000,
        "odd types": re.sub("^model:.*?^(?=\\w)", "model: 5\n", good, flags=re.DOTALL | re.MULTILINE),
    }
    for name, config in configs.items():
        shutil.copytree(copied / "0", copied / name)
        (copied / name / "config.yaml").write_text(config)
    (copied / "fifo").mkdir()
    os.mkfifo(copied / "fifo/config.yaml")
    changed = copied / "1/summary.json"
    changed.write_text(changed.read_text().replace('"prompts": 3', '"prompts": 7'))
    typed = copied / "2/summary.json"
    typed.write_text(typed.read_text().replace('"parameters": ', '"parameters": "many", "were": '))
    typed.with_name("SHA256SUMS").unlink()
    table = copied / "3/attributions/attributions.parquet"
    table.with_name("SHA256SUMS").unlink()
    rows = pq.ParquetFile(table).read()
    pq.write_table(rows.drop_columns(["scores"]), table)
    rows_of_10 = bytearray((copied / "10/attributions/attributions.parquet").read_bytes())
    rows_of_10[1000] ^= 4
    (copied / "10/attributions/attributions.parquet").write_bytes(rows_of_10)
    rows, _ = reported(copied)
    states = {row["run"]: row["reason"] for row in rows if row["status"] == "broken"}
    assert set(states) == {*configs, "fifo", "1", "2", "3", "10"}
    assert all(reason and "\n" not in reason for reason in states.values())
    for name, reason in {
        "a bomb": "has aliases",
        "too large": "too large",
        "fifo": "not a regular file",
        "1": "summary.json is damaged",
        "10": "attributions.parquet is damaged",
    }.items():
        assert reason in states[name]
    assert {row["run"] for row in rows if row["status"] == "done"} == {"0", "11"}


def test_models_that_one_run_compared_are_runs(tmp_path: Path, checkpoint: Path) -> None:
    asked = ("task=known", "task.size=2", *QUICK)
    assert run(tmp_path / "sweep/0", f"compare=[tiny,{checkpoint}]", *asked) == 0
    rows, data = reported(tmp_path / "sweep")
    assert [(row["run"], row["model"]) for row in rows] == [("0/last.ckpt", "last.ckpt"), ("0/tiny", "tiny")]
    assert [len(own["of"]) for own in data["maps"]] == [2, 2]


def test_only_some_prompts_are_shown_those_first_that_most_runs_have(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_report, "SHOWN", 6)
    monkeypatch.setattr(sweep_report, "BATCH_ROWS", 2)
    rows, data = reported(sweep)
    assert [len(own["of"]) for own in data["maps"]] == [4, 4, 4, 2, 2, 2]
    # the run with five prompts first: two of them it has alone
    held = Counter(own.prompt for own in sweep_report.read_maps(rows[::-1]))
    assert list(held.values()) == [4, 4, 4, 2, 2, 2]
    assert [name.split("-")[0] for name in held] == 3 * ["ioi"] + 3 * ["known"]
    monkeypatch.setattr(sweep_report, "MAPS", 9)
    assert list(Counter(own.prompt for own in sweep_report.read_maps(rows)).values()) == [4, 4]


def test_ids_that_two_tasks_share_are_two_prompts(copied: Path) -> None:
    for name in ("0", "2"):
        path = copied / name / "attributions/attributions.parquet"
        path.with_name("SHA256SUMS").unlink()
        table = pq.ParquetFile(path).read()
        same = pa.array([f"mine-{i}" for i in range(len(table))])
        pq.write_table(table.set_column(table.schema.get_field_index("id"), "id", same), path)
    rows, data = reported(copied)
    held = {own["prompt"]: [rows[place]["run"] for place, _ in own["of"]] for own in data["maps"]}
    assert held["ioi mine-0"] == ["0"]
    assert held["known mine-0"] == ["2"]


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    rows = [{"run": NASTY, "status": "done", "reason": None, "model": NASTY, "task": NASTY, "rule": NASTY}]
    rows += [{"run": "1", "status": "broken", "reason": NASTY, "model": "b", "task": "c", "rule": "d"}]
    write_sweep_page(tmp_path / "sweep.html", rows, [Map(NASTY, NASTY, nasty(), {})], title=NASTY)
    page = page_of(tmp_path)
    assert [tag for tag, _ in Elements(page).found].count("script") == 2
    assert NASTY not in page
    assert data_of(page)["runs"][0]["model"] == NASTY
    assert "default-src 'none'" in page


def test_what_cannot_be_reported_on(tmp_path: Path) -> None:
    with pytest.raises(DePassError, match="no folder"):
        sweep_report.report_sweep(tmp_path / "gone", NOTHING)
    for write in (lambda: sweep_report.report_sweep(" ", NOTHING), lambda: write_timelines("")):
        with pytest.raises(DePassError, match="names no folder"):
            write()
    with pytest.raises(DePassError, match="holds no runs"):
        sweep_report.report_sweep(tmp_path, NOTHING)
    with pytest.raises(DePassError, match="at least one run"):
        write_sweep_page(tmp_path / "sweep.html", [], [], title="")
    assert list(tmp_path.iterdir()) == []
    assert varying([{"model": "a", "seed": 0}, {"model": "a", "seed": 1}]) == ["seed"]


def test_a_name_says_what_differs_from_the_defaults() -> None:
    tokens = {"_target_": "depass_lightning.sources.Tokens", "layer": 0, "exclude_first": True}
    assert sweep_report.labelled(tokens) == "tokens"
    assert sweep_report.labelled(tokens | {"layer": 3}) == "tokens layer=3"
    assert sweep_report.labelled({"_target_": "gone.Source", "layer": 3, "path": None}) == "source layer=3"


def test_a_narrow_terminal_has_every_number(copied: Path) -> None:
    rows = [row for run in sweep_report.find_runs(copied) for row in sweep_report.read_runs(run, copied)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sweep_report.sweep_table([row | {"seconds": 97.5, "patch_top_area": None} for row in rows]))
    shown = console.export_text()
    assert shown.count(" 97.5") == len(rows)
    assert "seconds" in shown


def test_the_command_reports(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "own", f"sweep_report={copied}") == 0
    assert f"page     {copied}/sweep.html" in capsys.readouterr().out
    assert not (tmp_path / "own").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_tables_and_maps(copied: Path) -> None:
    sweep_report.report_sweep(copied, NOTHING)
    page = drawn(copied, "sweep.html")
    table = page.split('id="matrix-body"', 1)[1].split("</table>", 1)[0]
    assert re.findall(r'<th scope="col">(\w+)</th>', table) == ["ioi", "known"]
    assert 'href="0/report.html"' in table
    maps = page.split('id="maps-body"', 1)[1].split("</section>", 1)[0]
    assert maps.count("<article") == 4
    assert maps.count('class="prompt"') == 3  # one is of heads
    assert page.split('id="runs"', 1)[1].count("<tr") == 7


def test_what_a_results_folder_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "foreign_source.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert sweep_report.labelled({"_target_": "foreign_source.Source", "layer": 3}) == "source layer=3"
    assert not ran.exists()
