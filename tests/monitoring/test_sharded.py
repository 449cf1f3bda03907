"""FSDP2 models on two processes: the scores of the whole model, and an unchanged training."""

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from depass_lightning import DePass, Heads, Neurons
from depass_lightning.callbacks import DePassCallback
from depass_lightning.models import sharding
from depass_lightning.monitoring.monitor import ProbeMonitor
from depass_lightning.monitoring.runner import ProbeRunner
from depass_lightning.utils.distributed import sharing
from tests.callbacks.test_callback import same
from tests.reference.models import prompt
from tests.reference.training import (
    PROMPTS,
    Inside,
    OwnModule,
    fit,
    language_model,
    loader,
    tokenizer,
    trainer,
)
from tests.reference.zoo import build
from tests.utils.test_distributed import on_processes

FAMILIES = {"llama": "model.layers", "gpt2": "transformer.h", "granitemoe": "model.layers"}
CONTROL: dict[str, Any] = {"rule": "taylor", "attention_path": "control"}


def shard(model: Any, blocks: str, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.get_submodule(blocks):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def is_as_found(model: nn.Module) -> bool:
    """Whether all weights are sharded, and FSDP's hooks are in place."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [len(group._forward_pre_hooks) + len(group._forward_hooks) for group in groups]
    return all(isinstance(parameter, DTensor) for parameter in model.parameters()) and set(hooks) == {2}


def scores_of(depass: DePass) -> list[Tensor]:
    """Scores of the engine forward and backward, and of neurons next to the target."""
    ids = prompt(7)[None]
    options: list[dict[str, Any]] = [{}, {"source": Heads(), "rule": "taylor"}, {"source": Neurons(-1)}]
    return [depass.attribute(input_ids=ids, target=5, **chosen)[0].scores for chosen in options]


class Peak:
    """Counts the weights that are whole at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        gather = sharding.whole

        def counted(tensor: Tensor) -> Tensor:
            result = gather(tensor)
            storage = result.untyped_storage()
            self.now += result.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, result.numel())
            return result

        monkeypatch.setattr(sharding, "whole", counted)

    def _free(self, count: int) -> None:
        self.now -= count


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "granitemoe"))]
)
def test_scores_are_those_of_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(family, dtype=torch.float64)
    ids, depass = prompt(7)[None], DePass(whole)
    expected = [*scores_of(depass), depass.attribute(input_ids=ids, target=5, **CONTROL)[0].scores]
    blocks: Any = whole.get_submodule(FAMILIES[family])
    block = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    every = sum(parameter.numel() for parameter in whole.parameters())

    @sharing(False)
    def work(_rank: int) -> Any:
        model = shard(whole, FAMILIES[family])
        peak = Peak(monkeypatch)
        depass = DePass(model)
        result, most = scores_of(depass), peak.most
        result.append(depass.attribute(input_ids=ids, target=5, **CONTROL)[0].scores)
        differences = [float((a - b).abs().max()) for a, b in zip(result, expected, strict=True)]
        return max(differences), is_as_found(model), most, peak.now

    for difference, as_found, most, left in on_processes(tmp_path, 2, work):
        assert difference < 1e-6
        assert as_found
        assert left == 0
        assert most <= every - sum(parameter.numel() for parameter in blocks.parameters()) + block


