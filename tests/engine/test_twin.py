"""The engine against a naive float64 twin, component by component.

That components add up proves little: shares of the wrong gates add up too. Here every component is compared.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import Contrast, DePass, Token, Tokens
from tests.reference import twin
from tests.reference.models import ALL, ONE_OF_EACH, WITH_BIAS_COMPONENT, build, distance, prompt, real_states
from tests.reference.twin import PUBLISHED, RULES, Options, Rule

pytestmark = pytest.mark.covering

LENGTH = 11  # longer than the tiny models' attention windows


@cache
def depass_and_trace(name: str, length: int = LENGTH) -> tuple[DePass, twin.Trace]:
    model = build(name, dtype=torch.float64)
    return DePass(model), twin.record(model, prompt(length))


@cache
def in_float32(name: str) -> DePass:
    return DePass(build(name))


@cache
def expected_states(name: str, options: Options) -> dict[int, Tensor]:
    return twin.decompose(depass_and_trace(name)[1], options)


def largest_error(given: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest error of any component, relative to the norm of the whole state."""
    assert given.shape == expected.shape
    return float((given.double() - expected).flatten(1).norm(dim=1).max() / scale.norm())


@pytest.mark.parametrize("name", ALL)
def test_twin_itself_is_complete(name: str) -> None:
    depass, _ = depass_and_trace(name)
    model: Any = depass.model
    true = real_states(model, prompt(LENGTH))
    for rule in RULES:
        for layer, components in expected_states(name, Options(rule=rule)).items():
            assert distance(components.sum(0), true[layer]) < 1e-13


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ALL)
def test_states_of_every_layer(name: str, rule: Rule) -> None:
    depass, trace = depass_and_trace(name)
    for layer, components in expected_states(name, Options(rule=rule)).items():
        given = depass.decompose(input_ids=prompt(LENGTH)[None], rule=rule, to_layer=layer)[0]
        assert largest_error(given.states, components, trace.state(layer)) < 1e-9, layer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ALL)
def test_states_with_the_first_token_included(name: str, rule: Rule) -> None:
    depass, trace = depass_and_trace(name)
    expected = expected_states(name, Options(rule=rule, exclude_first=False))[len(trace.layers)]
    source = Tokens(exclude_first=False)
    given = depass.decompose(input_ids=prompt(LENGTH)[None], source=source, rule=rule)[0]
    assert largest_error(given.states, expected, trace.final) < 1e-9


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ALL)
def test_states_in_float32(name: str, rule: Rule) -> None:
    _, trace = depass_and_trace(name)
    expected = expected_states(name, Options(rule=rule))[len(trace.layers)]
    given = in_float32(name).decompose(input_ids=prompt(LENGTH)[None], rule=rule)[0]
    assert largest_error(given.states, expected, trace.final) < 1e-4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [1, 2, -1])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_split_at_a_later_layer(name: str, layer: int, rule: Rule) -> None:
    depass, trace = depass_and_trace(name)
    start = layer % len(trace.layers)
    for exclude_first in (True, False):
        expected = expected_states(name, Options(start, rule, exclude_first=exclude_first))
        source = Tokens(layer=layer, exclude_first=exclude_first)
        for to_layer in (start, len(trace.layers)):
            given = depass.decompose(
                input_ids=prompt(LENGTH)[None], source=source, rule=rule, to_layer=to_layer
            )[0]
            assert largest_error(given.states, expected[to_layer], trace.state(to_layer)) < 1e-9, to_layer


@pytest.mark.parametrize("temperature", [0.02, 1.0, 30.0])
def test_temperature(temperature: float) -> None:
    depass, trace = depass_and_trace("qwen2")
    expected = twin.decompose(trace, Options(temperature=temperature))[len(trace.layers)]
    given = depass.decompose(input_ids=prompt(LENGTH)[None], temperature=temperature)[0]
    assert largest_error(given.states, expected, trace.final) < 1e-9


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WITH_BIAS_COMPONENT)
def test_bias_dropped(name: str, rule: Rule) -> None:
    depass, trace = depass_and_trace(name)
    expected = twin.decompose(trace, Options(rule=rule, bias=False))[len(trace.layers)]
    given = depass.decompose(input_ids=prompt(LENGTH)[None], rule=rule, bias="drop")[0]
    assert len(given.names) == LENGTH
    assert "bias" not in given.names
    assert largest_error(given.states, expected, trace.final) < 1e-9
    assert distance(given.states.sum(0), trace.final) > 0.01


