"""What the callback asks, and whom: probes, the model inside a module, its tokenizer, and the history."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from depass_lightning import Contrast, DePassError
from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring.discovery import find_model, find_tokenizer
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.probe_sets import load_set, name_sets
from depass_lightning.tasks import Example, load
from tests.reference.training import PROMPTS, language_model, tokenizer


class Nested(pl.LightningModule):
    def __init__(self, **parts: torch.nn.Module) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict(parts)


@pytest.mark.parametrize(
    "where",
    [None, "parts.policy", "parts", lambda module: module.parts["policy"]],
    ids=["search", "path", "path above", "function"],
)
def test_it_finds_the_model(where: Any) -> None:
    model = language_model()
    assert find_model(Nested(policy=model), where) is model
    assert find_model(Nested(policy=torch.compile(model, backend="eager")), where) is model  # type: ignore[arg-type]


def test_it_says_which_model_it_cannot_choose() -> None:
    with pytest.raises(DePassError, match="and no classifier, inside Nested"):
        find_model(Nested(head=torch.nn.Linear(2, 2), body=language_model().model))
    both = Nested(policy=language_model(), reference=language_model())
    with pytest.raises(DePassError, match=r"2 language models .* 'parts.policy', 'parts.reference'; choose"):
        find_model(both)
    with pytest.raises(DePassError, match="model='policy' is no attribute of Nested"):
        find_model(both, "policy")
    assert find_model(both, "parts.reference") is both.parts["reference"]
    # a reference model is not trained
    assert find_model(both, trained=list(both.parts["policy"].parameters())) is both.parts["policy"]
    with pytest.raises(DePassError, match="2 language models"):
        find_model(both, trained=list(both.parameters()))


def test_it_finds_the_tokenizer_or_says_what_to_do(tmp_path: Path) -> None:
    model, own, given = language_model(), tokenizer(), tokenizer()
    assert find_tokenizer(model, [given, own]) is given
    assert find_tokenizer(model, [None, own]) is own
    with pytest.raises(DePassError, match=r"tokenizer of LlamaForCausalLM.*give tokenizer="):
        find_tokenizer(model, [None])
    own.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    loaded = find_tokenizer(model)
    assert loaded is not None
    assert loaded.get_vocab() == own.get_vocab()
    model.config._name_or_path = str(tmp_path / "nowhere")
    assert find_tokenizer(model, needed=False) is None
    with pytest.raises(DePassError, match="nowhere, which could not be loaded"):
        find_tokenizer(model)


def test_probes_are_a_task_its_name_a_file_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": prompt, "target": target} for prompt, target in PROMPTS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [*name_sets("ioi"), *name_sets(file), *name_sets([("a", "b")])] == ["ioi", "mine", "probes"]
    assert [*name_sets(load("known", size=3)), *name_sets({"a": "ioi", "b": "known"})] == ["known", "a", "b"]
    generated = load_set("ioi", "ioi", 7)
    assert len(generated) == 7
    assert isinstance(generated[0].target, Contrast)
    assert all(probe.prompt[a:b].strip() for probe in generated for a, b in probe.evidence)
    assert [probe.prompt for probe in load_set("mine", file, 4)] == [prompt for prompt, _ in PROMPTS[:4]]
    assert len(load_set("mine", str(file), 50)) == 5
    assert load_set("x", [("a b", 3), ("c", None)], 16)[1].id == "x-1"


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: DePassCallback(size=0), "size must be at least 1"),
    (lambda: DePassCallback(every_n_steps=0), "every_n_steps must be at least 1"),
    (lambda: DePassCallback(on_error="ignore"), "on_error must be 'log' or 'raise'"),  # type: ignore[arg-type]
    (lambda: DePassCallback({}), "empty mapping"),
    (lambda: load_set("x", [], 16), "the probe set 'x' is empty"),
    (lambda: load_set("x", ["a prompt"], 16), "give \\(prompt, target\\), or an Example"),  # type: ignore[list-item]
    (lambda: load_set("x", 5, 16), "the probes of 'x' are a int"),  # type: ignore[arg-type]
    (lambda: load_set("x", [Example("a", "b", " c")] * 2, 16), "both named 'a'"),
    (lambda: load_set("x", "nosuch", 16), "no task 'nosuch'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DePassError, match=message):
        make()


def test_history_pads_curves_that_begin_or_end_late() -> None:
    history = History()
    history.add(0, {"value": 1.0}, {}, {}, {})
    history.add(5, {"value": 2.0, "on_target": 0.5}, {}, {}, {})
    history.add(9, {"on_target": 0.7}, {}, {}, {})
    back = History.from_state_dict(history.state_dict())
    assert back.steps == [0, 5, 9]
    assert back.curves["value"] == pytest.approx([1.0, 2.0, math.nan], nan_ok=True)
    assert back.curves["on_target"] == pytest.approx([math.nan, 0.5, 0.7], nan_ok=True)
