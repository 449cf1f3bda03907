"""Answers of several tokens: probability, correctness, score and measures are of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from depass_lightning import Continuation, Contrast, DePass, Preference, Spans, Token
from depass_lightning.faithfulness import Case, CitationRemoval, TokenRemoval, evaluate
from depass_lightning.faithfulness.ablated_prompts import AblatedPrompt, answers_of
from depass_lightning.methods import make_method
from depass_lightning.modules.attribution_module import AttributionModule, Explained
from depass_lightning.modules.prompt_datamodule import PromptBatch
from depass_lightning.tasks import Example, load
from tests.reference.models import build

PROMPT, ANSWER = "the capital of France is", " Paris Paris"


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


def test_readings_are_of_all_tokens() -> None:
    model = build("llama", dtype=torch.float32)
    prompts = [
        AblatedPrompt([1, 2, 3], [True] * 3, [4, 5]),
        AblatedPrompt([7, 8], [True, False], [9, 10]),
        AblatedPrompt([1, 2], [True] * 2, [6]),
        AblatedPrompt([3, 2, 1, 5, 7], [True] * 5, [11, 12]),
    ]
    for prompt, reading in zip(prompts, answers_of(model, prompts, 8), strict=True):
        embeddings = model.get_input_embeddings()(torch.tensor([[*prompt.ids, *prompt.answer]]))
        embeddings[0, : len(prompt.ids)] *= torch.tensor(prompt.seen)[:, None]
        with torch.no_grad():
            logits = model(inputs_embeds=embeddings).logits[0].double()
        rows = logits[len(prompt.ids) - 1 : -1]
        taken = rows.gather(1, torch.tensor(prompt.answer)[:, None])
        log = float((taken - rows.logsumexp(1, keepdim=True)).sum())
        assert reading.probability == pytest.approx(math.exp(log), rel=1e-4)
        assert reading.log_odds == pytest.approx(log - math.log1p(-math.exp(log)), abs=1e-4)
        assert reading.logit == pytest.approx(float(taken.sum()), abs=1e-4)
        assert reading.rank == 1 + int((rows > taken).sum(1).max())


def test_the_target_of_a_task_is_the_whole_answer(depass: DePass) -> None:
    tokenizer = depass.tokenizer
    one, two = Example("1", PROMPT, " Paris", " Rome"), Example("2", PROMPT, ANSWER, " Rome")
    assert Explained("contrast").target(one, tokenizer) == Contrast(" Paris", " Rome", first=True)
    assert Explained("contrast").target(two, tokenizer) == Preference(ANSWER, " Rome", of="logit")
    assert Explained("token").target(two, tokenizer) == Continuation(ANSWER)
    assert Explained("log_odds").target(two, tokenizer) == Continuation(ANSWER, of="log_odds")
    assert Explained("token", answer="first").target(two, tokenizer) == Token(ANSWER, first=True)
    assert Explained("own").target(two, tokenizer) == Token(None)


def test_measures_are_of_the_whole_answer(depass: DePass) -> None:
    example = load("rag", size=1, sentences=3)[0]
    answer = str(example.answer) * 2
    prompt = depass.attribute(example.prompt, Continuation(answer), source=Spans("sentence"), rule="half")
    (row,) = evaluate(
        [Case(prompt)], [CitationRemoval(samples=4), TokenRemoval(percents=[0, 100], draws=0)], depass
    )
    assert row["patch_top"][0] == pytest.approx(prompt.probability, rel=1e-3)
    assert {"lds", "drop_1", "drop_3"} <= row.keys()
    start = prompt.answer_start
    assert start is not None

    def log_probability(ids: list[int]) -> float:
        taken = prompt.token_ids[start:]
        with torch.no_grad():
            logits = depass.model(torch.tensor([ids + taken[:-1]])).logits[0].double()  # type: ignore[operator]
        logs = logits.log_softmax(-1)[len(ids) - 1 :]
        return float(logs.gather(1, torch.tensor(taken)[:, None]).sum())

    (best, *_) = prompt.cite(1)
    whole = prompt.token_ids[:start]
    without = whole[: best.span[0]] + whole[best.span[1] :]
    assert row["drop_1"] == pytest.approx(log_probability(whole) - log_probability(without), abs=1e-4)


def test_rows_of_an_analysis_hold_the_whole_answers_numbers(depass: DePass) -> None:
    examples = [Example("1", PROMPT, ANSWER), Example("2", PROMPT, " Paris")]
    rows = {}
    options: dict[str, dict[str, Any]] = {"depass": {"rule": "half"}, "random": {}}
    for name, settings in options.items():
        module = AttributionModule(make_method(name, depass, **settings), explained=Explained("token"))
        rows[name] = module.predict_step(PromptBatch([0, 1], examples)).rows
    whole = depass.attribute(PROMPT, Continuation(ANSWER), rule="half")
    assert rows["depass"][0]["probability"] == pytest.approx(whole.probability, rel=1e-4)
    assert rows["depass"][0]["value"] == pytest.approx(whole.value, rel=1e-4)
    assert rows["depass"][0]["correct"] == whole.correct
    assert rows["depass"][0]["answer_start"] == whole.answer_start
    for key in ("value", "probability", "correct", "answer_start", "target_ids"):
        assert rows["random"][0][key] == pytest.approx(rows["depass"][0][key], rel=1e-4), key
