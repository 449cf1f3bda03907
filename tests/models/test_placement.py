"""Models whose weights are elsewhere until they are needed are explained like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from depass_lightning import Contrast, DePass, DePassError, Heads, Neurons, Tokens
from depass_lightning.engine import record
from depass_lightning.engine.frozen import AttentionCall
from depass_lightning.models import affine
from depass_lightning.models.experts import ExpertsUp
from tests.reference.models import prompt
from tests.reference.zoo import blocks_of, build

pytestmark = pytest.mark.covering

TARGET = Contrast(5, 7)
CPU, META = torch.device("cpu"), torch.device("meta")
WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"source": Tokens()},
    "heads": {"source": Heads()},
    "neurons": {"source": Neurons(1)},
    "taylor": {"rule": "taylor"},
    "control": {"rule": "taylor", "attention_path": "control"},
}


def _spread(model: Any, folder: Path) -> None:
    """The first block in memory, the others on the disk."""
    paths = {module: path for path, module in model.named_modules()}
    blocks = [paths[block] for block in blocks_of(model)]
    others = [
        path
        for path, module in model.named_modules()
        if not any(True for _ in module.children()) and not any(path.startswith(f"{own}.") for own in blocks)
    ]
    places: dict[str, Any] = dict.fromkeys(others, "cpu")
    places |= {path: "disk" if index else "cpu" for index, path in enumerate(blocks)}
    dispatch_model(model, places, main_device=CPU, offload_dir=folder, force_hooks=True)


OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {
    "memory": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "spread": _spread,
}
FAMILIES = ("llama-biases", "gpt2", "gpt_neox", "gemma", "mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3")


def explained(model: Any, way: dict[str, Any]) -> Any:
    return DePass(model).attribute(input_ids=prompt(9)[None], target=TARGET, **way)[0]


@cache
def explained_in_memory(name: str) -> list[Any]:
    model = build(name)
    return [explained(model, way) for way in WAYS.values()]


def hooks(model: nn.Module) -> dict[str, Any]:
    return {path: getattr(module, "_hf_hook", None) for path, module in model.named_modules()}


def on_meta(model: nn.Module) -> set[str]:
    return {path for path, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.filterwarnings("ignore:.*RoPE scaling factor")
@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.covering(6)
def test_offloaded_models_give_the_same_scores(name: str, how: str, tmp_path: Path) -> None:
    model = build(name)
    OFFLOADED[how](model, tmp_path)
    away, attached = on_meta(model), hooks(model)
    ids = prompt(9)[None]
    logits = model(ids).logits
    assert away
    depass = DePass(model)
    for way, expected in zip(WAYS.values(), explained_in_memory(name), strict=True):
        given = depass.attribute(input_ids=ids, target=TARGET, **way)[0]
        assert given.names == expected.names
        assert torch.equal(given.scores, expected.scores)
    assert on_meta(model) == away
    assert all(own is hooks(model)[path] for path, own in attached.items())
    assert torch.equal(model(ids).logits, logits)


def test_one_layer_at_a_time_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build("llama")
    disk_offload(model, str(tmp_path), CPU)
    read, everything, fetched = affine._read, on_meta(model), []

    def watched(module: nn.Module, dtype: torch.dtype) -> affine.AffineMap | None:
        fetched.append(len(everything - on_meta(model)))
        return read(module, dtype)

    monkeypatch.setattr(affine, "_read", watched)
    explained(model, {})
    assert len(fetched) > 7 * 3
    assert set(fetched) == {1}


def test_an_exception_leaves_the_weights_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build("llama")
    disk_offload(model, str(tmp_path), CPU)
    depass, away, ids = DePass(model), on_meta(model), prompt(9)[None]

    def fail(*arguments: Any) -> None:
        raise RuntimeError("the disk is gone, say")

    with monkeypatch.context() as patch:
        patch.setattr(affine, "_read", fail)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            depass.attribute(input_ids=ids, target=TARGET)
    assert on_meta(model) == away
    assert torch.equal(
        depass.attribute(input_ids=ids, target=TARGET)[0].scores, explained(build("llama"), {}).scores
    )


def test_adapters_on_an_offloaded_model(tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        config = LoraConfig(r=4, target_modules=["v_proj", "down_proj"])
        model = get_peft_model(build("llama-biases"), config)
        numbers = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.normal_(0.0, 0.1, generator=numbers)
        models.append(model)
    plain, model = models
    disk_offload(model, str(tmp_path), CPU)
    away = on_meta(model)
    assert torch.equal(explained(model, {}).scores, explained(plain, {}).scores)
    assert on_meta(model) == away


@pytest.mark.parametrize("places", ["auto", "cpu", "disk"])
def test_device_map(places: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    options: dict[str, Any] = {"device_map": places}
    if places == "disk":
        blocks = {f"model.layers.{index}": "disk" for index in range(1, 3)}
        others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        options = {
            "device_map": {"model.layers.0": "cpu"} | blocks | others,
            "offload_folder": tmp_path / "offloaded",
        }
    model = type(build("llama")).from_pretrained(tmp_path, **options)
    assert bool(on_meta(model)) == (places == "disk")
    given, expected = explained(model, {}), explained(build("llama"), {})
    assert torch.allclose(given.scores, expected.scores, atol=1e-6, rtol=1e-5)


def test_the_embedded_model_is_placed_by_a_map() -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    placed, plain = DePass.from_pretrained("tiny", device_map="cpu"), DePass.from_pretrained("tiny")
    assert torch.equal(placed.attribute(text).scores, plain.attribute(text).scores)
    with pytest.raises(DePassError, match="device='cpu' and device_map='auto'"):
        DePass.from_pretrained("tiny", device="cpu", device_map="auto")


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor that is frozen, and the model's own arguments."""
    if isinstance(value, AttentionCall):
        return tensors_of(value.post_norm)
    if isinstance(value, affine.Projection | ExpertsUp):
        read = value.linear(torch.float32)
        return [own for own in (read.weight, read.bias) if own is not None]
    if isinstance(value, Tensor):
        return [value]
    if not is_dataclass(value):
        return []
    return [own for each in fields(value) for own in tensors_of(getattr(value, each.name))]


@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "gpt_oss", "deepseek_v3"])
def test_what_is_frozen_of_a_block_is_brought_to_one_device(name: str) -> None:
    depass, ids = DePass(build(name)), prompt(9)[None]
    recorded = record.record(depass.decoder, ids, torch.tensor([9]), torch.tensor([[8]]))
    block = recorded.block(1)
    count = len(tensors_of(block))
    elsewhere = tensors_of(record.brought(block, META))
    assert len(elsewhere) == count > 10
    assert all(own.is_meta for own in elsewhere)
    here = record.brought(block, CPU)
    assert all(
        one is other
        for one, other in zip(tensors_of(here.attention), tensors_of(block.attention), strict=True)
    )
