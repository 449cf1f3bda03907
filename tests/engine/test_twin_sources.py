"""Every kind of component against its naive float64 twin, under every rule and for every kind of target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import (
    Components,
    Contrast,
    DePass,
    DePassError,
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
from tests.reference import twin, twin_sources
from tests.reference.models import build, distance, padded, prompt, real_states
from tests.reference.twin import RULES, Rule, Trace
from tests.reference.twin_sources import Group

pytestmark = pytest.mark.covering

LENGTH = 9
LAYERS = 3
HIDDEN = 36
NAMES = ("llama", "llama-biases", "llama-mlp-biases", "mistral-window", "qwen2", "qwen3-biases")
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = [(name, torch.float64) for name in NAMES] + [("llama", torch.float32), ("qwen2", torch.float32)]
CHOSEN = (41, 0, 17)


def directions(count: int, seed: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


BASES = (directions(1, 0)[0], directions(3, 1), directions(2, 2))


def in_three(state: Tensor) -> Tensor:
    """Three components that sum to a state, of which one is zero at all but one position."""
    first, third = torch.randn(2, *state.shape, generator=torch.Generator().manual_seed(3)).double()
    third[torch.arange(len(state)) != 2] = 0
    return torch.stack([first, state - first - third, third])


@dataclass(frozen=True)
class Case:
    """A source, and its twin's groups."""

    source: Callable[[Trace], Any]
    groups: Callable[[Trace], list[Group]]


def everywhere(make: Callable[[Trace, int], Group]) -> Callable[[Trace], list[Group]]:
    return lambda trace: [make(trace, layer) for layer in range(LAYERS)]


def owners(trace: Trace) -> list[int]:
    """The components of `Spans([(3, 5), (1, 2)])`: the first position, both ranges, the rest."""
    return ([0, 2, 3, 1, 1] + [3] * 9)[: len(trace.logits)]


def chosen_neurons(trace: Trace, layer: int) -> Group:
    return twin_sources.neurons(trace, layer, CHOSEN)


CASES: dict[str, Case] = {
    "tokens": Case(lambda trace: Tokens(), lambda trace: [twin_sources.tokens(trace, 0)]),
    "tokens at 1": Case(lambda trace: Tokens(1), lambda trace: [twin_sources.tokens(trace, 1)]),
    "spans": Case(
        lambda trace: Spans([(3, 5), (1, 2)], "token"),
        lambda trace: [twin_sources.spans(trace, 0, owners(trace))],
    ),
    "spans at 1": Case(
        lambda trace: Spans([(3, 5), (1, 2)], "token", layer=1),
        lambda trace: [twin_sources.spans(trace, 1, owners(trace))],
    ),
    "heads": Case(lambda trace: Heads(), everywhere(twin_sources.heads)),
    "heads at 1": Case(lambda trace: Heads(1), lambda trace: [twin_sources.heads(trace, 1)]),
    "attention": Case(lambda trace: Module("attention"), everywhere(twin_sources.attention_module)),
    "mlp": Case(lambda trace: Module("mlp"), everywhere(twin_sources.mlp_module)),
    "mlp at 0": Case(lambda trace: Module("mlp", 0), lambda trace: [twin_sources.mlp_module(trace, 0)]),
    "neurons": Case(lambda trace: Neurons(), everywhere(twin_sources.neurons)),
    "neurons at 1": Case(lambda trace: Neurons(1), lambda trace: [twin_sources.neurons(trace, 1)]),
    "some neurons": Case(lambda trace: Neurons(None, CHOSEN), everywhere(chosen_neurons)),
    "some neurons at -2": Case(lambda trace: Neurons(-2, CHOSEN), lambda trace: [chosen_neurons(trace, 1)]),
    "subspace": Case(
        lambda trace: Subspace(1, BASES[0]), lambda trace: [twin_sources.subspaces(trace, 1, BASES[:1])]
    ),
    "subspaces": Case(
        lambda trace: Subspace(0, list(BASES)), lambda trace: [twin_sources.subspaces(trace, 0, BASES)]
    ),
    "components": Case(
        lambda trace: Components(1, in_three(trace.state(1))),
        lambda trace: [Group(1, "entry", in_three(trace.state(1)))],
    ),
}


