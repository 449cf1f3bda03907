"""Quantised models are explained as they are, a block at a time; their rounding is a component."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig

from depass_lightning import Contrast, DePass, Heads, Neurons, Tokens
from depass_lightning.models import affine
from tests.reference.models import distance, prompt
from tests.reference.zoo import build

ao: Any = pytest.importorskip("torchao.quantization", reason="run by `make quantized`")

TARGET = Contrast(5, 7)
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 4,
}
KINDS: dict[str, Any] = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),  # pyright: ignore[reportAttributeAccessIssue]
    "float8": ao.Float8WeightOnlyConfig(),
}
WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"source": Tokens()},
    "heads": {"source": Heads()},
    "neurons": {"source": Neurons(1)},
    "taylor": {"rule": "taylor", "engine": "adjoint"},
    "taylor, carried": {"rule": "taylor", "engine": "propagate"},
}


def quantised(kind: Any, name: str = "llama-biases", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose blocks are quantised by hand, so that only its weights show it."""
    model = build(name, dtype=dtype, **SHAPE)
    ao.quantize_(model, kind, filter_fn=lambda own, path: isinstance(own, nn.Linear) and path != "lm_head")
    return model


def dequantised(model: PreTrainedModel, name: str = "llama-biases") -> PreTrainedModel:
    """The same weights in plain tensors."""
    plain = build(name, dtype=model.dtype, **SHAPE)
    for own, other in zip(plain.modules(), model.modules(), strict=True):
        if isinstance(own, nn.Linear) and isinstance(other, nn.Linear) and affine.is_quantised(other):
            own.weight.data = other.weight.dequantize().to(own.weight.dtype)
    return plain


def explained(model: Any, way: dict[str, Any]) -> Any:
    return DePass(model).attribute(input_ids=prompt(9)[None], target=TARGET, **way)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_same_weights_in_plain_tensors(kind: str, way: str) -> None:
    model = quantised(KINDS[kind])
    own, plain = explained(model, WAYS[way]), explained(dequantised(model), WAYS[way])
    groups, expected = own.scores.view(own.groups, -1), plain.scores.view(plain.groups, -1)
    assert own.names[-1].endswith("rounding")
    assert distance(groups[:, :-1], expected) < 2e-5
    assert float(groups[:, -1].abs().max()) < 1e-4 * float(groups.abs().max())
    assert own.completeness < 1e-5
    assert affine.is_quantised(model.model.layers[0].mlp.down_proj)


@pytest.mark.parametrize("kind", [*KINDS, "dynamic"])
def test_sums_stay_exact_in_half_precision(kind: str) -> None:
    model = quantised(
        (KINDS | {"dynamic": ao.Int8DynamicActivationInt8WeightConfig()})[kind], dtype=torch.bfloat16
    )
    for way in WAYS.values():
        own = explained(model, way)
        groups = own.scores.view(own.groups, -1)
        assert own.completeness < 1e-5
        assert 0 < groups[:, -1].abs().max() < 0.2 * groups.abs().max()


def test_rounded_activations_are_a_component_in_full_precision_too() -> None:
    own = explained(quantised(ao.Int8DynamicActivationInt8WeightConfig()), {})
    assert own.completeness < 1e-5
    assert 1e-5 < abs(float(own.scores[-1])) < 0.2 * float(own.scores.abs().max())


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "qwen3"])
def test_other_families(name: str) -> None:
    model = quantised(KINDS["int8"], name)
    own, plain = explained(model, {}), explained(dequantised(model, name), {})
    assert own.names == [*plain.names, "rounding"]
    assert distance(own.scores[:-1], plain.scores) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_asking_a_layer_gives_what_its_weights_say(kind: str) -> None:
    layer = quantised(KINDS[kind]).model.layers[0].mlp.down_proj
    said, asked = affine.linear_of(layer, torch.float32), affine._asked(layer, torch.float32)
    assert distance(asked.weight, said.weight) < 1e-6
    assert said.bias is not None
    assert asked.bias is not None
    assert torch.equal(asked.bias, said.bias)


def test_a_model_that_is_loaded_quantised(tmp_path: Path) -> None:
    build("llama", **SHAPE).save_pretrained(tmp_path)
    config = TorchAoConfig(ao.Int8WeightOnlyConfig())
    model = type(build("llama")).from_pretrained(tmp_path, quantization_config=config)
    own, plain = explained(model, {}), explained(dequantised(model, "llama"), {})
    assert own.names == [*plain.names, "rounding"]
    assert distance(own.scores[:-1], plain.scores) < 2e-5
    assert own.completeness < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_dequantised_a_block_at_a_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(KINDS["int8"])
    depass = DePass(model)
    alive: dict[int, int] = {}
    most = 0
    read = affine._read

    def counted(module: nn.Module, dtype: torch.dtype) -> affine.AffineMap | None:
        nonlocal most
        found = read(module, dtype)
        if found is not None and affine.is_quantised(module):
            alive[id(found.weight)] = found.weight.numel()
            weakref.finalize(found.weight, alive.pop, id(found.weight))
            most = max(most, sum(alive.values()))
        return found

    monkeypatch.setattr(affine, "_read", counted)
    depass.attribute(input_ids=prompt(9)[None], target=TARGET, **WAYS[way])
    sizes = [affine.features(own) for own in model.model.layers[0].modules() if isinstance(own, nn.Linear)]
    block = sum(inputs * outputs for inputs, outputs in sizes)
    # While a block is read, the one before it may still be there; all four never are.
    assert 0 < most <= 2 * block


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_adapters_on_a_quantised_model() -> None:
    model = quantised(KINDS["int8"])
    plain = dequantised(model)
    found = []
    for base in (model, plain):
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["v_proj", "down_proj"]))
        numbers = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.1, generator=numbers)
        found.append(explained(adapted, {}))
    own, expected = found
    assert own.names == [*expected.names, "rounding"]
    assert distance(own.scores[:-1], expected.scores) < 2e-5


class Packed(nn.Module):
    """A layer of some other library: it keeps codes and scales, and exposes only its width."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        self.scales = nn.Buffer(weight.abs().amax(1, keepdim=True) / 7)
        self.codes = nn.Buffer((weight / self.scales).round().to(torch.int8))
        self.bias = layer.bias

    def plain(self) -> Tensor:
        return self.codes * self.scales

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.plain(), self.bias)


def test_layers_of_any_library_are_asked() -> None:
    model, plain = build("llama-biases"), build("llama-biases")
    for own, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            packed = Packed(getattr(own.mlp, name))
            setattr(own.mlp, name, packed)
            getattr(other.mlp, name).weight.data = packed.plain()
    assert DePass(model).decoder.quantised
    assert not DePass(plain).decoder.quantised
    assert not DePass(build("llama", dtype=torch.bfloat16)).decoder.quantised
    for way in WAYS.values():
        own, expected = explained(model, way), explained(plain, way)
        assert distance(own.scores.view(own.groups, -1)[:, :-1].flatten(), expected.scores) < 2e-5
        assert own.completeness < 1e-5
