"""Rules fitted to true ablations: planted weights are found again, and the file is a rule like others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from depass_lightning import DePass, DePassError, Token, tasks
from depass_lightning.attribution.question import Question
from depass_lightning.engine.linear_rules import CalibratedRule, HalfRule
from depass_lightning.faithfulness import Interval, ablation_effects
from depass_lightning.methods import make_method
from depass_lightning.prompts import prompts_of
from depass_lightning.studies.calibration.fit import Ablated, ablate, depth_of, fit, scores_of
from depass_lightning.studies.calibration.study import Calibration
from tests.reference.models import build, prompt

PLANTED = ((0.8, 0.35), (0.8, 0.35), (0.3, 0.6))  # two depths of three blocks


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def test_planted_weights_are_found_again() -> None:
    """In the place of true effects: the scores of a rule, of another size and mean for each prompt."""
    depass = DePass(build("llama-biases", dtype=torch.float64))
    kinds = ["heads", "mlps", "tokens"]
    ids = torch.stack([prompt(8, seed=seed) for seed in range(4)])
    prompts = prompts_of(depass.decoder, None, None, ids, None)
    questions = [Question.of(depass.decoder, None, entry, Token(5)) for entry in prompts]
    rule = CalibratedRule(blocks=tuple(CalibratedRule.weights(*pair) for pair in PLANTED))
    scored = scores_of(depass, questions, kinds, rule, 4)
    indices = [[list(range(len(scores))) for scores in by_kind] for by_kind in scored]
    effects = [
        [{"zero": (row + 1) * scores.scores + row} for scores in by_kind]
        for row, by_kind in enumerate(scored)
    ]
    planted = Ablated(questions, kinds, indices, effects)
    assert [depth_of(block, 3, 2) for block in range(3)] == [0, 0, 1]
    weights = fit(depass, planted, depths=2)
    for weight, expected in zip(weights, PLANTED, strict=True):
        assert weight == pytest.approx(expected, abs=0.02)
    perfect = planted.agreements(depass, rule)
    assert [value for row in perfect for value in row.values()] == pytest.approx([1] * 12)
    assert float(planted.residuals(depass, rule).square().sum()) == pytest.approx(0, abs=1e-9)
    half = [value for row in planted.agreements(depass, HalfRule()) for value in row.values()]
    squares = float(planted.residuals(depass, HalfRule()).square().sum())
    assert squares == pytest.approx(1 - sum(half) / len(half), rel=1e-6), "one less the mean correlation"


def test_effects_are_those_of_true_ablation(tiny: DePass) -> None:
    examples = list(tasks.load("ioi", size=2))
    ablated = ablate(tiny, examples, ["mlps", "tokens"], ["zero", "mean"], "contrast")
    for row, example in enumerate(examples):
        half = tiny.attribute(example.prompt, example.target(), rule="half")
        for name in ("zero", "mean"):
            references = [tiny.attribute(other.prompt, other.target()).token_ids for other in examples]
            (losses,) = ablation_effects(tiny.decoder, [half], name, references=references)
            assert ablated.indices[row][1] == list(losses)
            torch.testing.assert_close(
                ablated.effects[row][1][name], torch.tensor([*losses.values()]), rtol=1e-3, atol=1e-4
            )


def test_a_rule_is_fitted_written_judged_and_used(tiny: DePass, tmp_path: Path) -> None:
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        overrides = [
            "experiment=calibrate",
            "study.size=2",
            "study.pool=20",
            "study.components=[mlps,tokens]",
        ]
        config = compose("analyze", [*overrides, "study.judged=[{task: known}]", "study.depths=2"])
    study = instantiate(config.study, _convert_="all")
    result = study.run(tiny, tmp_path)
    path = tmp_path / "rule.json"
    content = json.loads(path.read_text())
    assert len(content["blocks"]) == len(tiny.decoder.blocks)
    assert len(content["fitted_on"]["prompts"]) == 2
    assert content["model"]["fingerprint"]
    assert (tmp_path / "report.html").exists()
    data = ["ioi, development", "ioi, held_out", "known, held_out"]
    assert [(row["data"], row["rule"]) for row in result.table] == [
        (name, rule) for name in data for rule in ("half", "shap", "calibrated")
    ]
    half, _, calibrated = result.table[:3]
    for row in (half, calibrated):
        assert isinstance(row["agreement"], Interval)
        assert {"mlps_zero", "mlps_mean", "tokens_zero", "tokens_mean"} <= set(row)
    assert calibrated["agreement"].value >= half["agreement"].value - 1e-3  # type: ignore[union-attr]
    verdicts = [note for note in result.notes if "the calibrated rule's agreement" in note]
    assert len(verdicts) == 3
    assert all(note.endswith("is not separable.") for note in verdicts), "two prompts decide nothing"
    example = tasks.load("ioi", size=1)[0]
    direct = tiny.attribute(example.prompt, example.target(), rule=str(path))
    assert direct.completeness < 1e-3
    by_method = make_method("calibrated", tiny, path=str(path)).attribute(example.prompt, example.target())
    assert torch.equal(by_method.scores, direct.scores)
    with pytest.raises(DePassError, match="calibrated needs the rule's file"):
        make_method("calibrated", tiny)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": ["heads", "words"]}, "components are heads, mlps, tokens, one at least; got words"),
        ({"ablations": []}, "ablations are zero, mean, one at least; got none"),
        ({"target": "own"}, "target must be contrast"),
        ({"depths": 0}, "size and depths must be at least 1; got 16 and 0"),
        ({"split": "held_out"}, "judged on held_out prompts"),
        ({"judged": [{"path": "known.json"}]}, "an entry of judged has task and path"),
        ({"depths": 99}, "depths is 99, but the model has"),
        ({"path": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_wrong_settings_are_named(tiny: DePass, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        Calibration(**settings).run(tiny, tmp_path)
    assert not list(tmp_path.iterdir())