@cache
def depass_of(name: str, dtype: torch.dtype = torch.float64) -> DePass:
    return DePass(build(name, dtype=dtype))


@cache
def trace_of(name: str, length: int = LENGTH) -> Trace:
    return twin.record(depass_of(name).model, prompt(length, seed=length))


@cache
def expected_states(name: str, case: str, rule: Rule, length: int = LENGTH) -> list[dict[int, Tensor]]:
    """Each group's components at every layer."""
    trace = trace_of(name, length)
    with torch.no_grad():
        return [twin_sources.propagate(trace, group, rule) for group in CASES[case].groups(trace)]


def at_the_end(name: str, case: str, rule: Rule, length: int = LENGTH) -> Tensor:
    return torch.cat([found[LAYERS] for found in expected_states(name, case, rule, length)])


def largest_error(given: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest error of any component, relative to the norm of the whole."""
    assert given.shape == expected.shape
    difference = (given.double() - expected).reshape(len(given), -1)
    return float(difference.norm(dim=1).max() / scale.norm())


@pytest.mark.parametrize("case", CASES)
def test_the_twin_is_complete(case: str) -> None:
    for name in NAMES:
        trace = trace_of(name)
        for rule in RULES:
            for found in expected_states(name, case, rule):
                for layer, states in found.items():
                    true = trace.state(layer)
                    assert largest_error(states.sum(0), true, true) < 1e-12, (name, rule, layer)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_both_twins_agree_on_tokens(name: str, rule: Rule) -> None:
    trace = trace_of(name)
    expected = twin.decompose(trace, twin.Options(rule=rule))[LAYERS]
    assert largest_error(at_the_end(name, "tokens", rule), expected, trace.final) < 1e-10


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_states_behind_the_last_block(name: str, case: str, dtype: torch.dtype) -> None:
    depass, trace = depass_of(name, dtype), trace_of(name)
    source = CASES[case].source(trace)
    for rule in RULES:
        given = depass.decompose(input_ids=prompt(LENGTH, seed=LENGTH)[None], source=source, rule=rule)[0]
        expected = at_the_end(name, case, rule)
        assert len(given.names) == len(expected)
        assert largest_error(given.states, expected, trace.final) < PRECISION[dtype], rule


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_states_at_every_layer(name: str, case: str) -> None:
    depass, trace = depass_of(name), trace_of(name)
    ids = prompt(LENGTH, seed=LENGTH)[None]
    for rule in RULES:
        found = expected_states(name, case, rule)
        tour = depass.decompose_layers(input_ids=ids, source=CASES[case].source(trace), rule=rule)
        layers = []
        for given in tour:
            expected = torch.cat([own[given.layer] for own in found])
            assert largest_error(given.states, expected, trace.state(given.layer)) < 1e-9, (rule, given.layer)
            layers.append(given.layer)
        assert layers == [layer for layer in range(LAYERS + 1) if all(layer in own for own in found)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "components"])
@pytest.mark.parametrize(("name", "side"), [("llama", "right"), ("llama-biases", "left")])
@pytest.mark.covering(8)
def test_a_padded_batch(name: str, case: str, side: str) -> None:
    lengths = (6, 9, 7)
    depass, trace = depass_of(name), trace_of(name)
    ids, mask = padded([prompt(length, seed=length) for length in lengths], side)
    for rule in RULES:
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "source": CASES[case].source(trace),
            "rule": rule,
        }
        states = depass.decompose(**arguments)
        scored = depass.attribute(**arguments, target=Token(11, position=-2))
        for length, given, scores in zip(lengths, states, scored, strict=True):
            own = trace_of(name, length)
            expected = at_the_end(name, case, rule, length)
            assert largest_error(given.states, expected, own.final) < 1e-9, (rule, length)
            wanted = twin_sources.token_scores(own, expected, -2, 11)
            assert largest_error(scores.scores, wanted, wanted) < 1e-5, (rule, length)


class Probe:
    """What a fitted scikit-learn probe looks like."""

    coef_ = directions(1, 5).numpy()
    intercept_ = torch.tensor([0.7]).numpy()


def probed(trace: Trace, states: Tensor) -> Tensor:
    """A probe's logit of each component; its intercept is a constant, which makes a component if need be."""
    scores = states @ torch.from_numpy(Probe.coef_[0]).double()
    if not twin.has_bias(trace.model):
        scores = torch.cat([scores, scores.new_zeros(1)])
    scores[-1] += 0.7
    return scores


VECTOR = directions(1, 4)[0]
Read = Callable[[Trace, dict[int, Tensor]], Tensor]
# What is asked for, and how it is read from a group's states at every layer; at 2 not all groups have begun.
TARGETS: dict[str, tuple[Any, Read]] = {
    "token": (Token(7), lambda trace, at: twin_sources.token_scores(trace, at[LAYERS], -1, 7)),
    "contrast": (Contrast(7, 20), lambda trace, at: twin_sources.token_scores(trace, at[LAYERS], -1, 7, 20)),
    "earlier token": (Token(7, 4), lambda trace, at: twin_sources.token_scores(trace, at[LAYERS], 4, 7)),
    "direction": (Direction(VECTOR), lambda trace, at: at[LAYERS][:, -1] @ VECTOR.double()),
    "direction at 2": (Direction(VECTOR, 2), lambda trace, at: at[2][:, -1] @ VECTOR.double()),
    "earlier direction at 2": (Direction(VECTOR, 2, 5), lambda trace, at: at[2][:, 5] @ VECTOR.double()),
    "probe": (ProbeLogit(Probe()), lambda trace, at: probed(trace, at[LAYERS][:, -1])),
    "probe at 2": (ProbeLogit(Probe(), 2), lambda trace, at: probed(trace, at[2][:, -1])),
}


@pytest.mark.parametrize("probes", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case != "components"])
@pytest.mark.parametrize("name", ["llama", "llama-biases"])
@pytest.mark.covering(8)
def test_scores_of_every_kind_of_target(name: str, case: str, probes: bool) -> None:
    """Probes, and all others, in one call, the prompt once for each."""
    depass, trace = depass_of(name), trace_of(name)
    for rule in RULES:
        found = expected_states(name, case, rule)
        begun = all(2 in own for own in found)
        kinds = [kind for kind in TARGETS if ("probe" in kind) == probes and (begun or "at 2" not in kind)]
        scored = depass.attribute(
            input_ids=prompt(LENGTH, seed=LENGTH)[None].expand(len(kinds), -1),
            target=[TARGETS[kind][0] for kind in kinds],
            source=CASES[case].source(trace),
            rule=rule,
        )
        for kind, given in zip(kinds, scored, strict=True):
            expected = torch.cat([TARGETS[kind][1](trace, own) for own in found])
            assert largest_error(given.scores, expected, expected) < 1e-5, (rule, kind)


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if "earlier" not in kind])
@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_scores_of_given_components(name: str, kind: str) -> None:
    depass, trace = depass_of(name), trace_of(name)
    target, read = TARGETS[kind]
    for rule in RULES:
        given = depass.attribute(
            input_ids=prompt(LENGTH, seed=LENGTH)[None],
            target=target,
            source=CASES["components"].source(trace),
            rule=rule,
        )[0]
        expected = read(trace, expected_states(name, "components", rule)[0])
        assert largest_error(given.scores, expected, expected) < 1e-5, rule


