"""`python analyze.py` in half precision: what the model rounds off is shown, and nothing rests on it."""

import json

import pytest

from depass_lightning import Contrast, DePass
from depass_lightning.storage import read_attributions
from tests.commands.test_analyze import run

PROMPT, TARGET = "When Mary and John went to the store, John gave a drink to", Contrast(" Mary", " John")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_from_the_command_to_the_page(dtype, tmp_path):
    assert run(tmp_path, f"model.dtype={dtype}", "task.size=6") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"]["dtype"] == dtype
    assert summary["settings"]["compute_dtype"] == "float32"
    assert summary["completeness_max"] < 1e-5
    assert 0 < summary["rounding"]["value"] < {"bfloat16": 0.1, "float16": 0.01}[dtype]
    assert summary["evidence_first"]["value"] > 0.5
    assert summary["patch_top_area"]["value"] < summary["patch_top_area"]["chance"]
    found = read_attributions(tmp_path / "attributions")
    assert {own.names[-1] for own in found} == {"rounding"}
    assert "rounding" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", ["heads", "modules", "neurons", "spans"])
def test_every_source_in_half_precision(source, tmp_path):
    words = ["model.dtype=bfloat16", f"source={source}", "rule=half", "task.size=2", "task=known"]
    assert run(tmp_path, *words) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["completeness_max"] < 1e-5
    assert summary["rounding"]["value"] < 0.1


def test_a_generation_in_half_precision(tmp_path):
    words = ["target=generation", "target.max_new_tokens=2", "task.size=2", "model.dtype=bfloat16"]
    assert run(tmp_path, *words) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["rounding"]["value"] < 0.1


def test_components_are_carried_in_the_chosen_precision(tmp_path):
    for name, words in (("plain", []), ("fine", ["compute_dtype=float64"])):
        assert run(tmp_path / name, "task.size=3", *words) == 0
    plain, fine = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "fine"))
    assert fine["settings"]["compute_dtype"] == "float64"
    assert fine["model"]["dtype"] == "float32"
    assert "rounding" not in plain
    assert 0 < fine["rounding"]["value"] < 1e-5


def test_what_is_said_of_words_keeps_rounding_apart():
    depass = DePass.from_pretrained("tiny", dtype="bfloat16")
    own = depass.attribute(PROMPT, TARGET)
    words = own.words()
    assert words.names[-1] == "rounding"
    assert words.completeness < 1e-5
    assert own.positive_fraction([(5, 9)]) > 0.5  # "Mary"
    assert own.without(["rounding"]).completeness == pytest.approx(
        abs(float(own.scores[-1])) / max(abs(own.value), float(own.scores.abs().max())), rel=1e-3
    )
