"""No operation mixes devices: tried on devices that are not there (tests/reference/fake_device.py)."""

from typing import Any

import pytest
import torch

from depass_lightning import DePass, Heads, Module, Neurons, Spans, Tokens
from depass_lightning.engine.memory import Budget, Storage
from depass_lightning.errors import DePassError
from depass_lightning.sources import Source
from tests.reference import zoo
from tests.reference.fake_device import GIB, MixedDevicesError, fake_devices
from tests.reference.models import padded, prompt

pytestmark = pytest.mark.covering


def test_devices_are_told_apart() -> None:
    with fake_devices():
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        linear = torch.nn.Linear(3, 2).to("cuda")
        on_device = [there, there.T[1:], there * 2, there[torch.tensor([0])], there * torch.tensor(2.0)]
        on_device += [here.to(there), there.new_zeros(3), linear.weight, linear(there)]
        assert all(tensor.is_cuda for tensor in on_device)
        assert not any(tensor.is_cuda for tensor in (here, there.cpu()))
        for mixing in (
            lambda: there + here,
            lambda: there @ here.T,
            lambda: torch.cat([there, here]),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: linear(here),
            lambda: there + there.to("cuda:1"),
            lambda: there.numpy(),
        ):
            with pytest.raises(MixedDevicesError):
                mixing()


def scores(depass: DePass, device: str, **options: Any) -> list[torch.Tensor]:
    input_ids, mask = padded([prompt(9), prompt(6, seed=1)], "left")
    return [
        torch.as_tensor(attribution.scores).cpu()
        for attribution in depass.attribute(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), target=7, **options
        )
    ]


def on_device(name: str) -> Any:
    return torch.nn.Module.to(zoo.build(name), "cuda")


QUICK = (
    "llama",
    "gemma2",
    "olmo",
    "phi3",
    "gpt2",
    "bloom",
    "falcon-40b",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
)
SOURCES = (Tokens(), Spans([(0, 2)], unit="token"), Heads(), Neurons(1), Module("mlp"))


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in zoo.ZOO
        if name != "kolibri1"  # on a GPU its router calls a product that no CPU has
    ],
)
@pytest.mark.covering(5)
def test_a_family(name: str) -> None:
    expected = scores(DePass(zoo.build(name)), "cpu")
    with fake_devices():
        depass = DePass(on_device(name))
        assert depass.decoder.device.type == "cuda"
        for one, other in zip(scores(depass, "cuda"), expected, strict=True):
            assert (one - other).abs().max() < 1e-4 * other.abs().max()
        scores(depass, "cuda", rule="half")


@pytest.mark.parametrize("rule", ["softmax", "relu", "linear", "half", "shap", "dual"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.kind)
def test_a_rule_and_a_source(rule: str, source: Source) -> None:
    expected = scores(DePass(zoo.build("llama")), "cpu", rule=rule, source=source)
    with fake_devices():
        depass = DePass(on_device("llama"))
        for one, other in zip(scores(depass, "cuda", rule=rule, source=source), expected, strict=True):
            assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_the_allocators_unused_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a training the allocator keeps the memory: steps keep their size, and the recording its room."""
    cuda = torch.device("cuda", 0)

    def budget(free: int, reserved: int, allocated: int) -> Budget:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated * GIB)
        return Budget.default(cuda)

    assert budget(free=64, reserved=0, allocated=0) == Budget(GIB, 16 * GIB, 16 * GIB, 64 * GIB)
    assert budget(free=0, reserved=78, allocated=14) == Budget(GIB, 16 * GIB, 16 * GIB, 64 * GIB)
    assert budget(free=1, reserved=70, allocated=70).working == GIB, "not by what happens to be free"


def test_other_accelerators_get_larger_steps_than_a_processor() -> None:
    assert Budget.default(torch.device("mps")).working > 4 * Budget.default(torch.device("cpu")).working


def test_more_components_than_an_accelerator_holds_are_refused() -> None:
    with pytest.raises(DePassError, match=r"need 4.0 GiB, more than is free on meta; take fewer neurons"):
        Storage.of(2**20, torch.zeros(1024, device="meta"), Budget(1, 1, 1, 2**32 - 1))
