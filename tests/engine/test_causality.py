"""Where components must be exactly zero, and that what the others take of a neuron is the whole of it."""

import pytest
import torch
from torch import Tensor

from depass_lightning import DePass, Token, Tokens
from depass_lightning.engine.rules import CompetingRule, rule_named
from tests.reference.models import ALL, WINDOW, WITH_BIAS_COMPONENT, build, padded, prompt
from tests.reference.twin import COMPETING, RULES, Options, Rule, shares_of_competing

pytestmark = pytest.mark.covering


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ALL)
def test_no_component_reaches_a_position_before_its_token(name: str, rule: Rule) -> None:
    depass = DePass(build(name))
    ids = prompt(8)
    for source in (Tokens(), Tokens(layer=1, exclude_first=False)):
        states = depass.decompose(input_ids=ids[None], source=source, rule=rule)[0].states
        for token in range(len(ids)):
            assert not states[token, :token].any()
            assert states[token, token].any()


@pytest.mark.parametrize("rule", RULES)
def test_tokens_after_the_target_score_exactly_zero(rule: Rule) -> None:
    ids = prompt(9)
    depass = DePass(build("qwen2"))
    early = depass.attribute(input_ids=ids[None, :6], target=8, rule=rule)[0]
    within = depass.attribute(input_ids=ids[None], target=Token(8, position=5), rule=rule)[0]
    assert len(within.scores) == 10
    assert not within.scores[6:9].any()
    torch.testing.assert_close(within.scores[[0, 1, 2, 3, 4, 5, 9]], early.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_causality_holds_in_padded_batches(rule: Rule, side: str) -> None:
    prompts = [prompt(length, seed=length) for length in (3, 9, 6)]
    input_ids, attention_mask = padded(prompts, side)
    depass = DePass(build("mistral-window"))
    results = depass.decompose(input_ids=input_ids, attention_mask=attention_mask, rule=rule)
    for ids, result in zip(prompts, results, strict=True):
        assert result.states.shape[:2] == (len(ids), len(ids))
        for token in range(len(ids)):
            assert not result.states[token, :token].any()
            assert result.states[token, token].any()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_reaches_further_than_the_attention_windows_carry_it(rule: Rule) -> None:
    depass = DePass(build("mistral-window", dtype=torch.float64))
    ids = prompt(14)
    for layer in range(4):
        states = depass.decompose(input_ids=ids[None], rule=rule, to_layer=layer)[0].states
        reach = layer * (WINDOW - 1)
        for token in range(len(ids)):
            assert not states[token, token + reach + 1 :].any()
            if token + reach < len(ids):
                assert states[token, token + reach].any()


@pytest.mark.parametrize("rule", COMPETING)
def test_the_first_component_gets_only_what_attention_carries(rule: Rule) -> None:
    """Beyond its own position it is linear in its own stream: no neuron of any MLP adds to it."""
    model = build("llama", dtype=torch.float64)
    ids = prompt(8)
    depass = DePass(model)
    excluded = depass.decompose(input_ids=ids[None], rule=rule)[0].states
    included = depass.decompose(input_ids=ids[None], rule=rule, source=Tokens(exclude_first=False))[0].states
    assert (excluded[0] - included[0]).norm() > 0.1
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
    silent = depass.decompose(input_ids=ids[None], rule=rule, to_layer=1)[0].states
    again = DePass(build("llama", dtype=torch.float64))
    loud = again.decompose(input_ids=ids[None], rule=rule, to_layer=1)[0].states
    torch.testing.assert_close(loud[0, 1:], silent[0, 1:], rtol=0, atol=1e-12)
    assert (loud[0, 0] - silent[0, 0]).norm() > 0.1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WITH_BIAS_COMPONENT)
def test_the_bias_component_starts_at_zero(name: str, rule: Rule) -> None:
    depass = DePass(build(name))
    for layer in (0, 2):
        result = depass.decompose(
            input_ids=prompt(6)[None], source=Tokens(layer=layer), rule=rule, to_layer=layer
        )[0]
        assert not result.states[-1].any()


# The rules by themselves


def random_gates(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns gates `[segment, component, neuron]` with ties and zeros among them, and who is present."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(12, 7, 9, generator=generator, dtype=torch.float64) * scale
    gates[1] = gates[1].abs() * -1  # no positive one
    gates[2] = gates[2, :1]  # all equal
    gates[3, :4] = gates[3, 5]  # some equal
    gates[4] = gates[4].round()  # ties and zeros
    gates[5] = 0
    gates[6] = -gates[6].abs().clamp(max=0.4).round()  # none positive, with zeros
    gates[7] = 1e-30 * gates[7]
    present = torch.rand(12, 7, 1, generator=generator) < 0.6
    present[0] = True
    present[8] = False
    present[8, 3] = True  # alone
    present[9] = False  # no component
    return gates.to(dtype), present


def competing_rule(name: str) -> CompetingRule:
    rule = rule_named(name)
    assert isinstance(rule, CompetingRule)
    return rule


def all_shares(rule: CompetingRule, gates: Tensor, present: Tensor, chunk: int) -> Tensor:
    """The shares by the rule's three functions, `chunk` components at a time."""
    summary = None
    for start in range(0, gates.shape[1], chunk):
        part = slice(start, start + chunk)
        own = rule.summarise(gates[:, part], present[:, part], start)
        summary = own if summary is None else rule.merge(summary, own)
    assert summary is not None
    shares = [
        rule.share(gates[:, start : start + chunk], present[:, start : start + chunk], summary, start)
        for start in range(0, gates.shape[1], chunk)
    ]
    return torch.cat(shares, 1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", COMPETING)
def test_shares_sum_to_one_and_none_goes_to_the_absent(name: Rule, seed: int, chunk: int) -> None:
    rule = competing_rule(name)
    gates, present = random_gates(seed)
    before = gates.clone()
    shares = all_shares(rule, gates, present, chunk)
    assert torch.equal(gates, before)
    assert torch.isfinite(shares).all()
    assert (shares >= 0).all()
    assert not shares[~present.expand_as(shares)].any()
    somebody = present.any(1).squeeze(-1)
    assert not shares[~somebody].any()
    sums = shares.sum(1)[somebody]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
    for segment in somebody.nonzero().flatten().tolist():
        competing = present[segment, :, 0]
        expected = shares_of_competing(gates[segment, competing], Options(rule=name))
        torch.testing.assert_close(shares[segment, competing], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", COMPETING)
def test_shares_sum_to_one_in_float32(name: str, scale: float) -> None:
    """Gates of a hundred occur in large models, and a temperature of a tenth makes thousands of them."""
    rule = competing_rule(name)
    for seed in range(5):
        gates, present = random_gates(seed, scale, torch.float32)
        for chunk in (2, 7):
            sums = all_shares(rule, gates, present, chunk).sum(1)[present.any(1).squeeze(-1)]
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_knows_its_name(name: str) -> None:
    assert rule_named(name).name == name
