"""Whole answers and preferences against single-token runs, the twin and the model's own probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import (
    Components,
    Continuation,
    Contrast,
    DePass,
    DePassError,
    Direction,
    Heads,
    LogOdds,
    LogProb,
    Module,
    Neurons,
    Preference,
    Spans,
    Subspace,
    Token,
    Tokens,
)
from depass_lightning.attribution.forward import record_batch
from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.attribution.question import questions_of
from depass_lightning.attribution.readout import Readout
from depass_lightning.attribution.scoring import score
from depass_lightning.attribution.settings import settings_of
from depass_lightning.faithfulness.evidence import text_components
from depass_lightning.methods import METHODS, DePassMethod
from depass_lightning.modules.attribution_module import AttributionModule, Explained
from depass_lightning.modules.prompt_datamodule import PromptBatch
from depass_lightning.prompts import prompts_of
from depass_lightning.storage.attribution_rows import attribution_from_row, attribution_to_row
from depass_lightning.tasks import Example
from tests.reference import twin, zoo
from tests.reference.models import build, distance, padded, prompt

pytestmark = pytest.mark.covering

TEXT = "When Mary and John went to the store, John gave a drink to"
LENGTH = 7
ANSWER = [9, 4, 30, 9]
START = LENGTH
RULES: tuple[Any, ...] = ("softmax", "max", "relu", "linear", "taylor", "half", "shap", "dual")
READINGS: tuple[Any, ...] = ("logit", "centred", "log_odds", "logprob")
BASIS = torch.linspace(-1, 1, 36)
SOURCES = [
    Tokens(),
    Tokens(layer=1),
    Heads(),
    Module("mlp"),
    Module("attention", 1),
    Neurons(0),
    Neurons(1),
    Neurons(2),
    Subspace(1, BASIS),
]


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.fixture(scope="module")
def exact() -> DePass:
    return DePass(build("llama-biases", dtype=torch.float64))


def exact_scores(depass: DePass, ids: Tensor, targets: list[Any], rule: Any) -> list[Tensor]:
    """`[source][target, component]` in float64; an `Attribution` holds float32."""
    decoder = depass.decoder
    settings = settings_of(decoder, SOURCES, rule=rule)
    prompts = prompts_of(decoder, None, None, ids[None], None)
    (asked,) = questions_of(decoder, None, prompts, [targets], SOURCES)
    texts, positions = [asked[0].prompt], [[read.position for target in asked for read in target.reads]]
    recording = record_batch(decoder, texts, positions, settings)
    readout = Readout.of(recording, OutputNames.of(decoder, None), [asked])
    return [scores.values[0].flatten(1) for scores in score(recording, texts, readout, settings)]


def singles(reading: Any) -> list[Any]:
    """Each token of the answer as a target of the whole text."""
    made = {
        "logit": lambda token, place: Token(token, place),
        "centred": lambda token, place: Token(token, place, centred=True),
        "log_odds": lambda token, place: LogOdds(token, position=place),
        "logprob": lambda token, place: LogProb(token, place),
    }[reading]
    return [made(token, START - 1 + index) for index, token in enumerate(ANSWER)]


@pytest.mark.parametrize("rule", RULES)
def test_an_answer_is_the_sum_of_its_tokens(exact: DePass, rule: Any) -> None:
    readings: tuple[Any, ...] = ("logit", "logprob")
    ids = prompt(LENGTH)
    whole = torch.cat([ids, torch.tensor(ANSWER)])
    answers: list[Any] = [Continuation(ANSWER, of=reading) for reading in readings]
    found = exact_scores(exact, ids, answers, rule)
    expected = exact_scores(
        exact, whole, [single for reading in readings for single in singles(reading)], rule
    )
    for source, scores, each in zip(SOURCES, found, expected, strict=True):
        sums = each.unflatten(0, (len(readings), len(ANSWER))).sum(1)
        assert distance(scores, sums) < 1e-10, source


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("rule", twin.RULES)
def test_scores_equal_the_twins(rule: twin.Rule, reading: Any) -> None:
    model, ids = build("qwen2", dtype=torch.float64), prompt(LENGTH)
    trace = twin.record(model, torch.cat([ids, torch.tensor(ANSWER)]))
    components = twin.decompose(trace, twin.Options(rule=rule))[len(trace.layers)]
    states = twin.read(trace, components)  # [component, position, hidden]
    expected, value, true = torch.zeros(len(states)).double(), 0.0, 0.0
    for index, token in enumerate(ANSWER):
        place = START - 1 + index
        logits = trace.logits[place].clone().requires_grad_()
        others = torch.arange(len(logits)) != token
        read = {
            "logit": logits[token],
            "centred": logits[token] - logits.mean(),
            "log_odds": logits[token] - logits[others].logsumexp(0),
            "logprob": logits.log_softmax(0)[token],
        }[reading]
        (direction,) = torch.autograd.grad(read, logits)
        expected += states[:, place] @ (direction @ trace.model.lm_head.weight)
        value += float(direction @ logits.detach())
        true += float(read.detach())
    target = Continuation(ANSWER, of=reading, reduce="mean")
    (found,) = DePass(model).attribute(input_ids=ids[None], target=target, rule=rule)
    assert distance(found.scores, expected / len(ANSWER)) < 1e-6
    assert found.value == pytest.approx(value / len(ANSWER), rel=1e-6)
    assert found.completeness < 1e-6
    if reading in ("log_odds", "logprob"):
        assert found.remainder is not None
        assert found.value + found.remainder == pytest.approx(true / len(ANSWER), rel=1e-6)
    else:
        assert found.remainder is None


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "cohere", "phi", "mixtral"])
@pytest.mark.parametrize("rule", ["softmax", "half"])
def test_answers_of_every_kind_of_model_are_complete(name: str, rule: Any) -> None:
    model, ids = zoo.build(name, dtype=torch.float64), prompt(LENGTH)
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor(ANSWER)])[None], use_cache=False).logits[0].double()
    own = logits[LENGTH - 1 : -1].log_softmax(-1)[range(len(ANSWER)), ANSWER].sum()
    for source in (Tokens(), Heads(), Neurons(0)):
        target = Continuation(ANSWER, of="logprob")
        (found,) = DePass(model).attribute(input_ids=ids[None], target=target, source=source, rule=rule)
        assert found.completeness < 1e-5
        assert found.value + (found.remainder or 0) == pytest.approx(float(own), rel=1e-6)
        assert found.metadata["log_probability"] == pytest.approx(float(own), rel=1e-6)
        assert found.probability == pytest.approx(float(own.exp()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["softmax", "half"])
def test_rounding_is_a_component_of_an_answer_too(rule: Any, dtype: torch.dtype) -> None:
    depass = DePass(build("llama", dtype=dtype))
    (found,) = depass.attribute(input_ids=prompt(LENGTH)[None], target=Continuation(ANSWER), rule=rule)
    assert found.names[-1] == "rounding"
    assert found.completeness < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["softmax", "half"])
@pytest.mark.parametrize("source", [Tokens(), Heads(), Neurons(0), Neurons(2), Neurons(0, top=3)], ids=str)
def test_batches_equal_single_answers(source: Any, rule: Any, side: str) -> None:
    if source.top is not None and rule != "softmax":
        pytest.skip("approximates the softmax rule")
    depass = DePass(build("qwen2", dtype=torch.float64))
    prompts = [prompt(3), prompt(9, seed=1), prompt(6, seed=2)]
    answers = [[4, 9, 30, 7, 12], [5], [8, 8]]
    targets: list[Any] = [Continuation(answer, of="logprob") for answer in answers]
    targets[1] = Preference(answers[1], [9, 10], of="logit", reduce="mean")
    ids, mask = padded(prompts, side)
    found = depass.attribute(input_ids=ids, attention_mask=mask, target=targets, source=source, rule=rule)
    for result, text, target in zip(found, prompts, targets, strict=True):
        (alone,) = depass.attribute(input_ids=text[None], target=target, source=source, rule=rule)
        torch.testing.assert_close(result.scores, alone.scores, rtol=1e-5, atol=1e-6)
        assert result.names == alone.names
        assert result.value == pytest.approx(alone.value, rel=1e-6)
        assert result.completeness < 1e-5


@pytest.mark.parametrize("count", [1, 4])
def test_the_approximation_by_the_largest_neurons_is_made_once(count: int) -> None:
    """With all neurons among the largest it is exact, at however many positions it is read."""
    depass = DePass(build("llama", dtype=torch.float64))
    target = Continuation(ANSWER[:count])
    ids = prompt(LENGTH)[None]
    (found,) = depass.attribute(input_ids=ids, target=target, source=Neurons(0, top=44))
    (exact,) = depass.attribute(input_ids=ids, target=target, source=Neurons(0))
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_one_pass_and_one_sweep_an_answer(monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    from depass_lightning.attribution import forward, scoring

    calls = []
    for module, name in ((forward, "record"), (forward, "propagate"), (scoring, "backward")):
        call = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _c=call, _n=name, **k: (calls.append(_n), _c(*a, **k))[1]
        )
    DePass(build("llama")).attribute(input_ids=prompt(LENGTH)[None], target=Continuation(ANSWER), rule=rule)
    assert calls == ["record", "propagate" if rule == "softmax" else "backward"]


def test_slices_means_and_other_targets_share_a_pass(tiny: DePass) -> None:
    answer = " Mary and John"
    targets: list[Any] = [
        Continuation(answer),
        Continuation(answer, tokens=slice(1, None)),
        Continuation(answer, reduce="mean"),
        " Mary",
        Token(" drink", position=-3),
        Direction(torch.linspace(-1, 1, 64), layer=2),
    ]
    found = tiny.attribute(TEXT, targets)
    assert found.targets[:4] == ["' Mary and John'", "' and John'", "mean of ' Mary and John'", "' Mary'"]
    torch.testing.assert_close(found.scores[0] - found.scores[1], found.scores[3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores[0] / 3, found.scores[2], rtol=1e-4, atol=1e-4)
    for result, target in zip(found[3:], targets[3:], strict=True):
        alone = tiny.attribute(TEXT, target)
        torch.testing.assert_close(result.scores[: len(alone)], alone.scores, rtol=1e-4, atol=1e-5)
        assert not result.scores[len(alone) :].any()
        assert result.value == pytest.approx(alone.value, abs=1e-5)


def test_the_answer_is_shown_apart(tiny: DePass) -> None:
    found = tiny.attribute(TEXT, Continuation(" Mary and John"), rule="half")
    start = found.answer_start
    assert start is not None
    assert found.text == TEXT + " Mary and John"
    assert "".join(found.tokens[start:]) == " Mary and John"
    assert found.position == len(found.tokens) - 2
    assert found.scores[-1] == 0
    parts = found.part_sums()
    assert parts["prompt"] == pytest.approx(found.scores[:start].sum().item(), abs=1e-5)
    assert parts["answer"] == pytest.approx(found.scores[start:].sum().item(), abs=1e-5)
    assert sum(parts.values()) == pytest.approx(found.value, abs=1e-4)
    assert attribution_from_row(attribution_to_row(found)).part_sums() == parts
    assert tiny.attribute(TEXT, Continuation(" Mary"), source=Heads(0)).part_sums().keys() == {"other"}


@pytest.mark.parametrize("by", ["word", "sentence", [(5, 9), (14, 18)]])
def test_no_span_reaches_from_the_prompt_into_the_answer(tiny: DePass, by: Any) -> None:
    found = tiny.attribute(TEXT, Continuation(" Mary and John", of="logprob"), source=Spans(by))
    start = found.answer_start
    assert start is not None
    assert not any(span and span[0] < start < span[1] for span in found.positions)
    assert any(span and span[0] == start for span in found.positions)
    alone = tiny.attribute(TEXT, source=Spans(by))
    assert found.names[: len(alone)] == alone.names
    assert found.completeness < 1e-5


def test_words_do_not_join_prompt_and_answer() -> None:
    depass = DePass.from_pretrained("tiny")
    found = depass.attribute("Mary", Continuation(" John and")).words()
    assert found.names == ["<s>", "Mary", " John", " and"]


def test_components_of_a_users_choice_cover_the_answer() -> None:
    model, ids = build("llama", dtype=torch.float64), prompt(LENGTH)
    depass = DePass(model)
    whole = torch.cat([ids, torch.tensor(ANSWER)])
    state = depass.decompose(input_ids=whole[None], to_layer=1)[0].states.sum(0)
    split = Components(1, torch.stack([state / 4, 3 * state / 4]), names=["quarter", "rest of it"])
    (found,) = depass.attribute(input_ids=ids[None], target=Continuation(ANSWER), source=split, rule="half")
    assert found.scores[0] * 3 == pytest.approx(float(found.scores[1]), rel=1e-5)
    assert found.completeness < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_a_preference_is_the_difference_of_two_runs(exact: DePass, rule: Any) -> None:
    ids, other = prompt(LENGTH)[None], [5, 30]
    targets: list[Any] = [
        Preference(ANSWER, other),
        Continuation(ANSWER, "logprob"),
        Continuation(other, "logprob"),
    ]
    sources = [Tokens(), Spans([(1, 3)], unit="token"), Heads(), Neurons(1)]
    results = exact.attribute_sources(None, targets, sources, input_ids=ids.repeat(3, 1), rule=rule)
    for source, found, chosen, rejected in zip(sources, *results, strict=True):
        assert found.value == pytest.approx(chosen.value - rejected.value, rel=1e-6)
        assert found.remainder == pytest.approx(chosen.remainder - rejected.remainder, rel=1e-6)
        margin = chosen.metadata["log_probability"] - rejected.metadata["log_probability"]
        assert found.probability == pytest.approx(1 / (1 + math.exp(-margin)), rel=1e-6)
        assert found.rank == (1 if margin > 0 else 2)
        if rule not in ("dual", "shap"):
            assert found.completeness < 1e-5
        if not source.positional:
            torch.testing.assert_close(found.scores, chosen.scores - rejected.scores)
            continue
        kinds = [component.kind for component in found.components]
        start, last = kinds.index("chosen"), kinds.index("rejected")
        torch.testing.assert_close(found.scores[:start], chosen.scores[:start] - rejected.scores[:start])
        torch.testing.assert_close(found.scores[start:last], chosen.scores[start:-1])
        torch.testing.assert_close(found.scores[last:-1], -rejected.scores[start:-1])
        assert found.scores[-1] == pytest.approx(float(chosen.scores[-1] - rejected.scores[-1]), abs=1e-5)
        assert found.part_sums()["rejected"] == pytest.approx(float(found.scores[last:-1].sum()), abs=1e-5)
        assert len(found.tokens) == LENGTH


def test_a_given_continuation_is_explained_as_a_generated_one(tiny: DePass) -> None:
    made = tiny.attribute_generation(TEXT, max_new_tokens=4)
    for given in (made.continuation, made[0].token_ids[-4:]):
        found = tiny.attribute_generation(TEXT, continuation=given)
        assert found[0].token_ids == made[0].token_ids
        torch.testing.assert_close(found.scores, made.scores)
        assert found.continuation == made.continuation
    whole = tiny.attribute(TEXT, Continuation(made.continuation))
    torch.testing.assert_close(whole.scores, made.scores.sum(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(DePassError, match=r"the continuation is given.*leave out do_sample"):
        tiny.attribute_generation(TEXT, continuation=" Mary", do_sample=True)


REFUSED: list[tuple[Any, str]] = [
    (Continuation(""), r"the answer '' has no tokens; give at least one"),
    (Continuation([]), r"the answer \[\] has no tokens"),
    (Continuation([3, 10**6]), r"has 1000000, which is no id of the vocabulary"),
    (Continuation([3, True]), r"has True, which is no id"),
    (Continuation(" Mary Zarathustra"), r"what follows ' Mary' is not in the model's vocabulary"),
    (Continuation(" Zarathustra"), "its beginning is not in the model's vocabulary"),
    (Continuation([3] * 600), r"its answer 600, more than the model's context"),
    (Continuation(" Mary", tokens=slice(1, 1)), r"tokens=slice\(1, 1, None\) selects none of the answer's 1"),
    (Preference(" Mary", [*()]), r"the answer \[\] has no tokens"),
    (Preference(" Mary", " Mary"), r"chosen and the rejected answer to the prompt are the same, ' Mary'"),
    ([Preference(" Mary", " John")], r"a Preference takes two passes of its own"),
    ([Continuation(" Mary"), Continuation(" John")], r"have 2 different answers, which need a pass each"),
]


@pytest.mark.parametrize(("target", "message"), REFUSED)
def test_bad_answers_are_named_before_the_model_runs(
    tiny: DePass, monkeypatch: pytest.MonkeyPatch, target: Any, message: str
) -> None:
    monkeypatch.setattr("depass_lightning.attribution.forward.record", None)
    with pytest.raises(DePassError, match=message):
        tiny.attribute(TEXT, target)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(DePassError, match="Continuation: the answer is a int; give its text or its token"):
        Continuation(3)  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="Continuation: of='contrast' is unknown; choose 'logit' or"):
        Continuation(" Mary", of="contrast")  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="reduce='max' is unknown"):
        Preference(" Mary", " John", reduce="max")  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="tokens is 3; give a slice"):
        Continuation(" Mary", tokens=3)  # type: ignore[arg-type]
    assert Continuation(torch.tensor([3, 4])).answer == [3, 4]  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="is text, but there is no tokenizer"):
        DePass(build("llama")).attribute(input_ids=prompt(4)[None], target=Continuation(" Mary"))


def test_a_log_probability_is_less_than_its_value_by_the_entropy(tiny: DePass) -> None:
    found = tiny.attribute(TEXT, LogProb(" Mary"))
    with torch.no_grad():
        logits = tiny.model(torch.tensor([found.token_ids])).logits[0, -1].double()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert found.target == "linear log-probability of ' Mary'"
    assert found.remainder == pytest.approx(-float(entropy), rel=1e-5)
    own = float(logits.log_softmax(0)[found.target_ids[0]])
    assert found.value + (found.remainder or 0) == pytest.approx(own, abs=1e-5)
    assert tiny.attribute(TEXT, Contrast(" Mary", " John")).remainder is None


def rows_of(tiny: DePass, example: Example, *explained: Any, **more: Any) -> Any:
    module = AttributionModule(DePassMethod(tiny, rule="half"), explained=Explained(*explained, **more))
    return module.predict_step(PromptBatch([3], [example]))


def test_an_analysis_explains_whole_answers(tiny: DePass) -> None:
    """As the files `conf/target/continuation.yaml` and `preference.yaml` ask for."""
    example = Example("1", TEXT, " Mary and John", " John and Mary")
    (row,) = rows_of(tiny, example, "logprob", reduce="mean").rows
    expected = tiny.attribute(TEXT, Continuation(str(example.answer), "logprob", "mean"), rule="half")
    assert row["value"] == pytest.approx(expected.value, rel=1e-5)
    assert row["remainder"] == pytest.approx(expected.remainder, rel=1e-5)
    assert row["answer_start"] == expected.answer_start
    assert row["tokens"][row["answer_start"] :] == [" Mary", " and", " John"]
    (row,) = rows_of(tiny, example, "contrast", readout="logprob").rows
    expected = tiny.attribute(TEXT, Preference(str(example.answer), " John and Mary"), rule="half")
    assert row["value"] == pytest.approx(expected.value, rel=1e-5)
    assert row["kinds"].count("rejected") == 3


def test_an_analysis_explains_each_token_of_a_given_answer(tiny: DePass) -> None:
    example = Example("1", TEXT, " Mary and John")
    rows = rows_of(tiny, example, "generation", 5, "logprob", task_answer=True).rows
    expected = tiny.attribute_generation(TEXT, continuation=example.answer, target="logprob", rule="half")
    assert [row["value"] for row in rows] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert [row["index"] for row in rows] == [15, 16, 17]
    assert {row["answer"] for row in rows} == {example.answer}
    (skipped,) = rows_of(tiny, example, "generation", 2, task_answer=True).skipped
    assert "the answer has 3 tokens, more than max_new_tokens=2; raise it" in skipped["reason"]


def test_a_wrong_answer_shows_how_the_models_own_begins(tiny: DePass) -> None:
    """Greedy tokens are known only up to the first that differs from the given answer."""
    prompt = "the capital of France is"
    said = tiny.attribute_generation(prompt, max_new_tokens=3)
    ids = said[0].token_ids
    greedy = ids[-3:]
    other = greedy[1] + 1
    found = tiny.attribute(prompt, Continuation([greedy[0], other, greedy[2]]))
    assert found.prediction == "".join(said.tokens[-3:-1])
    assert tiny.attribute(prompt, Continuation(greedy)).prediction == "".join(said.tokens[-3:])
    later = tiny.attribute(prompt, Continuation([*greedy[:2], other], tokens=slice(1, None)))
    assert later.prediction == "".join(said.tokens[-2:])
    (alone,) = DePass(tiny.model).attribute(input_ids=[ids[:-3]], target=Continuation([other, 5]))
    assert alone.prediction == str(greedy[0])


def test_other_methods_explain_whole_answers(tiny: DePass) -> None:
    """The sum of single tokens' scores, each on the text before it, and differences of two answers."""
    for name in ("input_gradient", "occlusion", "mean_attention", "atp"):
        method = METHODS[name](tiny)
        answer = Continuation(" Mary and John", reduce="mean")
        found = method.attribute([TEXT, "the capital of France is"], answer)[0]
        ids, start = found.token_ids, found.answer_start
        assert start is not None
        for_tokens = [
            method.attribute(input_ids=[ids[:end]], target=ids[end])[0] for end in range(start, len(ids))
        ]
        expected = torch.zeros(len(found))
        for single in for_tokens:
            expected[: len(single)] += single.scores / len(for_tokens)
        torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-5)
        assert found.value == pytest.approx(sum(single.value for single in for_tokens) / 3, rel=1e-5)
        whole = tiny.attribute(TEXT, answer)
        assert (found.target, found.prediction, found.rank) == (whole.target, whole.prediction, whole.rank)
        assert found.metadata["log_probability"] == pytest.approx(whole.metadata["log_probability"], rel=1e-4)
    both = method.attribute(TEXT, Preference(" Mary and", " John and"))
    sides = [method.attribute(TEXT, Continuation(text, of="logprob")) for text in (" Mary and", " John and")]
    torch.testing.assert_close(both.scores, sides[0].scores - sides[1].scores, rtol=1e-4, atol=1e-5)
    example = Example("1", TEXT, " Mary and John")
    module = AttributionModule(METHODS["occlusion"](tiny), explained=Explained("token"))
    (row,) = module.predict_step(PromptBatch([0], [example])).rows
    assert row["tokens"][row["answer_start"] :] == [" Mary", " and", " John"]


def test_evidence_is_ranked_among_the_prompts_tokens(tiny: DePass) -> None:
    found = tiny.attribute(TEXT, Continuation(" Mary and John", of="logprob"), rule="half")
    counted = text_components(found)
    assert found.answer_start is not None
    assert counted == list(range(1, found.answer_start))
