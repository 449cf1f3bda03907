"""Components at every layer, one layer after another."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from depass_lightning import DePass, DePassError, Heads, Module, Spans, Tokens
from tests.reference.models import build, distance, prompt

pytestmark = pytest.mark.covering

# What is split into, and the layers of three blocks at which all of it is there.
SOURCES: dict[str, tuple[Any, list[int]]] = {
    "tokens": (Tokens(), [0, 1, 2, 3]),
    "tokens in the middle": (Tokens(1), [1, 2, 3]),
    "tokens at the last block": (Tokens(-1), [2, 3]),
    "spans": (Spans([(1, 3), (5, 6)], "token"), [0, 1, 2, 3]),
    "one layer's heads": (Heads(1), [2, 3]),
    "all layers' heads": (Heads(), [3]),
    "all MLPs": (Module("mlp"), [3]),
}


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass(build("qwen2", dtype=torch.float64))


@pytest.mark.parametrize("rule", ["softmax", "max", "taylor"])
@pytest.mark.parametrize(("source", "layers"), SOURCES.values(), ids=SOURCES)
def test_every_layer_equals_that_layer_alone(
    depass: DePass, source: Any, layers: list[int], rule: Any
) -> None:
    ids = prompt(9)[None]
    tour = depass.decompose_layers(input_ids=ids, source=source, rule=rule)
    # All are kept here: what comes later must not change what was given before.
    found = list(tour)
    assert [entry.layer for entry in found] == layers
    for entry in found:
        alone = depass.decompose(input_ids=ids, source=source, rule=rule, to_layer=entry.layer)[0]
        assert entry.names == alone.names
        assert distance(entry.states, alone.states) < 1e-10


def test_layers_are_given_one_at_a_time(depass: DePass) -> None:
    tour = depass.decompose_layers(input_ids=prompt(9)[None])
    seen, held = [], []
    for entry in tour:
        held.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(entry.states))
        del entry
    assert held == [0, 0, 0, 0]
    assert all(reference() is None for reference in seen)


def test_nothing_runs_before_the_first_layer_is_asked_for(depass: DePass, monkeypatch) -> None:
    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("the model has run")

    monkeypatch.setattr(depass.model, "forward", must_not_run)
    tour = depass.decompose_layers(input_ids=prompt(9)[None])
    with pytest.raises(AssertionError, match="the model has run"):
        next(tour)
    with pytest.raises(DePassError, match="nothing to explain"):
        depass.decompose_layers()
    with pytest.raises(DePassError, match="there are 2 prompts"):
        depass.decompose_layers(input_ids=torch.stack([prompt(9), prompt(9, seed=1)]))


@pytest.mark.parametrize("source", [Heads(1), Module("mlp", 1)])
def test_a_layer_at_which_components_are_missing_is_refused(depass: DePass, source: Any) -> None:
    with pytest.raises(DePassError, match="begin after layer 1; take a later layer"):
        depass.decompose(input_ids=prompt(9)[None], source=source, to_layer=1)
