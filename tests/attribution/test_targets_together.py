"""Several targets at once: the same numbers as one call a target, from one recorded pass."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from depass_lightning import (
    Attribution,
    Attributions,
    Contrast,
    DePass,
    DePassError,
    Direction,
    Heads,
    Neurons,
    ProbeLogit,
    Token,
    Tokens,
)
from depass_lightning.engine.record import record
from depass_lightning.reports.matrix import score_matrix
from depass_lightning.targets import TargetLike
from tests.reference.models import build, prompt

pytestmark = pytest.mark.covering

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "Then, Nicole and Amanda had a lot of fun at the pool. Amanda showed a lamp to"
VECTOR = torch.linspace(-1, 1, 64)
TARGETS: list[Any] = [
    " Mary",
    Contrast(" Mary", " John"),
    Token(" drink", position=-3),
    Direction(VECTOR, layer=2),
    Direction(VECTOR),
    None,
    Direction(VECTOR, layer=2, position=4),
]


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def must_equal(own: Attribution, alone: Attribution) -> None:
    torch.testing.assert_close(own.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert own.value == pytest.approx(alone.value, rel=1e-4, abs=1e-5)
    for name in ("names", "positions", "target", "position", "text", "rank", "prediction", "groups"):
        assert getattr(own, name) == getattr(alone, name), name


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("source", [Tokens(), Heads(0), Neurons(1)])
def test_each_target_is_as_if_alone(tiny: DePass, rule: Any, source: Any) -> None:
    found = tiny.attribute(TEXT, TARGETS, source=source, rule=rule)
    assert isinstance(found, Attributions)
    for own, target in zip(found, TARGETS, strict=True):
        must_equal(own, tiny.attribute(TEXT, target, source=source, rule=rule))
    assert found.scores.shape == (len(TARGETS), len(found.names))
    torch.testing.assert_close(found.scores.sum(1), found.values, rtol=1e-4, atol=1e-4)
    assert found.targets[1:3] == ["' Mary' − ' John'", "' drink'"]
    assert found.completeness.max() < 1e-5
    assert len(found[1:3]) == 2
    assert "' drink'" in repr(found)


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_lists_of_prompts_take_lists_of_targets(tiny: DePass, rule: Any) -> None:
    targets: list[list[TargetLike]] = [[" Mary", " John", Token(" drink", position=-3)], [" Nicole"]]
    found = tiny.attribute([TEXT, OTHER], targets, rule=rule)
    assert [len(own) for own in found] == [3, 1]
    for text, own, aims in zip([TEXT, OTHER], found, targets, strict=True):
        for each, aim in zip(own, aims, strict=True):
            must_equal(each, tiny.attribute(text, aim, rule=rule))


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_several_sources_are_the_outer_list(tiny: DePass, rule: Any) -> None:
    sources = [Tokens(), Heads()]
    found = tiny.attribute_sources(TEXT, [" Mary", " John"], sources, rule=rule)
    assert [own[0].source for own in found] == ["tokens", "heads"]
    for own, source in zip(found, sources, strict=True):
        for each, aim in zip(own, (" Mary", " John"), strict=True):
            must_equal(each, tiny.attribute(TEXT, aim, source=source, rule=rule))
    nested = tiny.attribute_sources([TEXT], [[" Mary", " John"]], sources, rule=rule)
    must_equal(nested[0][1][1], found[1][1])


def test_ids_take_them_too() -> None:
    depass, ids = DePass(build("llama-biases")), prompt(9)[None].repeat(2, 1)
    (first, _second) = depass.attribute(input_ids=ids, target=[[3, 5], [Contrast(3, 5)]])
    (alone, _) = depass.attribute(input_ids=ids, target=5)
    must_equal(first[1], alone)
    assert first.names[-1] == "bias"


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_the_prompt_is_recorded_once(monkeypatch, rule: Any, tiny: DePass) -> None:
    passes = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        passes.append(arguments)
        return record(*arguments, **keywords)

    monkeypatch.setattr("depass_lightning.attribution.forward.record", counted)
    tiny.attribute(TEXT, TARGETS, rule=rule)
    assert len(passes) == 1


def test_a_batch_keeps_apart_what_is_read_behind_the_final_norm_and_before_it(tiny: DePass) -> None:
    targets: list[Any] = [" Mary", Direction(VECTOR)]
    for text, own, target in zip([TEXT, TEXT], tiny.attribute([TEXT, TEXT], targets), targets, strict=True):
        must_equal(own, tiny.attribute(text, target))


@pytest.mark.parametrize("source", [Tokens(), Heads(), Neurons(1)])
def test_they_are_shown_as_a_matrix(tiny: DePass, source: Any) -> None:
    found = tiny.attribute(TEXT, [" Mary", Contrast(" Mary", " John")], source=source)
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(score_matrix(found, 90))
    shown = console.export_text()
    assert "' Mary' − ' John'" in shown
    assert shown.count("+10") + shown.count("−10") >= 2
    assert max(map(len, shown.splitlines())) <= 90
    strongest = found[0].names[int(found.scores[0].abs().argmax())].strip()
    if source == Tokens():
        assert strongest in shown
    assert len(shown.splitlines()) < 40


class Probe:
    """A fitted linear probe, whose intercept is most of its logit."""

    coef_ = VECTOR[None].numpy()
    intercept_ = (torch.ones(1) * 7).numpy()


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("source", [Tokens(), Heads(0), Neurons(1)])
def test_a_probes_intercept_is_a_component_where_the_model_has_no_constants(
    tiny: DePass, rule: Any, source: Any
) -> None:
    probe = ProbeLogit(Probe(), layer=2)
    own = tiny.attribute(TEXT, probe, source=source, rule=rule)
    assert own.names[-1] == "bias"
    assert own.scores[-1] == pytest.approx(7)
    assert own.completeness < 1e-5
    both = tiny.attribute(TEXT, [" Mary", probe], source=source, rule=rule)
    must_equal(both[1], own)
    assert both.scores[0, -1] == 0
    assert both.completeness.max() < 1e-5
    dropped = tiny.attribute(TEXT, probe, source=source, rule=rule, bias="drop")
    assert dropped.value - dropped.scores.sum().item() == pytest.approx(7, rel=1e-4)


REFUSED: list[tuple[Any, Any, str]] = [
    (TEXT, [], "the list of targets is empty"),
    (TEXT, [" Mary", [" John"]], r"target \[' John'\] is a list"),
    (TEXT, [" Mary", 3.5], "target 3.5 is a float"),
    (TEXT, [" Mary", " Zarathustra"], "not in the model's vocabulary"),
    ([TEXT, OTHER], [" Mary"], "there are 1 targets for 2 prompts"),
    ([TEXT, OTHER], [[" Mary"], []], "the list of targets of prompt 1 is empty"),
    ([TEXT, OTHER], [[" Mary"], " Nicole"], "the target of prompt 1 is not a list"),
]


@pytest.mark.parametrize(("text", "target", "message"), REFUSED)
def test_bad_lists_are_named(tiny: DePass, text: Any, target: Any, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        tiny.attribute(text, target)


def test_attributions_have_the_same_components(tiny: DePass) -> None:
    one, other = tiny.attribute([TEXT, OTHER])
    with pytest.raises(DePassError, match="not over the same components"):
        Attributions([one, other])
    with pytest.raises(DePassError, match="no attribution of any target"):
        Attributions([])
    assert Attributions([one]).words().names == one.words().names
