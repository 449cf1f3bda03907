"""The paper's comparison: differences by hand, and a whole run on a few of the bundled model's prompts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from depass_lightning import DePass, DePassError, LogOdds, tasks
from depass_lightning.faithfulness import Interval, area
from depass_lightning.methods import METHODS, DePassMethod
from depass_lightning.storage import read_rows
from depass_lightning.studies import read_experiment
from depass_lightning.studies.comparison import study as module
from depass_lightning.studies.comparison.method_runs import (
    HEAD_METHODS,
    MLP_METHODS,
    NEURON_METHODS,
    TOKEN_METHODS,
    MethodRun,
    compare_rows,
    lower_is_better,
    notes_on,
)
from depass_lightning.studies.comparison.prompt_splits import SHARES, sampled, split_of
from depass_lightning.studies.comparison.study import LISTED, Components, MethodComparison
from depass_lightning.utils.bootstrap import bootstrap


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


OPTIONS: dict[str, Any] = {"integrated_gradients": {"steps": 4}, "gradient_shap": {"samples": 4}}


@pytest.mark.slow
def test_methods_are_compared_on_tokens(depass: DePass, tmp_path: Path) -> None:
    found = MethodComparison(size=4, pool=5, options=OPTIONS, percents=(0, 20, 100)).run(depass, tmp_path)
    assert (found.name, found.prompts) == ("paper_tokens", 4)
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
    assert read_experiment(tmp_path).table == list(found.table)
    rows = read_rows(tmp_path / "rows" / "occlusion.parquet")
    areas = [area(row["percents"], row["patch_top"]) for row in rows]
    assert by_name["occlusion"]["patch_top_area"] == bootstrap(areas)
    assert any("Ahead of DePass" in note or "No method is ahead" in note for note in found.notes)


@pytest.mark.slow
def test_methods_are_compared_on_heads_and_neurons(depass: DePass, tmp_path: Path) -> None:
    listed: dict[Components, tuple[str, ...]] = {"heads": HEAD_METHODS, "neurons": NEURON_METHODS}
    for components, methods in listed.items():
        study = MethodComparison(components, size=2, pool=3, percents=[0, 5, 20], top=4)
        found = study.run(depass, tmp_path / components)
        assert [row["method"] for row in found.table] == list(methods)
        assert {panel.name for panel in found.panels} >= {"mask top", "mask bottom"}
        for panel in found.panels[:2]:
            assert all(curve.y[0] == 1 for curve in panel.curves.values()), "all prompts are answered right"
        assert {"mask_top_5%", "mask_bottom_20%", "mask_top_area_difference"} <= set(found.columns())


@pytest.mark.usefixtures("undrawn")
def test_methods_that_are_done_are_not_run_again(depass: DePass, tmp_path: Path, monkeypatch) -> None:
    """Their rows and their time are read; rows of another comparison are refused."""
    few: dict[str, Any] = {"size": 3, "pool": 3, "percents": [0, 50], "zeroed": False}
    first = MethodComparison(methods=["depass", "random"], **few).run(depass, tmp_path)
    ran: list[str] = []
    run = module.run_method
    monkeypatch.setattr(
        module, "run_method", lambda own, *more, **also: ran.append(own.name) or run(own, *more, **also)
    )
    second = MethodComparison(methods=["depass", "random", "taylor"], **few).run(depass, tmp_path)
    assert ran == ["taylor"]
    for one, other in zip(first.table, second.table, strict=False):
        # p-values are corrected for the number of methods, which is another one now
        assert [(name, cell) for name, cell in one.items() if not name.endswith("_p")] == [
            (name, cell) for name, cell in other.items() if not name.endswith("_p")
        ]
    other = MethodComparison(methods=["depass"], **{**few, "percents": [0, 100]})
    with pytest.raises(DePassError, match=r"percents.* was .* and is"):
        other.run(depass, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_only_prompts_that_are_answered_right_are_compared_on(depass: DePass, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    good, prompt = tasks.load("ioi", size=1)[0], "When Mary and John went to the store, John gave it to"
    rows = [
        {"prompt": prompt, "target": " zebra", "id": "bad"},
        {"prompt": good.prompt, "target": good.answer},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    study = MethodComparison(
        "heads", task="jsonl", path=str(file), methods=["depass", "random"], percents=[0, 50]
    )
    found = study.run(depass, tmp_path)
    assert found.prompts == 1
    assert found.settings["answered_right"] == 1
    assert "answers 1 of 2 prompts right" in found.notes[0]
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(DePassError, match="none of 1 prompts"):
        study.run(depass, tmp_path)


@pytest.mark.slow
def test_the_target_is_that_of_the_study(depass: DePass, tmp_path: Path, monkeypatch) -> None:
    explained, original = [], DePassMethod.attribute

    def attribute(method, prompts, targets, **options):
        explained.extend(targets)
        return original(method, prompts, targets, **options)

    monkeypatch.setattr(DePassMethod, "attribute", attribute)
    few = {"size": 2, "pool": 3, "percents": [0, 100], "zeroed": False, "methods": ["half"]}
    MethodComparison(target="log_odds", against="half", **few).run(depass, tmp_path)
    assert explained
    assert all(isinstance(target, LogOdds) for target in explained)
    with pytest.raises(DePassError, match="target must be contrast, token, centred, log_odds"):
        MethodComparison(target="own")  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DePassError, match="components must be"):
        MethodComparison("layers")  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="one prompt at least"):
        MethodComparison(size=0)
    with pytest.raises(DePassError, match="percents must rise"):
        MethodComparison(percents=[5, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["depass", "sage"]}, "no method 'sage'"),
        ({"methods": ["random"]}, "held against depass; name it among random"),
        ({"methods": ["depass", "atp"]}, "atp does not score Tokens"),
        ({"components": "heads", "methods": ["depass", "activation"]}, "activation does not score Heads"),
        ({"options": {"integrated_gradients": {"step": 4}}}, "no option 'step'; it takes steps, rows"),
        ({"options": {"integrated_gradient": {"steps": 4}}}, "no method 'integrated_gradient'"),
        ({"components": "heads", "layer": 9}, "layer"),
        ({"path": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(
    depass: DePass, tmp_path: Path, monkeypatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(module, "answered_right", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(DePassError, match=message):
        MethodComparison(**settings).run(depass, tmp_path)
    assert not list(tmp_path.iterdir())


def test_p_values_are_corrected_for_the_number_of_methods() -> None:
    """Ten prompts, each 0.1 worse by one method, by turns better and worse by the other."""
    ours = [[1.0, 0.1 * i] for i in range(10)]
    runs = {
        "depass": MethodRun(rows(ours, [None] * 10), 1.0),
        "worse": MethodRun(rows([[top, low + 0.2] for top, low in ours], [None] * 10), 1.0),
        "level": MethodRun(
            rows([[top, low + 0.2 * (-1) ** i] for i, (top, low) in enumerate(ours)], [None] * 10), 1.0
        ),
    }
    _, table = compare_rows(runs)
    assert "patch_top_area_p" not in table[0]
    assert table[1]["patch_top_area_p"] == pytest.approx(2 * 2 / 2**10)
    assert table[2]["patch_top_area_p"] == 1
    _, table = compare_rows(runs, against="worse")
    assert notes_on(table, "worse")[2:] == ["Ahead of worse in patch_top_area: depass."]
    assert lower_is_better("kept_patch_top_log_odds_area")
    assert not lower_is_better("kept_patch_top_rank_area")
    assert lower_is_better("kept_recover_top_rank_area")
    assert not lower_is_better("ablation_zero_pearson")


def test_a_prompt_has_its_split_by_its_text() -> None:
    examples = list(tasks.load("ioi", size=200))
    by_split = {split: sampled(examples, split) for split in SHARES}
    assert sum(map(len, by_split.values())) == len(examples)
    for split, share in SHARES.items():
        assert len(by_split[split]) / len(examples) == pytest.approx(share, abs=0.1)
        assert {split_of(example.prompt) for example in by_split[split]} == {split}
        backwards = sampled(examples[::-1], split)
        assert [example.prompt for example in backwards] == [example.prompt for example in by_split[split]]
        other = sampled(examples, split, seed=1)
        assert other != by_split[split]
        assert {example.id for example in other} == {example.id for example in by_split[split]}
    assert sampled(examples, None) == examples
    with pytest.raises(DePassError, match="split must be"):
        sampled(examples, "test")  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="none of 0 prompts"):
        sampled([], "fresh")


@pytest.mark.slow
def test_methods_are_compared_with_true_ablation(depass: DePass, tmp_path: Path) -> None:
    """On held-out prompts, against another method than DePass, and the numbers are kept."""
    study = MethodComparison(
        "heads",
        split="held_out",
        size=3,
        methods=["atp", "taylor"],
        against="atp",
        percents=[0, 20],
        ablations=["zero", "mean"],
        circuits=True,
    )
    result = study.run(depass, tmp_path)
    assert [row["method"] for row in result.table] == ["atp", "taylor"]
    assert {
        f"ablation_{how}_{name}" for how in ("zero", "mean") for name in ("pearson", "spearman", "top")
    } <= {*result.columns()}
    assert "ablation_zero_pearson_p" in result.columns()
    cpr, cmd = (result.table[1][name] for name in ("cpr", "cmd"))
    assert isinstance(cpr, Interval)
    assert isinstance(cmd, Interval)
    assert cpr.low <= cpr.value <= cpr.high
    assert cmd.value >= 0
    assert "all of the split held_out" in result.notes[0]
    kept = read_rows(tmp_path / "rows" / "taylor.parquet")
    pearson = bootstrap([row["ablation_zero_pearson"] for row in kept])
    assert result.table[1]["ablation_zero_pearson"] == pearson
    again = study.run(depass, tmp_path)
    assert again.table == result.table
    more = MethodComparison(
        size=2,
        pool=2,
        methods=["taylor"],
        against="taylor",
        zeroed=False,
        percents=[0, 50],
        extra=["lds", "soft"],
    ).run(depass, tmp_path / "tokens")
    assert {"lds", "soft_sufficiency", "soft_comprehensiveness", "kept_patch_top_area"} <= {*more.columns()}
    assert {"kept_evidence_first", "kept_evidence_auroc"} <= {*more.columns()}
    assert not lower_is_better("soft_sufficiency")
    with pytest.raises(DePassError, match="extra measures are lds, soft"):
        MethodComparison(extra=["cpr"])  # type: ignore[list-item]
    with pytest.raises(DePassError, match="not of tokens"):
        MethodComparison(circuits=True)
    with pytest.raises(DePassError, match="held against occlusion"):
        MethodComparison(methods=["random"], against="occlusion").run(depass, tmp_path / "other")


@pytest.mark.parametrize("components", LISTED)
def test_the_experiments_run_as_configured(depass: DePass, tmp_path: Path, components: Components) -> None:
    """`experiment=compare_...` on the bundled model, with two of its methods."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose("analyze", [f"experiment=compare_{components}", "study.size=2", "study.pool=12"])
    study = instantiate(config.study, _convert_="all")
    assert (study.components, study.split, study.against) == (components, "development", "half")
    assert set(study.methods or LISTED[components]) <= set(METHODS)
    few = replace(study, methods=["half", "random"], percents=[0, 50])
    found = few.run(depass, tmp_path)
    assert [row["method"] for row in found.table] == ["half", "random"]
    measured = {*found.columns()}
    if components == "neurons":
        assert {"mask_top_area", "cpr"} <= measured
    else:
        assert {f"ablation_{name}_spearman_p" for name in ("zero", "mean")} <= measured


def test_methods_are_compared_on_mlps(depass: DePass, tmp_path: Path) -> None:
    study = MethodComparison("mlps", size=2, pool=3, ablations=["zero"], circuits=True)
    result = study.run(depass, tmp_path)
    assert [row["method"] for row in result.table] == list(MLP_METHODS)
    assert {"ablation_zero_pearson", "cpr", "cmd"} <= {*result.columns()}
    assert (tmp_path / "report.html").exists()
