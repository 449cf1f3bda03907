"""Several sources from one pass, each under its own name, and the settings that attributing takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depass_lightning import DePass, DePassError, Heads, Tokens
from depass_lightning.attribution import scoring
from depass_lightning.callbacks import DePassCallback
from depass_lightning.engine.rule_files import rule_content
from depass_lightning.monitoring.sources import name_sources
from depass_lightning.storage import read_attributions
from depass_lightning.tasks import Example
from tests.reference.training import PROMPTS, OwnModule, fit, trainer


def run(folder: Path, callback: DePassCallback, **options: Any) -> DePassCallback:
    fit(trainer(folder, [callback], **({"max_steps": 2} | options)), OwnModule())
    return callback


def test_sources_have_names() -> None:
    assert name_sources(None) == {"tokens": Tokens()}
    assert name_sources("heads") == {"heads": Heads()}
    assert name_sources(["tokens", Heads(1)]) == {"tokens": Tokens(), "heads": Heads(1)}
    assert name_sources({"early": Tokens(1), "late": "tokens"}) == {"early": Tokens(1), "late": Tokens()}


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: name_sources("words"), "source 'words' is none of tokens, spans, turns, documents, heads"),
    (lambda: name_sources("subspace"), "give load_subspace"),
    (lambda: name_sources([]), "source is empty"),
    (lambda: name_sources([3]), "source 3 is none of"),  # type: ignore[list-item]
    (lambda: name_sources([Tokens(), Tokens(1)]), "two sources are both called 'tokens'"),
    (lambda: DePassCallback(heat=1.0), "no setting 'heat'; there are rule, temperature"),  # type: ignore[call-arg]
    (lambda: DePassCallback(max_overhead=0.0), "max_overhead is a fraction of the time"),
    (lambda: DePassCallback(faithfulness=-1), "faithfulness must be a number of probes"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_choices_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DePassError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "gold"}, "gold"),
        ({"engine": "magic"}, "engine='magic' is unknown"),
        ({"attention_path": "control", "rule": "half"}, "control"),
        ({"source": Tokens(7)}, "layer 7 is out of range"),
        ({"rule": "softmax", "engine": "adjoint"}, "adjoint"),
    ],
)
def test_settings_that_fit_no_probe_end_training_before_it_begins(
    tmp_path: Path, settings: Any, message: str
) -> None:
    module = OwnModule()
    callback = DePassCallback(list(PROMPTS), **settings)
    with pytest.raises(DePassError, match=message):
        fit(trainer(tmp_path, [callback]), module)
    assert module.losses == []


def test_several_sources_share_one_backward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as many as one source takes: a pass for each batch of each run."""
    passes, calls = [], []
    backward, attribute = scoring.backward, DePass.attribute_sources

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        return backward(*arguments, **options)

    def called(self: DePass, *arguments: Any, **options: Any) -> Any:
        calls.append(len(options["sources"]))
        return attribute(self, *arguments, **options)

    monkeypatch.setattr(scoring, "backward", counted)
    monkeypatch.setattr(DePass, "attribute_sources", called)
    counts = []
    for source in ("tokens", ["tokens", "heads", "modules"]):
        passes.clear()
        calls.clear()
        callback = DePassCallback(list(PROMPTS), source=source, rule="taylor", batch_size=5)
        run(tmp_path / str(len(source)), callback)
        counts.append((len(passes), calls.copy()))
    assert counts == [(2, [1, 1]), (2, [3, 3])]


def test_each_source_is_logged_apart(tmp_path: Path) -> None:
    text, answer = PROMPTS[0]
    example = Example("io", text, answer, " John", {"io": ((5, 9),)}, ("io",))
    both = DePassCallback({"ioi": [example]}, source=["tokens", "heads"], rule="taylor")
    trained = trainer(tmp_path / "both", [both])
    fit(trained, OwnModule())
    alone = run(tmp_path / "alone", DePassCallback({"ioi": [example]}, rule="taylor"), max_steps=6)
    assert set(both.history) == {"ioi/tokens", "ioi/heads"}
    assert both.history["ioi/tokens"].curves == alone.history["ioi"].curves
    heads = both.history["ioi/heads"].curves
    assert heads["value"] == both.history["ioi/tokens"].curves["value"]
    assert heads["entropy"] != both.history["ioi/tokens"].curves["entropy"]
    # heads stand for no text: nothing can be removed, and nothing is a right token
    assert {"on_target", "faithfulness"} <= set(both.history["ioi/tokens"].curves)
    assert not {"on_target", "faithfulness"} & set(heads)
    assert "depass/ioi/heads/entropy" in trained.callback_metrics
    assert "depass/ioi/entropy" not in trained.callback_metrics
    folder = tmp_path / "both/depass/ioi"
    assert {path.name for path in folder.iterdir()} == {"tokens", "heads"}
    [found] = read_attributions(folder / "heads/step-000006.parquet")
    assert (found.source, found.groups) == ("heads", 2)
    assert json.loads((folder / "heads/history.json").read_text())["steps"] == [0, 2, 4, 6]


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    """Against the same prompts attributed by hand before training."""
    module = OwnModule()
    depass = DePass(module.inside.lm.eval(), module.tokenizer)
    prompts, targets = zip(*PROMPTS, strict=True)
    choices: list[dict[str, Any]] = [
        {"rule": "softmax", "temperature": 0.7},
        {"rule": "taylor", "attention_path": "control"},
        {"rule": "linear", "engine": "propagate", "bias": "drop"},
    ]
    expected = [depass.attribute(list(prompts), list(targets), **choice) for choice in choices]
    for i, choice in enumerate(choices):
        run(tmp_path / str(i), DePassCallback(list(PROMPTS), **choice))
        found = read_attributions(tmp_path / str(i) / "depass/probes/step-000000.parquet")
        for own, wanted in zip(found, expected[i], strict=True):
            assert own.names == wanted.names
            assert own.scores.tolist() == pytest.approx(wanted.scores.tolist(), rel=1e-4, abs=1e-6)


def test_a_calibrated_rule_is_used_like_any_other(tmp_path: Path) -> None:
    module = OwnModule()
    decoder = DePass(module.inside.lm).decoder
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(rule_content([(0.7, 0.4)] * len(decoder.blocks), decoder)))
    callback = DePassCallback(list(PROMPTS), rule=str(path), on_error="raise")
    fit(trainer(tmp_path, [callback], max_steps=1), module)
    (history,) = callback.history.values()
    assert max(history.curves["completeness"]) < 1e-2
    path.write_text(json.dumps(rule_content([(0.7, 0.4)], decoder)))
    with pytest.raises(DePassError, match="with 1 blocks; this one is of type"):
        fit(trainer(tmp_path, [DePassCallback(list(PROMPTS), rule=str(path))], max_steps=1), OwnModule())
