"""`rule="auto"`: which rule a source takes, and that several sources take theirs in one call."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from depass_lightning import (
    Continuation,
    DePass,
    Heads,
    LogOdds,
    Module,
    Neurons,
    Spans,
    Subspace,
    Token,
    Tokens,
)
from depass_lightning.monitoring.monitor import ProbeMonitor
from depass_lightning.sources import Source
from tests.reference.models import prompt
from tests.reference.zoo import build

PROMPT = "When Mary and John went to the store, John gave a drink to"

TAKEN: list[tuple[Source, dict[str, Any], str]] = [
    *((source, {}, "half") for source in (Tokens(), Spans("word"), Module("mlp"), Neurons(1))),
    (Subspace(1, torch.eye(1, 64)), {}, "half"),
    (Heads(), {}, "shap"),
    (Heads(), {"engine": "adjoint"}, "shap"),
    (Heads(), {"engine": "propagate"}, "half"),
    (Neurons(0, top=4), {}, "softmax"),
    (Tokens(), {"compat": "paper_code"}, "softmax"),
    (Heads(), {"attention_path": "control"}, "taylor"),
]


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.mark.parametrize(("source", "options", "rule"), TAKEN)
def test_each_source_takes_its_rule(
    depass: DePass, source: Source, options: dict[str, Any], rule: str
) -> None:
    """The result names the rule taken, and equals that rule's; the target does not matter."""
    targets = [Token(" Mary"), LogOdds(" Mary"), Continuation(" Mary")]
    automatic = depass.attribute(PROMPT, targets, source=source, rule="auto", **options)
    named = depass.attribute(PROMPT, targets, source=source, rule=rule, **options)  # type: ignore[arg-type]
    for one, other in zip(automatic, named, strict=True):
        assert one.rule == other.rule == rule
        assert torch.equal(one.scores, other.scores)


def test_the_default_of_python_is_the_papers_rule(depass: DePass) -> None:
    assert depass.attribute(PROMPT).rule == "softmax"


def test_several_sources_take_their_rules_in_one_call(depass: DePass) -> None:
    sources: list[Source] = [Heads(), Tokens(), Heads(layer=1), Module("attention")]
    prompts, targets = [PROMPT, "The capital of Norway is"], [" Mary", " Oslo"]
    for results in depass.attribute_sources(prompts, targets, sources, rule="auto", batch_size=1):
        assert [result.rule for result in results] == ["shap", "half", "shap", "half"]
        for source, result in zip(sources, results, strict=True):
            expected = depass.attribute(result.text, result.target_ids[0], source=source, rule=result.rule)
            assert result.names == expected.names
            torch.testing.assert_close(result.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_states_of_heads_are_propagated_forward(depass: DePass) -> None:
    states = depass.decompose(PROMPT, source=Heads(), rule="auto").states
    assert torch.equal(states, depass.decompose(PROMPT, source=Heads(), rule="half").states)
    assert depass.estimate(PROMPT, Heads(), rule="auto").seconds > 0
    assert depass.attribute_generation(PROMPT, max_new_tokens=2, rule="auto")[0].rule == "half"


def test_monitors_take_it_by_default(depass: DePass) -> None:
    monitor = ProbeMonitor(
        depass.model, depass.tokenizer, [(PROMPT, " Mary")], source=["tokens", "heads"], faithfulness=1
    )
    rules = {result.name: result.attributions[0].rule for result in monitor.run(0).results}
    assert rules == {"probes/tokens": "half", "probes/heads": "shap"}


@pytest.mark.parametrize(("name", "why"), [("megatron-bert", "normed state"), ("granite_swa", "one softmax")])
def test_heads_take_half_where_shap_cannot_follow(
    name: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Norms inside attention, and sinks outside of its softmax; the reason is logged once."""
    depass = DePass(build(name))
    arguments: dict[str, Any] = {"prompt": None, "input_ids": prompt(6)[None], "target": 4}
    with caplog.at_level(logging.WARNING, logger="depass_lightning"):
        ((tokens, heads),) = depass.attribute_sources(**arguments, sources=[Tokens(), Heads()], rule="auto")
        assert depass.attribute(**arguments, source=Heads(layer=1), rule="auto")[0].rule == "half"
    assert tokens.rule == heads.rule == "half"
    (half,) = depass.attribute(**arguments, source=Heads(), rule="half")
    assert torch.equal(heads.scores, half.scores)
    (reason,) = [text for text in caplog.messages if "rule='auto' takes 'half' for heads" in text]
    assert why in reason
    rows: Any = [{"input_ids": prompt(6), "target": 4}] * 2
    loader = DataLoader(rows, batch_size=2)
    results = ProbeMonitor(depass.model, None, loader, source="heads").run(0).results
    assert {scored.rule for scored in results[0].attributions} == {"half"}
