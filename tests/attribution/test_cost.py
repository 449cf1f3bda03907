"""What is estimated before a run is what the run then holds; its seconds are checked in `benchmarks/`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf

from depass_lightning import DePass, DePassError, Heads, Module, Neurons, Spans, Subspace, Tokens, tasks
from depass_lightning.attribution.cost import propagated_rows
from depass_lightning.attribution.settings import settings_of
from depass_lightning.commands.attribute_task import print_estimate
from depass_lightning.engine import propagate
from depass_lightning.engine.state import DecomposedState
from depass_lightning.engine.variants import top_neurons
from depass_lightning.methods import DePassMethod
from depass_lightning.modules.attribution_module import AttributionModule
from depass_lightning.prompts import prompts_of_ids
from tests.reference.models import build, prompt

pytestmark = pytest.mark.covering

SOURCES: dict[str, Any] = {
    "tokens": Tokens(),
    "tokens in the middle": Tokens(1),
    "spans": Spans([(1, 3), (5, 6)], "token"),
    "heads": Heads(),
    "one layer's heads": Heads(1),
    "mlp": Module("mlp"),
    "neurons": Neurons(),
    "first neurons": Neurons(0),
    "few neurons": Neurons(0, top=3),
    "subspace": Subspace(1, torch.randn(2, 36, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_rows_are_those_that_are_carried(name: str, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    depass = DePass(build(name, num_hidden_layers=5))
    ids = prompt(9)[None]
    (entry,) = prompts_of_ids(ids, None, None, None, 61)
    settings = settings_of(depass.decoder, [source], rule="softmax", temperature=0.1, bias="component")
    expected = [
        rows for own in source.per_layer(5) for rows in propagated_rows(own, entry, depass.decoder, settings)
    ]
    found: list[int] = []
    share, bulk_share = propagate.propagate_mlp, top_neurons.share_with_bulk

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def count(state: DecomposedState, *given: Any) -> Any:
            if state.layout.positions == ids.shape[1]:  # not at the target alone
                found.append(state.layout.rows)
            return work(state, *given)

        return count

    monkeypatch.setattr(propagate, "propagate_mlp", counted(share))
    monkeypatch.setattr(top_neurons, "share_with_bulk", counted(bulk_share))
    depass.attribute(input_ids=ids, target=5, source=source)
    assert sum(found) == sum(expected) > 0


def test_bytes_grow_with_the_prompt_and_not_where_scores_are_taken_back() -> None:
    depass = DePass(build("llama"))
    short, long = (depass.estimate(input_ids=prompt(length)[None]) for length in (8, 32))
    rows, hidden = 32 * 33 // 2, 36
    assert long.components == rows * hidden * 4
    assert long.recording >= 4 * short.recording
    assert long.bytes == long.recording + long.components + long.working
    back = depass.estimate(input_ids=prompt(32)[None], rule="taylor")
    assert back.components == 0
    assert back.seconds > 0
    assert "GiB in addition to the model" in str(back)


def test_an_estimate_refuses_what_attribute_refuses() -> None:
    depass, unknown = DePass(build("llama")), cast(Any, "hard")
    with pytest.raises(DePassError, match="rule 'hard' is unknown"):
        depass.estimate(input_ids=prompt(5)[None], rule=unknown)
    with pytest.raises(DePassError, match="nothing to explain"):
        depass.estimate()


def test_a_command_measures_where_the_model_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    depass, task = DePass.from_pretrained("tiny"), tasks.load("ioi", size=2)
    module = AttributionModule(DePassMethod(depass))
    devices = []

    def estimate(*_: object, **__: object) -> SimpleNamespace:
        devices.append(depass.decoder.embedding.device)
        return SimpleNamespace(seconds=0.0)

    monkeypatch.setattr(depass, "estimate", estimate)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    print_estimate(OmegaConf.create({"batch_size": 2}), depass, task, module, cast(Any, trainer))
    assert devices == [torch.device("meta")]
