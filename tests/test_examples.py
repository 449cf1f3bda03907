"""The examples run, and print what their docstrings claim."""

import csv
import json
import runpy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import open_dict

from depass_lightning import DePass
from depass_lightning.commands.train import train
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"


def table(said: str) -> list[tuple[float, ...]]:
    """Return the rows of numbers in what an example has printed: step, probability, share."""
    rows = [line.split() for line in said.splitlines() if line[:4].strip().isdigit()]
    return [tuple(map(float, row)) for row in rows if len(row) == 3]


def test_own_script_learns_and_leaves_its_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "own_script.py"))["main"](steps=60)
    said = capsys.readouterr().out
    rows = table(said)
    assert [int(step) for step, *_ in rows] == [0, 20, 40, 60]
    probabilities = [probability for _, probability, _ in rows]
    assert probabilities[-1] > probabilities[0] + 0.2
    folder = tmp_path / "logs/own_script/version_0/depass/known"
    assert len(list(folder.glob("step-*.html"))) == 4
    assert str(folder.relative_to(tmp_path)) in said


def test_a_loop_without_a_framework_learns_and_leaves_its_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "training_loop.py"))["main"](steps=40)
    rows = table(capsys.readouterr().out)
    # The run in between is skipped where it would take more than the example's share of the time.
    assert [int(step) for step, *_ in rows] in ([0, 20, 40], [0, 40])
    assert rows[-1][1] > rows[0][1] + 0.2
    folder = tmp_path / "logs/training_loop"
    assert len(list((folder / "depass/known").glob("step-*.html"))) == len(rows)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["monitor"]["step"] == 40


def test_lora_moves_the_score_onto_the_subject_and_leaves_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "lora.py"))["main"](steps=50)
    (_, before, share_before), *_, (last, after, share_after) = table(capsys.readouterr().out)
    assert last == 50
    assert after > before + 0.2
    assert share_after > share_before + 0.2
    tiny = DePass.from_pretrained("tiny")
    adapter = tmp_path / "logs/lora/version_0/adapter"
    adapted = DePass(peft.PeftModel.from_pretrained(tiny.model, adapter), tiny.tokenizer)
    assert adapted.attribute("The capital of France is").completeness < 1e-4


@pytest.mark.slow
def test_forgetting_shows_in_the_probes_of_what_was_known(tmp_path: Path) -> None:
    quick = ["trainer.max_epochs=4", "callbacks.depass.size=8", "callbacks.depass.faithfulness=0"]
    quick += ["callbacks.depass.rule=softmax"]  # as in docs/training.md
    plain = ["logger=csv", "~callbacks.rich_progress_bar", "export_dir=null", "print_config=false"]
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose("train", overrides=["experiment=forgetting", *quick, *plain])
    with open_dict(config):
        config.paths.output_dir = config.paths.work_dir = str(tmp_path)
    assert not train(config)
    with (tmp_path / "csv/metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val/old_facts/accuracy"]][-1]
    assert float(last["val/new_facts/accuracy"]) > 0.9
    assert float(last["val/old_facts/accuracy"]) < 0.7
    curves = {
        name: json.loads((tmp_path / f"depass/{name}/history.json").read_text())["curves"]
        for name in ("new_facts", "old_facts", "ioi")
    }
    for curve, change in (("new_facts", 0.2), ("old_facts", -0.05)):
        share = curves[curve]["on_target"]
        assert (share[-1] - share[0]) / change > 1
    assert min(curves["old_facts"]["similarity_first"]) < 0.95
    assert curves["ioi"]["similarity_first"][-1] < 1
    for name in ("old_facts", "ioi"):
        assert curves[name]["value"][-1] < curves[name]["value"][0] - 1