SWEEPS = {
    "heads": lambda layer: Heads(layer),
    "attention": lambda layer: Module("attention", layer),
    "mlp": lambda layer: Module("mlp", layer),
    "neurons": lambda layer: Neurons(layer),
    "some neurons": lambda layer: Neurons(layer, CHOSEN),
}


@pytest.mark.parametrize("engine", ["propagate", "auto"])
@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("name", ["qwen2", "llama-biases"])
def test_a_sweep_over_all_layers_is_what_each_layer_gives_alone(
    name: str, sweep: str, rule: Rule, engine: Any
) -> None:
    ids, mask = padded([prompt(6, seed=6), prompt(9, seed=9)], "left")
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "rule": rule}
    targets = [Contrast(7, 20), Token(11, -2)]
    depass = depass_of(name)

    def states(layer: int | None) -> list[Tensor]:
        return [own.states for own in depass.decompose(**arguments, source=SWEEPS[sweep](layer))]

    def scores(layer: int | None) -> list[Tensor]:
        scored = depass.attribute(**arguments, target=targets, source=SWEEPS[sweep](layer), engine=engine)
        return [own.scores for own in scored]

    for read in (states, scores) if engine == "propagate" else (scores,):
        alone = [read(layer) for layer in range(LAYERS)]
        for row, together in enumerate(read(None)):
            expected = torch.cat([own[row] for own in alone])
            assert largest_error(together, expected, expected) < (1e-12 if read is states else 1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_what_adds_exactly_nothing_takes_no_share(name: str, rule: Rule) -> None:
    """A head whose output map is zero and a neuron whose column is zero stay zero to the end."""
    model: Any = build(name, dtype=torch.float64)
    block = model.model.layers[0]
    with torch.no_grad():
        block.self_attn.o_proj.weight[:, 12:18] = 0  # head 2
        block.mlp.down_proj.weight[:, 17] = 0
    ids = prompt(LENGTH)
    trace = twin.record(model, ids)
    for source, groups, silent in (
        (Heads(0), twin_sources.heads(trace, 0), 3),
        (Neurons(0, CHOSEN), chosen_neurons(trace, 0), 3),
    ):
        given = DePass(model).decompose(input_ids=ids[None], source=source, rule=rule)[0].states
        expected = twin_sources.propagate(trace, groups, rule)[LAYERS]
        assert largest_error(given, expected, trace.final) < 1e-9
        assert not given[silent].any()
        assert given[silent - 1].any()


def test_components_of_prompts_of_other_lengths_and_targets_in_the_middle() -> None:
    """Each prompt finds its own tensor, however the call is cut into batches and wherever its target is."""
    model = build("llama")
    depass = DePass(model)
    rows = [prompt(9), prompt(6, seed=1), prompt(9, seed=2)]
    ids, mask = padded(rows, "left")
    tensors = []
    for row in rows:
        state = real_states(model, row)[1]
        part = torch.randn(state.shape, generator=torch.Generator().manual_seed(len(row)))
        tensors.append(torch.stack([part, state - part]))
    targets = [Token(7, position=4), Token(7), Direction(torch.ones(36), 2)]
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "target": targets}
    together = depass.attribute(**arguments, source=Components(1, tensors))
    stacked = torch.zeros(3, 2, 9, 36)
    for row, own in enumerate(tensors):
        stacked[row, :, : own.shape[1]] = own
    again = depass.attribute(**arguments, source=Components(1, stacked), batch_size=1)
    for index, (row, own, target) in enumerate(zip(rows, tensors, targets, strict=True)):
        alone = depass.attribute(input_ids=row[None], target=target, source=Components(1, own))[0]
        assert alone.completeness < 1e-5
        assert distance(together[index].scores, alone.scores) < 1e-5
        assert distance(again[index].scores, alone.scores) < 1e-5
    with pytest.raises(DePassError, match="no tensor for row 2"):
        depass.attribute(**arguments, source=Components(1, tensors[:2]))
