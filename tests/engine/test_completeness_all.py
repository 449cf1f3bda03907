"""Scores and states add up for every source under every rule and for every kind of target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import (
    Components,
    Contrast,
    DePass,
    Direction,
    Heads,
    Module,
    Neurons,
    ProbeLogit,
    Spans,
    Subspace,
    Token,
    Tokens,
)
from tests.reference.models import build, distance, padded, prompt, real_states
from tests.reference.twin import LINEAR, RULES, Rule

pytestmark = pytest.mark.covering

LAYERS = 3
DIRECTIONS = torch.randn(5, 36, generator=torch.Generator().manual_seed(0))


class Probe:
    """What a fitted scikit-learn probe looks like."""

    coef_ = DIRECTIONS[4:].numpy()
    intercept_ = torch.tensor([0.7]).numpy()


def unequal_parts(state: Tensor) -> Tensor:
    """Four components that sum to a state, larger than it."""
    noise = torch.randn(3, *state.shape, generator=torch.Generator().manual_seed(1)).to(state) * 2
    return torch.cat([noise, (state - noise.sum(0))[None]])


# Each with the layer at which the last of its components has begun.
SOURCES: dict[str, tuple[Any, int]] = {
    "tokens": (Tokens(), 0),
    "tokens with the first": (Tokens(2, exclude_first=False), 2),
    "spans": (Spans([(3, 5), (1, 2)], "token"), 0),
    "spans with the first": (Spans([(0, 4)], "token", layer=1, exclude_first=False), 1),
    "heads": (Heads(), LAYERS),
    "heads at 1": (Heads(1), 2),
    "attention": (Module("attention"), LAYERS),
    "attention at 0": (Module("attention", 0), 1),
    "mlp": (Module("mlp"), LAYERS),
    "mlp at 1": (Module("mlp", 1), 2),
    "neurons": (Neurons(), LAYERS),
    "neurons at 0": (Neurons(0), 1),
    "some neurons": (Neurons(None, [5, 43]), LAYERS),
    "some neurons at 1": (Neurons(1, [0]), 2),
    "subspace": (Subspace(1, DIRECTIONS[0]), 1),
    "subspaces": (Subspace(0, [DIRECTIONS[:3], DIRECTIONS[3]]), 0),
}


# Each with the layer at which it is read.
TARGETS: dict[str, tuple[Any, int]] = {
    "token": (Token(7), LAYERS),
    "the model's own": (Token(), LAYERS),
    "contrast": (Contrast(7, 30, -2), LAYERS),
    "direction": (Direction(DIRECTIONS[4]), LAYERS),
    "direction at 2": (Direction(DIRECTIONS[4], 2, 4), 2),
    "probe": (ProbeLogit(Probe()), LAYERS),
    "probe at 2": (ProbeLogit(Probe(), 2), 2),
}


def inputs(count: int) -> dict[str, Any]:
    """As many prompts of nine and seven tokens in turn."""
    ids, mask = padded([prompt((9, 7)[row % 2], seed=row) for row in range(count)], "left")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["llama", "qwen3-biases"])
def test_scores_of_every_target(name: str, source: str, rule: Rule) -> None:
    own, begun = SOURCES[source]
    asked = {kind: target for kind, (target, layer) in TARGETS.items() if layer >= begun}
    if own.layers(LAYERS)[0] == 2:
        asked = {kind: target for kind, target in asked.items() if "at 2" not in kind}
    depass = DePass(build(name))
    engines = ("propagate", "adjoint") if rule in LINEAR else ("propagate",)
    for engine in engines:
        given = depass.attribute(
            **inputs(len(asked)), source=own, target=list(asked.values()), rule=rule, engine=engine
        )
        for kind, attribution in zip(asked, given, strict=True):
            assert attribution.scores.abs().sum() > 1e-2, kind
            assert attribution.completeness < 1e-5, (kind, engine)
            groups = attribution.scores.double().unflatten(0, (len(own.layers(LAYERS)), -1)).sum(1)
            scale = max(abs(attribution.value), float(attribution.scores.abs().max()))
            assert float((groups - attribution.value).abs().max()) < 1e-5 * scale, (kind, engine)


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
@pytest.mark.parametrize("rule", RULES)
def test_scores_of_given_components(name: str, rule: Rule) -> None:
    model = build(name)
    ids = prompt(9)
    source = Components(1, unequal_parts(real_states(model, ids)[1]))
    for kind, (target, _) in TARGETS.items():
        if target.position != -1:
            continue
        given = DePass(model).attribute(input_ids=ids[None], source=source, target=target, rule=rule)[0]
        assert given.completeness < 1e-5, kind


@pytest.mark.parametrize(("name", "budget"), [("llama-biases", 4_000), ("qwen3", None)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.covering(9)
def test_states_in_float64(name: str, source: str, budget: int | None) -> None:
    """Every group's, in chunks of any size."""
    model = build(name, dtype=torch.float64)
    batch = inputs(2)
    true = [real_states(model, ids[mask.bool()])[-1] for ids, mask in zip(*batch.values(), strict=True)]
    own, _ = SOURCES[source]
    for rule in RULES:
        given = DePass(model, memory_budget=budget).decompose(**batch, source=own, rule=rule)
        for found, state in zip(given, true, strict=True):
            for group in found.states.unflatten(0, (len(own.layers(LAYERS)), -1)).sum(1):
                assert distance(group, state) < 1e-10, rule
