"""`compat="paper_code"` at the level of heads, modules, neurons and subspaces, against published values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from depass_lightning import Components, DePass, Heads, Module, Neurons, Token
from tests.engine.test_oracle import MODELS, ORACLE, Reference, assert_all_below, reference
from tests.reference.models import distance

pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"the reference values are not here: no {ORACLE}")

COUNTS = {"llama-gqa": 58, "llama-mha": 79, "qwen2-bias": 58}
SCORES = {"llama-gqa": 140, "llama-mha": 190, "qwen2-bias": 140}
RULES = ("softmax", "relu", "max", "linear", "taylor")


def source_of(ref: Reference, kind: str, layer: int) -> Any:
    """Our source for a published level; its subspaces split what leaves a layer, ours what enters one."""
    if kind == "subspace":
        if layer + 1 == ref.model.config.num_hidden_layers:
            return None  # nothing is carried: the published result is the initial split
        return Components(layer + 1, ref.tensors[f"subspace/layer{layer}/initial"])
    return {
        "attn": Module("attention", layer),
        "mlp": Module("mlp", layer),
        "head": Heads(layer),
        "neuron": Neurons(layer),
    }[kind]


def published(ref: Reference, prefix: str) -> Iterator[tuple[str, Any, str, dict[str, int]]]:
    """Every published tensor of these levels: its name, our source, its rule and its target."""
    for name in ref.tensors:
        kind, *rest = name.removeprefix(prefix).split("/")
        if not name.startswith(prefix) or kind not in ("attn", "mlp", "head", "neuron", "subspace"):
            continue
        layer, rule, *target = rest
        source = source_of(ref, kind, int(layer.removeprefix("layer")))
        if rule in RULES and source is not None:
            yield name, source, rule, ref.targets[int(target[0][-1])] if target else {}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.covering(1)
def test_states_are_those_of_the_published_code(name: str) -> None:
    ref = reference(name)
    depass: Any = DePass(ref.model)
    errors = {}
    for tensor, source, rule, _ in published(ref, ""):
        states = (
            depass.decompose(input_ids=ref.input_ids[None], source=source, rule=rule, compat="paper_code")[0]
        ).states
        errors[tensor] = distance(ref.normed(states), ref.tensors[tensor])
    assert_all_below(errors, 1e-4, count=COUNTS[name])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.covering(1)
def test_scores_are_those_of_the_published_code(name: str) -> None:
    ref = reference(name)
    depass: Any = DePass(ref.model)
    errors = {}
    for tensor, source, rule, target in published(ref, "scores/"):
        found = depass.attribute(
            input_ids=ref.input_ids[None],
            target=Token(target["token_id"], position=target["position"]),
            source=cut(source, target["position"] + 1),
            rule=rule,
            compat="paper_code",
        )[0]
        errors[tensor] = distance(found.scores, ref.tensors[tensor])
    assert_all_below(errors, 1e-4, count=SCORES[name])


def cut(source: Any, positions: int) -> Any:
    """Given components reach as far as the target does."""
    if not isinstance(source, Components):
        return source
    assert isinstance(source.tensor, Tensor)
    return Components(source.layer, source.tensor[:, :positions])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.covering(1)
def test_neurons_with_the_exact_base_are_those_of_the_published_code(name: str) -> None:
    """The published rules from our base: `scores/neuron_exact`."""
    ref = reference(name)
    depass: Any = DePass(ref.model)
    layers = ref.model.config.num_hidden_layers
    errors = {}
    for tensor, expected in ref.tensors.items():
        if not tensor.startswith("scores/neuron_exact/"):
            continue
        layer, rule, target = tensor.removeprefix("scores/neuron_exact/").split("/")
        index, aim = int(layer.removeprefix("layer")), ref.targets[int(target[-1])]
        if index + 1 == layers:
            continue
        initial = depass.decompose(
            input_ids=ref.input_ids[None, : aim["position"] + 1],
            source=Neurons(index),
            bias="drop",
            to_layer=index + 1,
        )[0].states
        found = depass.attribute(
            input_ids=ref.input_ids[None],
            target=Token(aim["token_id"], position=aim["position"]),
            source=Components(index + 1, initial),
            rule=rule,
            compat="paper_code",
        )[0]
        errors[tensor] = distance(found.scores, expected)
    assert_all_below(errors, 1e-4, count=10 * (layers - 1))
