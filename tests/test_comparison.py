"""The paper's comparison: differences by hand, and all of it on a handful of the embedded model's prompts."""

from typing import Any

import pytest

from depass_lightning import DePass, DePassError, Heads, Neurons, tasks
from depass_lightning.experiments import read_experiment, write_experiment
from depass_lightning.experiments.comparison import (
    HEAD_METHODS,
    NEURON_METHODS,
    TOKEN_METHODS,
    MethodRun,
    compare_rows,
    paper_comparison,
    run_methods,
)
from depass_lightning.faithfulness import Interval, answered_right, bootstrap
from depass_lightning.tasks import Example


def rows(tops: list[list[float]], evidence: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "percents": [0.0, 100.0], "patch_top": top, "evidence_auroc": own}
        for i, (top, own) in enumerate(zip(tops, evidence, strict=True))
    ]


def test_differences_are_taken_prompt_by_prompt() -> None:
    """The other method is worse by 0.1 on every prompt, though prompts differ by much more."""
    ours = [[1.0, 0.0], [0.5, 0.1], [0.2, 0.0]]
    theirs = [[top[0], top[1] + 0.2] for top in ours]
    runs = {
        "depass": MethodRun(rows(ours, [0.5, None, 0.7]), 6.0),
        "other": MethodRun(rows(theirs, [0.4, 0.9, 0.9]), 1.5),
    }
    panels, table = compare_rows(runs)
    (panel,) = panels
    assert panel.name == "patch top"
    assert panel.curves["depass"].y == pytest.approx([1.7 / 3, 0.1 / 3])
    low = panel.curves["other"].low
    assert low is not None
    assert low[0] == pytest.approx(bootstrap([0.2, 0.5, 1.0]).low)
    first, second = table
    assert first["patch_top_area"] == bootstrap([0.5, 0.3, 0.1])
    assert "patch_top_area_difference" not in first
    difference = second["patch_top_area_difference"]
    assert isinstance(difference, Interval)
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.1, -0.1, -0.1))
    # The second prompt's evidence is known for one method alone.
    assert second["evidence_auroc_difference"] == bootstrap([0.5 - 0.4, 0.7 - 0.9])
    assert (first["seconds_per_prompt"], second["seconds_per_prompt"]) == (2.0, 0.5)


def test_rows_of_other_prompts_are_refused() -> None:
    own = MethodRun(rows([[1.0, 0.0]], [None]), 1.0)
    other = MethodRun([{**own.rows[0], "id": "7"}], 1.0)
    with pytest.raises(DePassError, match="other prompts"):
        compare_rows({"depass": own, "random": other})
    with pytest.raises(DePassError, match="no rows of 'depass'"):
        compare_rows({"random": own})
    with pytest.raises(DePassError, match="has no rows"):
        compare_rows({"depass": MethodRun([], 0.0)})


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.fixture(scope="module")
def examples(depass: DePass) -> list[Example]:
    task = tasks.load("ioi", size=10)
    return [task[i] for i in answered_right(depass, task)][:6]


OPTIONS: dict[str, Any] = {"integrated_gradients": {"steps": 4}, "gradient_shap": {"samples": 4}}


def test_methods_are_compared_on_tokens(depass: DePass, examples: list[Example], tmp_path: Any) -> None:
    found = paper_comparison("paper_tokens", depass, examples, data="ioi", options=OPTIONS)
    assert [row["method"] for row in found.table] == list(TOKEN_METHODS)
    by_name = {str(row["method"]): row for row in found.table}
    assert {panel.name for panel in found.panels} >= {"patch top", "recover top", "patch top, zeroed"}
    for panel in found.panels:
        assert list(panel.curves) == list(TOKEN_METHODS)
    starts = {round(curve.y[0], 5) for curve in found.panels[0].curves.values()}
    assert len(starts) == 1, "with nothing removed all methods are the model itself"
    depass_area, random_area = (by_name[name]["patch_top_area"] for name in ("depass", "random"))
    assert isinstance(depass_area, Interval)
    assert isinstance(random_area, Interval)
    assert depass_area.value < random_area.value
    difference = by_name["random"]["patch_top_area_difference"]
    assert isinstance(difference, Interval)
    assert difference.value == pytest.approx(depass_area.value - random_area.value)
    seconds = [row["seconds_per_prompt"] for row in found.table]
    assert all(isinstance(own, float) and own > 0 for own in seconds)
    write_experiment(found, tmp_path)
    assert read_experiment(tmp_path).table == list(found.table)


def test_methods_are_compared_on_heads_and_neurons(depass: DePass, examples: list[Example]) -> None:
    for name, methods in (("paper_heads", HEAD_METHODS), ("paper_neurons", NEURON_METHODS)):
        found = paper_comparison(name, depass, examples[:3], data="ioi", percents=[0, 5, 20, 50])
        assert [row["method"] for row in found.table] == list(methods)
        assert {panel.name for panel in found.panels} >= {"mask top", "mask bottom"}
        for panel in found.panels[:2]:
            assert all(curve.y[0] == 1 for curve in panel.curves.values()), "all prompts are answered right"
        assert {"mask_top_5%", "mask_bottom_20%", "mask_top_area_difference"} <= set(found.columns())
        assert any("Ahead of DePass" in note or "No method is ahead" in note for note in found.notes)


def test_a_method_may_have_a_source_of_its_own(depass: DePass, examples: list[Example]) -> None:
    runs = run_methods(
        depass,
        examples[:2],
        ["depass", "activation"],
        Neurons(0),
        sources={"depass": Neurons(0, top=8)},
        percents=[10],
    )
    assert [len(run.rows) for run in runs.values()] == [2, 2]
    with pytest.raises(DePassError, match="does not score Heads"):
        run_methods(depass, examples, ["activation"], Heads())
    with pytest.raises(DePassError, match="no prompts"):
        run_methods(depass, [])
    with pytest.raises(DePassError, match="choose one of paper_tokens"):
        paper_comparison("paper_layers", depass, examples, data="ioi")