@pytest.mark.parametrize("name", ALL)
def test_a_bias_component_exists_where_the_model_has_biases(name: str) -> None:
    depass, trace = depass_and_trace(name)
    given = depass.decompose(input_ids=prompt(LENGTH)[None])[0]
    scored = depass.attribute(input_ids=prompt(LENGTH)[None], target=3)[0]
    expected = name in WITH_BIAS_COMPONENT
    assert twin.has_bias(trace.model) == expected
    assert len(given.names) == len(given.states) == LENGTH + expected
    assert ("bias" in given.names) == ("bias" in scored.names) == expected
    if expected:
        assert given.names[-1] == scored.names[-1] == "bias"
        assert scored.positions[-1] is None
    assert scored.positions[:LENGTH] == [(n, n + 1) for n in range(LENGTH)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ALL)
def test_scores(name: str, rule: Rule) -> None:
    depass, trace = depass_and_trace(name)
    components = expected_states(name, Options(rule=rule))[len(trace.layers)]
    for target in (Token(7), Token(7, 5), Token(7, 0), Contrast(7, 20), Contrast(7, 20, -4)):
        position = target.position
        foil = target.foil if isinstance(target, Contrast) else None
        logits = trace.logits[position]
        given = depass.attribute(input_ids=prompt(LENGTH)[None], target=target, rule=rule)[0]
        expected = twin.scores(trace, components, position, 7, 20 if foil else None)
        value = float(logits[7] - (logits[20] if foil else 0))
        assert distance(given.scores, expected) < 1e-5
        assert given.value == pytest.approx(value, rel=1e-5)
        assert given.position == position % LENGTH
        assert given.rule == rule


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WITH_BIAS_COMPONENT)
def test_scores_with_the_bias_dropped_at_a_later_layer(name: str, rule: Rule) -> None:
    depass, trace = depass_and_trace(name)
    expected = twin.decompose(trace, Options(1, rule, exclude_first=False, bias=False))[len(trace.layers)]
    given = depass.attribute(
        input_ids=prompt(LENGTH)[None],
        target=Token(30, position=8),
        source=Tokens(layer=1, exclude_first=False),
        rule=rule,
        bias="drop",
    )[0]
    assert distance(given.scores, twin.scores(trace, expected, 8, 30)) < 1e-5
    assert given.layer == 1
    assert given.completeness > 1e-3


def test_no_target_means_the_models_own_next_token() -> None:
    depass, trace = depass_and_trace("llama")
    best = int(trace.logits[-1].argmax())
    given = depass.attribute(input_ids=prompt(LENGTH)[None])[0]
    explicit = depass.attribute(input_ids=prompt(LENGTH)[None], target=best)[0]
    assert torch.equal(given.scores, explicit.scores)
    assert given.rank == 1
    assert given.correct
    assert given.probability == pytest.approx(float(trace.logits[-1].softmax(0)[best]), rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_token_whose_embedding_is_zero(name: str, rule: Rule) -> None:
    """At its position only the excluded first component is not zero; at the first position none is."""
    model = build(name, dtype=torch.float64)
    for where in (1, 0):
        ids = prompt(6)
        with torch.no_grad():
            model.model.embed_tokens.weight[ids[where]] = 0
        trace = twin.record(model, ids)
        expected = twin.decompose(trace, Options(rule=rule))[len(trace.layers)]
        given = DePass(model).decompose(input_ids=ids[None], rule=rule)[0]
        assert largest_error(given.states, expected, trace.final) < 1e-9
        assert distance(given.states.sum(0), trace.final) < 1e-10


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_shortest_prompts(name: str, length: int, rule: Rule) -> None:
    depass, trace = depass_and_trace(name, length)
    ids = prompt(length)
    expected = twin.decompose(trace, Options(rule=rule))[len(trace.layers)]
    given = depass.decompose(input_ids=ids[None], rule=rule)[0]
    assert largest_error(given.states, expected, trace.final) < 1e-9
    scored = depass.attribute(input_ids=ids[None], target=4, rule=rule)[0]
    assert distance(scored.scores, twin.scores(trace, expected, -1, 4)) < 1e-5


@pytest.mark.parametrize("rule", PUBLISHED)
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("llama-biases", "llama-mlp-biases")])
def test_the_published_codes_steps(name: str, rule: Rule) -> None:
    """What `test_oracle.py` compares with published values, here without them and on every type of model.

    Models with MLP biases are left out: the published code was made for none.
    """
    depass, trace = depass_and_trace(name)
    for layer, exclude_first in ((0, True), (0, False), (1, True)):
        options = Options(layer, rule, exclude_first=exclude_first, release=True)
        given = depass.decompose(
            input_ids=prompt(LENGTH)[None],
            source=Tokens(layer, exclude_first),
            rule=rule,
            compat="paper_code",
        )[0]
        expected = expected_states(name, options)[len(trace.layers)]
        assert len(given.names) == LENGTH
        assert largest_error(given.states, expected, trace.final) < 1e-9
