"""ProbeMonitor in a training loop without a framework."""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from transformers import LlamaForSequenceClassification

from depass_lightning import DePassError
from depass_lightning.faithfulness import area
from depass_lightning.faithfulness.evidence import answer_tokens
from depass_lightning.faithfulness.token_removal import removal_curves
from depass_lightning.monitoring.monitor import ProbeMonitor
from depass_lightning.monitoring.probe_sets import AnswerPart
from depass_lightning.monitoring.runner import ORDERS, REMOVED
from depass_lightning.monitoring.sinks import FunctionSink, TensorBoardSink, WandbSink
from depass_lightning.storage import read_attributions
from depass_lightning.tasks import Example
from tests.callbacks.test_callback import same
from tests.callbacks.test_loggers import history_rows
from tests.conftest import ROOT
from tests.reference.training import PROMPTS, Inside, language_model, loader, tokenizer
from tests.reference.zoo import build

# Lightning's own: a logger, and when ModelCheckpoint ranks.
LIGHTNING = {"wandb_logger", "checkpoints"}


def loop(model: nn.Module, monitor: ProbeMonitor | None = None, first: int = 0, steps: int = 6) -> Any:
    """Train with dropout, and return everything that a monitor could have changed."""
    torch.manual_seed(2 + first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step, batch in enumerate(list(loader())[first:steps], start=first):
        if monitor is not None:
            monitor.run(step)
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict(), optimizer.state_dict(), torch.get_rng_state()


def test_a_loop_is_bit_identical_with_and_without_it() -> None:
    without = loop(language_model())
    model = language_model()
    monitor = ProbeMonitor(
        Inside(model), tokenizer(), list(PROMPTS), source=["tokens", "heads"], rule="taylor"
    )
    assert same(without, loop(model, monitor))
    assert monitor.history["probes/heads"].steps == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("framework", ["fabric", "accelerate"])
def test_fabric_and_accelerate_are_bit_identical_in_mixed_precision(framework: str, tmp_path: Path) -> None:
    """Both put autocast around or into the forward pass."""
    logged: list[Any] = []

    def train(monitored: bool) -> Any:
        model: Any = language_model()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if framework == "fabric":
            fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
            prepared, optimizer = fabric.setup(model, optimizer)
            backward = fabric.backward
        else:
            accelerator = Accelerator(mixed_precision="bf16", cpu=True)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            backward = accelerator.backward
        monitor = ProbeMonitor(prepared, tokenizer(), list(PROMPTS), faithfulness=0) if monitored else None
        torch.manual_seed(2)
        losses = []
        for step, batch in enumerate(list(loader())[:4]):
            if monitor is not None:
                monitor.publish(monitor.run(step), [FunctionSink(lambda *row: logged.append(row))], tmp_path)
            prepared.train()
            loss = prepared(input_ids=batch, labels=batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, model.state_dict(), torch.get_rng_state()

    assert same(train(False), train(True))
    assert [step for _, step in logged] == [0, 1, 2, 3]
    assert max(scalars["depass/probes/completeness"] for scalars, _ in logged) < 1e-5


def test_a_run_has_scalars_results_and_pages_and_is_published(tmp_path: Path) -> None:
    rows: list[Any] = []
    monitor = ProbeMonitor(
        language_model(), tokenizer(), {"a": PROMPTS[:3], "b": PROMPTS[3:]}, faithfulness=0
    )
    result = monitor.run(7)
    assert [part.name for part in result.results] == ["a", "b"]
    assert result.scalars["depass/a/value"] == pytest.approx(
        sum(attribution.value for attribution in result.results[0].attributions) / 3
    )
    assert set(result.pages) == {"a", "b"}
    monitor.publish(result, [FunctionSink(lambda *row: rows.append(row))], tmp_path)
    assert rows == [(dict(result.scalars), 7)]
    assert (tmp_path / "depass/a/step-000007.html").read_text() == result.pages["a"]
    assert len(read_attributions(tmp_path / "depass/b/step-000007.parquet")) == 2
    again = monitor.run(7)
    assert (again.new, again.scalars) == (False, result.scalars)
    monitor.publish(again, [FunctionSink(lambda *row: rows.append(row))], tmp_path)
    assert len(rows) == 1


def test_a_tasks_answer_is_explained_whole_or_by_its_first_token() -> None:
    prompt, answer = PROMPTS[0]
    examples = [Example("plain", prompt, answer * 2), Example("foil", prompt, answer * 2, PROMPTS[1][1])]
    parts: list[tuple[AnswerPart, str]] = [("whole", f"{answer * 2!r}"), ("first", f"{answer!r}")]
    for part, target in parts:
        monitor = ProbeMonitor(
            language_model(), tokenizer(), examples, answer=part, target="token", faithfulness=1
        )
        result = monitor.run(0).results[0]
        assert [found.target for found in result.attributions] == [target] * 2
        assert {found.whole_answer for found in result.attributions} == {part == "whole"}
        assert result.metrics["faithfulness"] == result.metrics["faithfulness"]
    monitor = ProbeMonitor(language_model(), tokenizer(), examples, faithfulness=0)
    _, against = monitor.run(0).results[0].attributions
    assert "chosen_log_probability" in against.metadata
    with pytest.raises(DePassError, match="answer must be 'whole' or 'first', not 'last'"):
        ProbeMonitor(None, None, examples, answer="last")  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["whole", "first"])
def test_pairs_and_loaders_explain_the_same_of_an_answer_as_a_task(part: AnswerPart) -> None:
    """Labels mark the answer alone; its other tokens, and the prompt's, are ignored."""
    prompt, answer = PROMPTS[0]
    before, ids = tokenizer()(prompt)["input_ids"], tokenizer().encode(answer * 2, add_special_tokens=False)
    row = {
        "input_ids": torch.tensor([[*before, *ids, 0]]),
        "attention_mask": torch.tensor([[1] * (len(before) + len(ids)) + [0]]),
        "labels": torch.tensor([[-100] * len(before) + ids + [-100]]),
    }
    rows: Any = [row]
    sets = {
        "task": [Example("a", prompt, answer * 2)],
        "pair": [(prompt, answer * 2)],
        "loader": DataLoader(rows, batch_size=None),
    }
    values = []
    for name, probes in sets.items():
        (result,) = ProbeMonitor(language_model(), tokenizer(), {name: probes}, answer=part).run(0).results
        (scored,) = result.attributions
        assert scored.whole_answer == (part == "whole")
        assert scored.target == repr(answer * 2 if part == "whole" else answer)
        assert result.metrics["faithfulness"] == result.metrics["faithfulness"]
        values.append((scored.value, *scored.scores.tolist()))
    assert values[1] == pytest.approx(values[0])
    assert values[2] == pytest.approx(values[0])


def test_faithfulness_is_also_measured_with_the_last_token_kept() -> None:
    model = language_model()
    (result,) = ProbeMonitor(model, tokenizer(), list(PROMPTS), faithfulness=2).run(0).results
    attributions = list(result.attributions[:2])
    answers = [answer_tokens(attribution) for attribution in attributions]
    for name, keep_last in (("faithfulness", False), ("kept_faithfulness", True)):
        curves = removal_curves(
            model.eval(), attributions, answers, percents=REMOVED, draws=ORDERS, keep_last=keep_last
        )
        gains = [area(REMOVED, curve.patch_random) - area(REMOVED, curve.patch_top) for curve in curves]
        assert result.metrics[name] == pytest.approx(sum(gains) / 2, abs=1e-6)
    assert result.metrics["kept_faithfulness"] != result.metrics["faithfulness"]


def test_a_label_is_one_output_however_many_tokens_its_name_has() -> None:
    prompt, answer = PROMPTS[0]
    label = (answer * 2).strip()
    labels = {0: label, 1: "other"}
    config: Any = language_model().config
    config.id2label = labels
    model = LlamaForSequenceClassification(config)
    (result,) = ProbeMonitor(model, tokenizer(), [(prompt, label)]).run(0).results
    assert label in result.attributions[0].target
    assert result.metrics["failed"] == 0


def test_overhead_is_left_out_of_the_first_run() -> None:
    monitor = ProbeMonitor(language_model(), tokenizer(), list(PROMPTS), faithfulness=0)
    assert "depass/overhead" not in monitor.run(0).scalars
    assert 0 < monitor.run(1).scalars["depass/overhead"] <= 1


def test_a_state_dict_continues_the_history_and_is_loaded_safely(tmp_path: Path) -> None:
    whole = ProbeMonitor(model := language_model(), tokenizer(), list(PROMPTS), faithfulness=0)
    loop(model, whole, steps=3)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = ProbeMonitor(model, tokenizer(), list(PROMPTS), faithfulness=0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.run(2).new is False
    for monitor in (whole, resumed):
        monitor.start(3)
        monitor.run(3)
    assert resumed.history["probes"].as_json() == whole.history["probes"].as_json()
    resumed.start(0)  # a training that starts over
    assert resumed.history == {}


def test_adapters_that_are_added_during_training_are_attributed(caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    model = language_model()
    monitor = ProbeMonitor(model, tokenizer(), list(PROMPTS), faithfulness=0)
    before = monitor.run(0)
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora)  # changes the model in place
    after = monitor.run(1)
    assert after.scalars["depass/probes/completeness"] < 1e-5
    assert after.scalars["depass/probes/value"] != pytest.approx(before.scalars["depass/probes/value"])
    model.model.layers[0].mlp = nn.Linear(16, 16)  # no gate and no neurons: nothing that can be attributed
    with caplog.at_level(logging.WARNING):
        assert monitor.run(2).scalars["depass/probes/failed"] == 5
    assert "of 'probes' failed at step 2" in caplog.text
    assert monitor.run(3).scalars["depass/probes/failed"] == 5


@pytest.fixture
def _one_process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
def test_sharded_weights_are_refused_by_the_type_of_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever strategy or plain call has sharded them."""
    mesh = init_device_mesh("cpu", (1,))
    parallel = language_model()
    parallelize_module(parallel, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    zero3: Any = language_model()
    zero3.model.norm.weight.ds_id = 0
    fsdp1 = language_model()
    fsdp1.model.embed_tokens.weight = nn.Parameter(fsdp1.model.embed_tokens.weight.detach().flatten())
    offloaded: Any = language_model()
    fully_shard(offloaded, mesh=mesh)
    monkeypatch.setattr(type(mesh), "device_type", "cuda")
    for model, cause in (
        (parallel, "DTensors"),
        (offloaded, "FSDP2's with CPUOffloadPolicy"),
        (zero3, "ZeRO-3"),
        (fsdp1, "flattened pieces"),
    ):
        with pytest.raises(DePassError, match=rf"sharded over ranks \({cause}.*watch.folder="):
            ProbeMonitor(Inside(model), tokenizer(), list(PROMPTS))


def test_a_monitor_without_a_model_says_how_to_bind_one() -> None:
    with pytest.raises(DePassError, match=r"no model; call bind\(model, \[tokenizer\]\)"):
        ProbeMonitor(None, None, list(PROMPTS)).run(0)


def test_wandb_has_one_row_a_run_over_the_trainings_axis(tmp_path: Path) -> None:
    run = wandb.init(project="tests", dir=tmp_path, mode="offline")
    monitor = ProbeMonitor(
        language_model(), tokenizer(), {"a": PROMPTS[:2], "b": PROMPTS[2:]}, faithfulness=0
    )
    sinks = [WandbSink(axis="train/global_step")]
    for step in (0, 5):
        monitor.publish(monitor.run(step), sinks, tmp_path)
    run.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    rows = [row for row in history_rows(folder) if any(key.startswith("depass/") for key in row)]
    assert [row["train/global_step"] for row in rows] == [0, 5]
    for row in rows:
        assert {f"depass/{name}/{key}" for name in "ab" for key in ("value", "map", "table")} <= set(row)
    with pytest.raises(DePassError, match=r"call wandb.init\(\) first"):
        WandbSink()


def test_a_sink_that_fails_costs_no_other_its_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __getattr__(self, name: str) -> Any:
            return lambda tag, *_, global_step: self.seen.append((name, tag, global_step))

    def fail(*_: Any) -> None:
        raise ConnectionError("no server")

    writer = Writer()
    monitor = ProbeMonitor(language_model(), tokenizer(), list(PROMPTS), faithfulness=0)
    with caplog.at_level(logging.WARNING):
        monitor.publish(monitor.run(4), [FunctionSink(fail), TensorBoardSink(writer)], tmp_path, step=9)
    assert f"the maps of step 9 are in {tmp_path}, but the function failed: no server" in caplog.text
    assert ("add_scalar", "depass/probes/value", 9) in writer.seen
    assert ("add_text", "depass/probes/table", 9) in writer.seen


def test_only_lightnings_own_files_import_lightning() -> None:
    knowing = {
        path.stem
        for path in (ROOT / "depass_lightning/monitoring").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lightning"
    }
    assert knowing == LIGHTNING


def test_modules_are_the_mixers_of_a_hybrid_model() -> None:
    rows: Any = [{"input_ids": torch.arange(3, 9), "target": torch.tensor(7)}]
    probes = DataLoader(rows)
    kinds = {}
    for family in ("llama", "lfm2"):
        monitor = ProbeMonitor(build(family), tokenizer(), probes, source="modules", faithfulness=0)
        [result] = monitor.run(0).results
        kinds[family] = {component.kind for component in result.attributions[0].components}
    assert "attention" in kinds["llama"]
    assert "mixer" in kinds["lfm2"]
