"""`circuit=True`: a set's mean circuit at every run, and how its largest edges change between runs."""

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoConfig, AutoModelForSequenceClassification

from depass_lightning import Circuit, DePass, DePassError
from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring import ProbeMonitor, probe_circuits
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.sinks import MLflowSink, Sink, TensorBoardSink, WandbSink
from tests.reference.models import SMALL
from tests.reference.training import PROMPTS, OwnModule, fit, tokenizer, trainer


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """So few edges are compared that they change during a tiny training."""
    monkeypatch.setattr(probe_circuits, "EDGES", 6)
    return 6


def test_edges_that_appear_and_vanish_are_logged(tmp_path: Path, few: int) -> None:
    module, names = OwnModule(), ("circuit_overlap_first", "circuit_overlap_previous")
    callback = DePassCallback(
        {"ioi": list(PROMPTS)},
        source=["tokens", "heads"],
        circuit=True,
        alarms=["circuit_overlap_first below 0.99"],
    )
    trained = trainer(tmp_path, [callback])
    fit(trained, module)
    folder, steps = tmp_path / "depass/ioi/tokens", [0, 2, 4, 6]
    circuits = [Circuit.load(folder / f"circuit-{step:06d}.safetensors") for step in steps]
    depass = DePass(module.inside.lm.eval(), module.tokenizer)
    nodes = ("embedding", "heads", "mlps")
    expected = Circuit.mean([depass.circuit(prompt, target, nodes=nodes) for prompt, target in PROMPTS])
    torch.testing.assert_close(circuits[-1].edges, expected.edges, rtol=1e-4, atol=1e-6)
    assert circuits[-1].prompts == len(PROMPTS)
    curves = callback.history["ioi/tokens"].curves
    pairs = list(zip([circuits[0], *circuits], circuits, strict=False))
    changes = [before.compare(now, edges=few) for before, now in pairs]
    assert curves[names[1]] == pytest.approx([change.overlap for change in changes])
    assert curves[names[0]] == pytest.approx([circuits[0].compare(now, few).overlap for now in circuits])
    assert any(change.appeared for change in changes)
    assert not set(names) & callback.history["ioi/heads"].curves.keys()
    assert f"depass/ioi/tokens/{names[1]}" in trained.callback_metrics
    written = json.loads((folder / "history.json").read_text())["circuits"]
    assert list(written) == [str(step) for step in steps]
    assert set(written["6"].values()) == {edge.score for edge in circuits[-1].top(few)}
    page = (folder / "circuit.html").read_text()
    counts = [re.findall(rf">{sign}(\d+)</th>", page) for sign in ("\\+", "−")]
    assert counts[0] == [str(len(change.appeared)) for change in changes[1:]]
    assert counts[1] == [str(len(change.vanished)) for change in changes[1:]]
    assert all(f">{name}</th>" in page for name in callback.history["ioi/tokens"].circuits[0])
    assert {path.name for path in (tmp_path / "depass/ioi/heads").glob("circuit*")} == set()
    resumed = History.from_state_dict(callback.history["ioi/tokens"].state_dict())
    assert resumed.circuits == callback.history["ioi/tokens"].circuits


def test_loggers_get_the_circuit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the services' clients are called: the page, the figure and the files."""
    monkeypatch.setattr("wandb.Artifact", lambda *_, **__: Mock())
    monkeypatch.setattr("wandb.Html", lambda page, **_: page)
    monkeypatch.setattr("wandb.Table", lambda **_: None)
    run, writer, client = Mock(id="r"), Mock(), Mock()
    module = OwnModule()
    sinks: list[Sink] = [WandbSink(run), TensorBoardSink(writer), MLflowSink(client, "r")]
    probes = {"ioi": list(PROMPTS)}
    monitor = ProbeMonitor(module, module.tokenizer, probes, circuit=True, on_error="raise")
    monitor.publish(monitor.run(3), sinks, tmp_path)
    folder = tmp_path / "depass/ioi"
    page, circuit = folder / "circuit.html", folder / "circuit-000003.safetensors"
    assert run.log.call_args.args[0]["depass/ioi/circuit"] == page.read_text()
    artifact = run.log_artifact.call_args.args[0]
    artifact.add_file.assert_called_with(str(circuit), name="circuit.safetensors")
    assert "depass/ioi/circuit" in [call.args[0] for call in writer.add_figure.call_args_list]
    logged = {call.args[1] for call in client.log_artifact.call_args_list}
    assert {str(page), str(circuit)} < logged


def test_a_rule_without_circuits_ends_training_before_it_begins(tmp_path: Path) -> None:
    module = OwnModule()
    with pytest.raises(DePassError, match="circuit=True needs a linear rule, not 'softmax'"):
        fit(trainer(tmp_path, [DePassCallback(list(PROMPTS), circuit=True, rule="softmax")]), module)
    assert module.losses == []


def test_what_has_no_circuit_is_refused_at_once() -> None:
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", **SMALL | {"num_key_value_heads": 6, "pad_token_id": 0})
    )
    with pytest.raises(DePassError, match="circuit=True is for causal models, and BertForSequence"):
        ProbeMonitor(model, tokenizer(), list(PROMPTS), circuit=True, faithfulness=0)
    with pytest.raises(DePassError, match="circuit_overlap_previous"):
        ProbeMonitor(None, None, list(PROMPTS), alarms=["circuit_overlap_previous below 0.5"])


def test_overlaps_are_missing_where_every_probe_failed(tmp_path: Path) -> None:
    module = OwnModule()
    callback = DePassCallback(list(PROMPTS), circuit=True, every_n_steps=2, faithfulness=0)

    class Break(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 3:
                module.inside.lm.lm_head.weight.data.fill_(math.nan)

    run = trainer(tmp_path, [Break(), callback], max_steps=4, max_epochs=-1)
    fit(run, module)
    for name in ("similarity_first", *probe_circuits.CIRCUIT_SCALARS):
        assert math.isnan(run.callback_metrics[f"depass/probes/{name}"]), name
