"""The components of every layer add up to the model's own residual state, whatever the rule or padding."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from depass_lightning import Contrast, DePass, Token, Tokens
from depass_lightning.engine.memory import Budget
from tests.reference.models import ALL, ONE_OF_EACH, build, distance, padded, prompt, real_states
from tests.reference.twin import RULES, Rule

pytestmark = pytest.mark.covering

PRECISION = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", ALL)
def test_components_sum_to_the_state_of_every_layer(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype)
    ids = prompt(10)
    true = real_states(model, ids)
    depass = DePass(model)
    for rule in RULES:
        for layer, expected in enumerate(true):
            result = depass.decompose(input_ids=ids[None], rule=rule, to_layer=layer)[0]
            assert result.layer == layer
            assert result.states.dtype == dtype
            assert distance(result.states.sum(0), expected) < PRECISION[dtype], (rule, layer)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", [0, 1, 2, -1])
def test_components_of_any_layer_sum_to_the_last_state(start: int, rule: Rule) -> None:
    model = build("qwen2", dtype=torch.float64)
    ids = prompt(9, seed=1)
    true = real_states(model, ids)
    for exclude_first in (True, False):
        source = Tokens(layer=start, exclude_first=exclude_first)
        result = DePass(model).decompose(input_ids=ids[None], source=source, rule=rule)[0]
        assert result.layer == len(true) - 1
        assert distance(result.states.sum(0), true[-1]) < 1e-10


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_padding_leaves_states_and_scores_complete(name: str, side: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype)
    prompts = [prompt(length, seed=length) for length in (7, 4)]
    input_ids, attention_mask = padded(prompts, side)
    states = [real_states(model, ids)[-1] for ids in prompts]
    with torch.no_grad():
        logits = [model(ids[None], use_cache=False).logits[0, -1].double() for ids in prompts]
    depass = DePass(model)
    for rule in RULES:
        results = depass.decompose(input_ids=input_ids, attention_mask=attention_mask, rule=rule)
        scored = depass.attribute(
            input_ids=input_ids, attention_mask=attention_mask, target=Contrast(5, 9), rule=rule
        )
        for row, ids in enumerate(prompts):
            assert results[row].states.shape[1] == len(ids)
            assert distance(results[row].states.sum(0), states[row]) < PRECISION[dtype]
            assert scored[row].value == pytest.approx(float(logits[row][5] - logits[row][9]), abs=1e-4)
            assert scored[row].completeness < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_scores_sum_to_the_logit(name: str, attention: str) -> None:
    model = build(name, attention=attention)
    ids = prompt(12, seed=3)
    logits = model(ids[None], use_cache=False).logits[0].detach()
    for position in (-1, 6, 0):
        result = DePass(model).attribute(input_ids=ids[None], target=Token(17, position=position))[0]
        assert result.value == pytest.approx(float(logits[position, 17]), rel=1e-4, abs=1e-4)
        assert float(result.scores.double().sum()) == pytest.approx(result.value, rel=1e-4, abs=1e-4)
        assert result.completeness < 1e-5


BUDGETS = [1, 4_000, 50_000]  # bytes: one row at a time, a few, many


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window"])
@pytest.mark.covering(2)
def test_results_do_not_depend_on_the_size_of_chunks(name: str, budget: int) -> None:
    model = build(name, dtype=torch.float64)
    input_ids, attention_mask = padded([prompt(7, seed=1), prompt(4, seed=2)], "left")
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    small, large = DePass(model, memory_budget=budget), DePass(model, memory_budget=2**30)
    for rule in RULES:
        for compat in (None, "paper_code") if rule != "half" else (None,):  # the published code has no half
            options = batch | {"rule": rule, "compat": compat}
            for given, expected in zip(small.decompose(**options), large.decompose(**options), strict=True):
                assert distance(given.states, expected.states) < 1e-12, (rule, compat)
            given, expected = small.attribute(**options, target=8), large.attribute(**options, target=8)
            for one, two in zip(given, expected, strict=True):
                assert distance(one.scores, two.scores) < 1e-6, (rule, compat)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.covering(5)
def test_components_sum_to_the_state_in_small_chunks(name: str) -> None:
    model = build(name)
    ids = prompt(6)
    true = real_states(model, ids)[-1]
    for budget in BUDGETS:
        for rule in RULES:
            result = DePass(model, memory_budget=budget).decompose(input_ids=ids[None], rule=rule)[0]
            assert distance(result.states.sum(0), true) < 1e-5, (budget, rule)


def test_blocks_that_are_run_again_instead_of_kept_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    input_ids, attention_mask = padded([prompt(7, seed=1), prompt(4, seed=2)], "left")
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    models = [build(name, attention="sdpa").train() for name in ALL]
    kept = [DePass(model).decompose(**batch) for model in models]
    default = Budget.default

    def nothing_kept(device: torch.device, working: int | None = None) -> Budget:
        return replace(default(device, working), recording=0)

    monkeypatch.setattr(Budget, "default", nothing_kept)
    for model, expected in zip(models, kept, strict=True):
        for one, two in zip(DePass(model).decompose(**batch), expected, strict=True):
            assert torch.equal(one.states, two.states)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision_is_as_complete_as_its_rounding_allows(
    name: str, dtype: torch.dtype, limit: float
) -> None:
    model = build(name, dtype=dtype)
    ids = prompt(8)
    true = real_states(model, ids)[-1]
    for rule in RULES:
        result = DePass(model).decompose(input_ids=ids[None], rule=rule)[0]
        assert result.states.dtype == torch.float32
        assert distance(result.states.sum(0), true) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_components_sum_to_the_states_of_the_models_own_attention(
    name: str, attention: str, dtype: torch.dtype
) -> None:
    """Rounding is a component, so that the pass which is recorded must round as the model's own."""
    model = build(name, dtype=dtype)
    model.set_attn_implementation(attention)
    ids = prompt(9)
    result = DePass(model).decompose(input_ids=ids[None])[0]
    assert distance(result.states.sum(0), real_states(model, ids)[-1]) < 1e-5
