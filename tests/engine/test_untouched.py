"""The model is left exactly as it was found, whatever happens, and its mode does not change the result."""

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from depass_lightning import Contrast, DePass
from depass_lightning.errors import DePassError
from tests.reference.models import ONE_OF_EACH, build, distance, padded, prompt

pytestmark = pytest.mark.covering

HOOKS = [name for name in vars(torch.nn.Module()) if "hooks" in name]


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model, and about the process, that a caller could find changed."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, kind): list(getattr(module, kind).items())
            for name, module in model.named_modules()
            for kind in HOOKS
            if getattr(module, kind) is not None and hasattr(getattr(module, kind), "items")
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "configuration": model.config.to_dict(),
        "attention": {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "generation": model.generation_config.to_dict() if model.generation_config else None,
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "places": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        "versions": {name: parameter._version for name, parameter in model.named_parameters()},
        "python": random.getstate(),
        "numpy": pickle.dumps(np.random.get_state()),
        "gradients on": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
    }


@contextmanager
def must_stay_untouched(model: PreTrainedModel) -> Iterator[None]:
    before, generator = snapshot(model), torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
    yield
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) or weights[name].isnan().any()
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])


def everything(depass: DePass) -> list[Tensor]:
    """Every kind of call on a padded batch."""
    input_ids, attention_mask = padded([prompt(7), prompt(4)], "left")
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    results: list[Tensor] = []
    for rule in ("softmax", "taylor"):
        results += [one.scores for one in depass.attribute(**batch, target=Contrast(5, 6), rule=rule)]
        results += [one.scores for one in depass.attribute(**batch, target=5, rule=rule, compat="paper_code")]
        results += [one.states for one in depass.decompose(**batch, rule=rule, to_layer=2)]
    return results


def in_the_middle_of_training(model: PreTrainedModel) -> None:
    """Mixed modes, gradients, frozen parameters and hooks of the caller's own, as a training run has them."""
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.model.layers[2].register_forward_hook(_hook_of_the_caller)
    model.model.layers[0].self_attn.register_forward_pre_hook(_hook_of_the_caller)
    model(prompt(6)[None], labels=prompt(6)[None]).loss.backward()


def _hook_of_the_caller(*arguments: Any) -> None:
    return None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_model_in_training(name: str, attention: str) -> None:
    model = build(name, attention=attention)
    in_the_middle_of_training(model)
    with must_stay_untouched(model):
        results = everything(DePass(model))
    assert not any(result.requires_grad for result in results)


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    losses = []
    for interrupted in (False, True):
        model = build("qwen2", attention_dropout=0.2).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(5)
        loss = torch.tensor(0.0)
        for _ in range(3):
            loss = model(prompt(9)[None], labels=prompt(9)[None]).loss
            if interrupted:
                everything(DePass(model))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def _raise(*arguments: Any, **keywords: Any) -> None:
    raise RuntimeError("out of memory, say")


def _mlp_raises(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.model.layers[1].mlp.up_proj, "forward", _raise)


def _head_raises(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.lm_head, "forward", _raise)


def _propagation_raises(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    import depass_lightning.engine.rules as rules

    patch.setattr(rules.SoftmaxRule, "shares", _raise)


@pytest.mark.parametrize("breakage", [_mlp_raises, _head_raises, _propagation_raises])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_exception_in_the_middle(
    name: str, breakage: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, attention="sdpa")
    in_the_middle_of_training(model)
    depass = DePass(model)
    breakage(model, monkeypatch)
    with must_stay_untouched(model), pytest.raises(RuntimeError, match="out of memory, say"):
        depass.attribute(input_ids=prompt(6)[None], target=4)


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_not_a_number_names_the_block_and_leaves_the_model(what: str) -> None:
    model = build("llama", attention="sdpa")
    in_the_middle_of_training(model)
    depass = DePass(model)
    with torch.no_grad():
        if what == "weights":
            model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
        else:
            model.model.layers[1].mlp.down_proj.weight.mul_(3e38)
    with must_stay_untouched(model), pytest.raises(DePassError, match="block 1"):
        depass.attribute(input_ids=prompt(6)[None], target=4)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_surroundings_do_not_change_the_result(name: str, surroundings: str) -> None:
    model = build(name)
    with torch.no_grad():
        expected = everything(DePass(model))
    with SURROUNDINGS[surroundings](), must_stay_untouched(model):
        given = everything(DePass(model))
    for one, two in zip(given, expected, strict=True):
        assert one.dtype == two.dtype
        assert distance(one, two) < 1e-6


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dropout_in_training_mode_does_not_change_the_result(name: str) -> None:
    model = build(name, attention_dropout=0.5)
    expected = everything(DePass(model))
    model.train()
    with must_stay_untouched(model):
        given = everything(DePass(model))
    for one, two in zip(given, expected, strict=True):
        assert torch.equal(one, two)


def test_gradient_checkpointing_does_not_change_the_result() -> None:
    model = build("llama")
    expected = everything(DePass(model))
    # Later releases rename it, and warn.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with must_stay_untouched(model):
        given = everything(DePass(model))
    for one, two in zip(given, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_setting_stays(use_cache: bool) -> None:
    model = build("llama")
    model.config.use_cache = use_cache
    with must_stay_untouched(model):
        everything(DePass(model))
    assert model.config.use_cache is use_cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_stays_and_does_not_change_the_result(attention: str) -> None:
    model = build("mistral-window", attention=attention)
    with must_stay_untouched(model):
        given = everything(DePass(model))
    assert model.config._attn_implementation == attention
    for one, two in zip(given, everything(DePass(build("mistral-window"))), strict=True):
        assert distance(one, two) < 1e-5