def train(monitored: bool, **options: Any) -> tuple[Any, ProbeMonitor | None, bool]:
    """Train with dropout, evaluating in between, and return all that a monitor could have changed."""
    model = shard(language_model(), "model.layers", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = list(loader())
    monitor = ProbeMonitor(Inside(model), tokenizer(), list(PROMPTS), faithfulness=1) if monitored else None
    torch.manual_seed(2)
    losses = []
    for step in range(12):
        if monitor is not None and step in (0, 1, 4):
            monitor.run(step)
        model.train()
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 3 == 0:  # in evaluation, FSDP leaves the root's weights gathered
            with torch.no_grad():
                losses.append(model.eval()(input_ids=batch, labels=batch).loss.item())
    as_found = is_as_found(model)
    weights = {name: value.to_local() for name, value in model.state_dict().items()}
    return (losses, weights, torch.get_rng_state()), monitor, as_found


@pytest.mark.parametrize("precision", [pytest.param(None, marks=pytest.mark.slow), torch.bfloat16])
def test_training_is_bit_identical(
    precision: torch.dtype | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {} if precision is None else {"mp_policy": MixedPrecisionPolicy(param_dtype=precision)}

    def work(_rank: int) -> Any:
        with sharing(False), caplog.at_level(logging.INFO):
            without, _, _ = train(False, **options)
            trained, monitor, as_found = train(True, **options)
        assert monitor is not None
        scalars = monitor.scalars
        reported = "MixedPrecisionPolicy trains in torch.bfloat16" in caplog.text
        values = [scalars["depass/probes/completeness"], scalars["depass/probes/failed"]]
        return same(without, trained), as_found, reported, monitor.history["probes"].as_json(), values

    first, second = on_processes(tmp_path, 2, work)
    assert first[:3] == [True, True, precision is not None]
    assert second == first
    assert first[4][0] < 1e-5
    assert first[4][1] == 0


def test_a_batch_that_fails_on_one_rank_is_halved_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ProbeRunner._outcomes
    sizes: list[int] = []

    def work(rank: int) -> Any:
        def fails(runner: ProbeRunner, probes: Any, removal: int) -> Any:
            sizes.append(len(probes))
            outcomes = plain(runner, probes, removal)
            if rank == 1 and len(probes) > 1:
                raise torch.OutOfMemoryError("out of memory")
            if rank == 1 and probes[0].prompt == PROMPTS[2][0]:
                raise ValueError("this rank alone")
            return outcomes

        monkeypatch.setattr(ProbeRunner, "_outcomes", fails)
        model = shard(language_model(), "model.layers")
        monitor = ProbeMonitor(model, tokenizer(), list(PROMPTS), faithfulness=0)
        return monitor.run(0).scalars["depass/probes/failed"], sizes, monitor.batch_size

    first, second = on_processes(tmp_path, 2, work)
    assert first == second == [1, [5, 2, 1, 1, 3, 1, 2, 1, 1], 1]


@pytest.mark.slow
def test_the_root_group_may_be_around_the_model(tmp_path: Path) -> None:
    """As where Accelerate shards a model with adapters: the embedding's group is that of the `PeftModel`."""
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(3)
        targets = ["v_proj", "down_proj"]
        return peft.get_peft_model(
            language_model(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        )

    def work(_rank: int) -> Any:
        with sharing(False):
            models = [adapted(), shard(adapted(), "base_model.model.model.layers")]
            monitors = [ProbeMonitor(model, tokenizer(), list(PROMPTS), faithfulness=0) for model in models]
            values = [monitor.run(0).scalars["depass/probes/value"] for monitor in monitors]
        return values, is_as_found(models[1])

    for (whole, sharded), as_found in on_processes(tmp_path, 2, work):
        assert sharded == pytest.approx(whole, abs=1e-6)
        assert as_found


class Sharded(OwnModule):
    def configure_model(self) -> None:
        lm: Any = self.inside.lm
        if not isinstance(lm, FSDPModule):
            shard(lm, "model.layers")


@pytest.mark.slow
def test_lightnings_model_parallel_strategy_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> Any:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("GROUP_RANK", 0)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        trained = []
        for callbacks in ([], [DePassCallback(list(PROMPTS), every_n_steps=2, faithfulness=0)]):
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            options = {"devices": 2, "strategy": strategy, "plugins": [TorchElasticEnvironment()]}
            module = Sharded()
            with sharing(False):
                fit(trainer(tmp_path / str(len(callbacks)), callbacks, **options), module)
            weights = {name: value.to_local() for name, value in module.state_dict().items()}
            trained.append((module.losses, weights))
        history = callbacks[0].history["probes"].as_json()
        return same(*trained), history, is_as_found(module)

    first, second = on_processes(tmp_path, 2, work)
    assert first == second
    assert first[0] is True, first
