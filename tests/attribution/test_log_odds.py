"""Log-odds and centred logits as targets, against the model's own distribution and its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import Contrast, DePass, DePassError, Heads, LogOdds, LogProb, Neurons, Token, Tokens
from depass_lightning.attribution.logit_sum import LogitSum
from depass_lightning.methods import METHODS, DePassMethod
from depass_lightning.modules.attribution_module import AttributionModule, Explained
from depass_lightning.modules.prompt_datamodule import PromptBatch
from depass_lightning.monitoring.probe_sets import load_set
from depass_lightning.tasks import Example
from tests.reference import twin, zoo
from tests.reference.models import build, distance, prompt

pytestmark = pytest.mark.covering

TEXT = "When Mary and John went to the store, John gave a drink to"
LENGTH = 9


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def last_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0, -1].double()


def log_odds_direction(logits: Tensor, token: int, against: list[int] | None = None) -> Tensor:
    """The weight of each logit, by automatic differentiation of the log-odds themselves."""
    logits = logits.clone().requires_grad_()
    others = [v for v in range(len(logits)) if v != token] if against is None else against
    value = logits[token] - logits[others].logsumexp(0)
    return torch.autograd.grad(value, logits)[0]


def targets_of(logits: Tensor) -> list[tuple[Any, Tensor]]:
    """Targets, each with the weights of the logits that it stands for."""
    one = torch.eye(len(logits), dtype=logits.dtype)
    return [
        (LogOdds(7), log_odds_direction(logits, 7)),
        (LogOdds(7, against=(20, 9, 30)), log_odds_direction(logits, 7, [20, 9, 30])),
        (LogOdds(7, against=[20]), one[7] - one[20]),
        (LogOdds(), log_odds_direction(logits, int(logits.argmax()))),
        (Token(7, centred=True), one[7] - 1 / len(logits)),
    ]


@pytest.mark.parametrize("rule", twin.RULES)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_scores_equal_the_twins(name: str, rule: twin.Rule) -> None:
    model, ids = build(name, dtype=torch.float64), prompt(LENGTH)
    trace = twin.record(model, ids)
    components = twin.decompose(trace, twin.Options(rule=rule))[len(trace.layers)]
    states = twin.read(trace, components)[:, -1]
    targets, directions = zip(*targets_of(trace.logits[-1]), strict=True)
    found = DePass(model).attribute(input_ids=ids[None], target=[list(targets)], rule=rule)[0]
    for attribution, direction in zip(found, directions, strict=True):
        expected = states @ (direction @ trace.model.lm_head.weight)
        assert distance(attribution.scores, expected) < 1e-5
        assert attribution.value == pytest.approx(float(direction @ trace.logits[-1]), rel=1e-5)
        assert attribution.completeness < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "cohere", "phi", "bloom"])
def test_the_read_out_is_the_models_own(name: str) -> None:
    """With soft caps, logit scales, and biases of the unembedding and the norm before it."""
    model, ids = zoo.build(name, dtype=torch.float64), prompt(LENGTH)
    depass = DePass(model)
    own = last_logits(model, ids)
    cap = getattr(model.config, "final_logit_softcapping", None)
    uncapped = cap * torch.atanh(own / cap) if cap else own
    for target, direction in targets_of(own):
        found = depass.attribute(input_ids=ids[None], target=target, rule="half", source=Heads())[0]
        assert found.value == pytest.approx(float(direction @ uncapped), rel=1e-6)
        assert found.completeness < 1e-5
        token = int(own.argmax()) if target.token is None else 7
        assert found.target_ids[0] == token
        assert found.probability == pytest.approx(float(own.softmax(0)[token]), rel=1e-6)


def test_the_weights_are_stable_near_certainty() -> None:
    logits = torch.tensor([60.0, 1.0, 3.0, -torch.inf, 2.0])
    summed = LogitSum.of(LogOdds(0), [0], logits)
    others = torch.tensor([1.0, 3.0, 2.0]).softmax(0)
    assert summed.tokens.tolist() == [0, 1, 2, 4]
    torch.testing.assert_close(summed.weights[1:], -others)
    assert float(logits.softmax(0)[0]) == 1
    assert summed.value(logits) == pytest.approx(60 - float(others @ torch.tensor([1.0, 3.0, 2.0])))
    centred = LogitSum.of(Token(0, centred=True), [0], logits)
    assert centred.value(logits) == pytest.approx(60 - 66 / 4)


def test_the_value_is_the_log_odds_and_the_entropy_of_the_others(tiny: DePass) -> None:
    logits = last_logits(tiny.model, torch.tensor(tiny.attribute(TEXT).token_ids))
    found = tiny.attribute(TEXT, LogOdds(" Mary"))
    token = found.target_ids[0]
    others = logits[torch.arange(len(logits)) != token]
    entropy = torch.distributions.Categorical(logits=others).entropy()
    log_odds = logits[token] - others.logsumexp(0)
    assert found.value == pytest.approx(float(log_odds + entropy), abs=1e-4)
    assert found.target == "linear log-odds of ' Mary'"


def test_texts_names_and_several_targets(tiny: DePass) -> None:
    targets: list[Any] = [
        LogOdds(" Mary", against=[" John"]),
        LogOdds(" Mary", against=[" John", " Nicole", " Amanda", " the"]),
        Token(" Mary", centred=True),
        LogOdds(" drink", position=-3),
        Contrast(" Mary", " John"),
    ]
    for source in (Tokens(), Neurons(-1)):
        found = tiny.attribute(TEXT, targets, source=source)
        assert [own.target for own in found] == [
            "linear log-odds of ' Mary' against ' John'",
            "linear log-odds of ' Mary' against ' John', ' Nicole', ' Amanda' and 1 more",
            "' Mary' − mean logit",
            "linear log-odds of ' drink'",
            "' Mary' − ' John'",
        ]
        assert all(own.completeness < 1e-5 for own in found)
        torch.testing.assert_close(found[0].scores, found[-1].scores)
        for target, own in zip(targets, found, strict=True):
            alone = tiny.attribute(TEXT, target, source=source)
            torch.testing.assert_close(own.scores, alone.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (LogOdds(" Mary", against=[]), r"against is \[\]; give a list of at least one token"),
        (LogOdds(" Mary", against=" John"), r"against is ' John'; give a list"),
        (LogOdds(" Mary", against=[" John", " Mary"]), r"compares a token with itself"),
        (LogOdds(None, against=[" Mary"]), r"compares a token with itself"),
        (LogOdds(" Mary", against=[" John", " John"]), r"names a token twice"),
        (LogOdds(" Mary", against=[" John went"]), r"' John went' must be one token"),
        (LogOdds(" Mary", against=[2.5]), r"target 2.5 is a float"),  # type: ignore[list-item]
    ],
)
def test_bad_alternatives_are_named(tiny: DePass, target: LogOdds, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        tiny.attribute(TEXT, target)


@pytest.mark.parametrize("name", ["input_gradient", "occlusion", "atp"])
def test_other_methods_explain_them_too(tiny: DePass, name: str) -> None:
    method = METHODS[name](tiny)
    log_odds, centred, contrast, alone = method.attribute(
        [TEXT] * 4,
        [
            LogOdds(" Mary"),
            Token(" Mary", centred=True),
            Contrast(" Mary", " John"),
            LogOdds(" Mary", [" John"]),
        ],
    )
    for own, target in ((log_odds, LogOdds(" Mary")), (centred, Token(" Mary", centred=True))):
        explained = tiny.attribute(TEXT, target)
        assert own.value == pytest.approx(explained.value, abs=1e-4)
        assert own.target == explained.target
    torch.testing.assert_close(alone.scores, contrast.scores, rtol=1e-4, atol=1e-4)
    assert distance(log_odds.scores, contrast.scores) > 1e-3


@pytest.mark.parametrize("kind", ["logit", "centred", "log_odds", "logprob"])
def test_generated_tokens(tiny: DePass, kind: Any) -> None:
    found = tiny.attribute_generation(TEXT, max_new_tokens=3, target=kind)
    count = len(found.tokens) - 3
    for index, own in enumerate(found):
        token, position = own.token_ids[count + index], count + index - 1
        target = {
            "logit": Token(token, position),
            "centred": Token(token, position, centred=True),
            "log_odds": LogOdds(token, position=position),
            "logprob": LogProb(token, position),
        }[kind]
        alone = tiny.attribute(input_ids=torch.tensor([own.token_ids]), target=target)[0]
        torch.testing.assert_close(own.scores, alone.scores, rtol=1e-4, atol=1e-5)
        assert own.target == alone.target
    with pytest.raises(DePassError, match="target='contrast' is unknown; choose 'logit' or 'centred'"):
        tiny.attribute_generation(TEXT, target="contrast")  # type: ignore[arg-type]


def test_an_examples_targets() -> None:
    example = Example("1", "A", " B", " C")
    assert example.target() == Contrast(" B", " C", first=True)
    assert example.target("token") == Token(" B", first=True)
    assert example.target("centred") == Token(" B", first=True, centred=True)
    assert example.target("log_odds") == LogOdds(" B", first=True)
    assert example.target("logprob") == LogProb(" B", first=True)


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        (Contrast(" B", " C", -2, True), "log_odds", LogOdds(" B", position=-2, first=True)),
        (Contrast(" B", " C"), "centred", Token(" B", centred=True)),
        (Contrast(" B", " C"), "token", Token(" B")),
        (" B", "log_odds", LogOdds(" B")),
        (Contrast(" B", " C", -2), "logprob", LogProb(" B", -2)),
        (LogProb(7), "logprob", LogProb(7)),
        (7, "centred", Token(7, centred=True)),
        (None, "log_odds", LogOdds()),
        (Token(" B", centred=True), "token", Token(" B", centred=True)),
        (LogOdds(" B", against=(" C",)), "log_odds", LogOdds(" B", against=(" C",))),
        (LogOdds(" B", against=(" C",)), "token", Token(" B")),
        (Contrast(" B", " C"), "own", Token()),
    ],
)
def test_probes_of_every_kind(given: Any, kind: Any, expected: Any) -> None:
    (probe,) = load_set("mine", [("A", given)], 1, kind)
    assert probe.target == expected


@pytest.mark.parametrize("kind", ["log_odds", "centred", "logprob"])
def test_an_analysis_explains_them(tiny: DePass, kind: Any) -> None:
    example = Example("1", TEXT, " Mary", " John")
    module = AttributionModule(DePassMethod(tiny, rule="half"), explained=Explained(kind))
    (row,) = module.predict_step(PromptBatch([0], [example])).rows
    expected = tiny.attribute(TEXT, example.target(kind), rule="half")
    assert row["target"] == expected.target
    assert row["value"] == pytest.approx(expected.value, rel=1e-5)
    generated = AttributionModule(DePassMethod(tiny), explained=Explained("generation", 2, readout=kind))
    rows = generated.predict_step(PromptBatch([0], [example])).rows
    found = tiny.attribute_generation(TEXT, max_new_tokens=2, target=kind)
    assert [row["target"] for row in rows] == [own.target for own in found]
