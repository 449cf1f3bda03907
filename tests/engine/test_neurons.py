"""Neurons: shortcuts near the target, rows in a file, a layer at a time, and the approximated bulk."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import Attribution, Contrast, DePass, DePassError, Direction, Neurons, ProbeLogit, Token
from depass_lightning.engine import memory
from depass_lightning.engine.component_groups import NeuronGroup, NeuronGroupAfterAttention
from depass_lightning.engine.memory import Budget, Storage
from depass_lightning.engine.mixture import DenseMixture
from depass_lightning.engine.variants import top_neurons
from depass_lightning.errors import DePassWarning
from tests.reference import twin
from tests.reference.models import build, distance, padded, prompt

pytestmark = pytest.mark.covering

LAYERS = 4
RULES: tuple[twin.Rule, ...] = ("softmax", "max", "relu", "linear", "taylor")
COMPETING = RULES[:-1]
NAMES = ("llama", "llama-biases", "qwen2-window", "qwen3-biases")


@functools.cache
def model(name: str) -> Any:
    return build(name, dtype=torch.float64, num_hidden_layers=LAYERS)


@functools.cache
def trace(name: str) -> twin.Trace:
    return twin.record(model(name), prompt(8))


def naive(name: str, layer: int, rule: twin.Rule, indices: Sequence[int] | None = None) -> dict[int, Tensor]:
    """Every component's states `[m, n, d]` at each layer: the rest, the neurons, the bias; all dense."""
    own = trace(name)
    at = own.layers[layer]
    mlp = at.block.mlp
    neurons = mlp.act_fn(at.gate) * at.up
    chosen = range(neurons.shape[1]) if indices is None else indices
    written = [neurons[:, i, None] * mlp.down_proj.weight[:, i] for i in chosen]
    bias = len(written) + 1 if twin.has_bias(own.model) else None
    components = [at.leaving - torch.stack(written).sum(0), *written]
    components += [torch.zeros_like(at.leaving)] * (bias is not None)
    options = twin.Options(layer=layer, rule=rule, exclude_first=False)
    states = {layer + 1: torch.stack(components)}
    for index in range(layer + 1, LAYERS):
        block = own.layers[index]
        components = [c + twin.attention_part(block, c, m == bias) for m, c in enumerate(components)]
        norm = block.block.post_attention_layernorm
        normed = [twin.frozen_norm(norm, block.middle, c) for c in components]
        parts = twin.mlp_parts(block, normed, bias, options)
        components = [c + part for c, part in zip(components, parts, strict=True)]
        states[index + 1] = torch.stack(components)
    return states


def explained(name: str, source: Neurons, rule: twin.Rule = "softmax", target: Any = None) -> Attribution:
    depass: Any = DePass(model(name))
    return depass.attribute(
        input_ids=prompt(8)[None],
        target=target or Contrast(5, 7, position=6),
        source=source,
        rule=rule,
        engine="propagate",
    )[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_dense_twins(name: str, layer: int, rule: twin.Rule) -> None:
    found = explained(name, Neurons(layer), rule)
    expected = twin.scores(trace(name), naive(name, layer, rule)[LAYERS], 6, 5, 7)
    assert found.completeness < 1e-5
    assert distance(found.scores, expected) < 1e-5


@pytest.mark.parametrize("rule", COMPETING)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_targets_at_inner_layers_are_the_dense_twins(layer: int, rule: twin.Rule) -> None:
    vector = torch.randn(36, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = SimpleNamespace(coef_=vector[None].numpy(), intercept_=torch.zeros(1).numpy())
    for source in (Neurons(0), Neurons(layer - 1, [7, 3, 40])):
        begin = 0 if source.layer is None else source.layer
        states = naive("llama-biases", begin, rule, source.indices)[layer]
        expected = states[:, 5] @ vector
        for target in (Direction(vector, layer, 5), ProbeLogit(probe, layer, 5)):
            found = explained("llama-biases", source, rule, target)
            assert found.completeness < 1e-5
            assert distance(found.scores, expected) < 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_prompts_own_scores(side: str, layer: int) -> None:
    depass: Any = DePass(model("llama-biases"))
    prompts = [prompt(9), prompt(5, seed=1), prompt(7, seed=2)]
    targets = [Token(4), Contrast(5, 7), Token(9, position=-2)]
    ids, mask = padded(prompts, side)
    for source in (Neurons(layer), Neurons(layer, [1, 43]), Neurons(layer, top=6)):
        together = depass.attribute(input_ids=ids, attention_mask=mask, target=targets, source=source)
        for row, target, found in zip(prompts, targets, together, strict=True):
            (alone,) = depass.attribute(input_ids=row[None], target=target, source=source)
            assert found.completeness < 1e-5
            assert distance(found.scores, alone.scores) < 1e-6


@pytest.mark.parametrize("top", [None, 5])
def test_all_layers_are_each_layer_by_itself(top: int | None) -> None:
    found = explained("llama-biases", Neurons(top=top))
    members = len(found.scores) // LAYERS
    alone = [explained("llama-biases", Neurons(layer, top=top)) for layer in range(LAYERS)]
    for layer, own in enumerate(alone):
        assert torch.equal(found.scores[layer * members : (layer + 1) * members], own.scores)
    if top is not None:
        told = [own.metadata["approximation"] for own in alone if "approximation" in own.metadata]
        assert len(told) == LAYERS - 2
        assert found.metadata["approximation"] == {
            "top": 10,
            "relative_change": max(each["relative_change"] for each in told),
            "spearman": min(each["spearman"] for each in told),
        }


def test_several_targets_at_once_are_each_by_itself() -> None:
    depass: Any = DePass(model("llama-biases"))
    targets = [Token(4, position=3), Token(6, position=7), Contrast(5, 7, position=6)]
    for source in (Neurons(), Neurons(0, top=4)):
        together = depass.attribute(input_ids=prompt(8)[None], target=[targets], source=source)[0]
        for target, found in zip(targets, together, strict=True):
            alone = explained("llama-biases", source, target=target)
            assert distance(found.scores, alone.scores) < 1e-6
            told, once = (own.metadata.get("approximation", {}) for own in (found, alone))
            assert told == pytest.approx(once)


# A shortcut that is wrong must show.


def test_a_broken_read_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position too early."""
    right = NeuronGroup.read
    monkeypatch.setattr(NeuronGroup, "read", lambda self, at, direction: right(self, at - 1, direction))
    expected = twin.scores(trace("llama"), naive("llama", 3, "softmax")[LAYERS], 6, 5, 7)
    with pytest.warns(DePassWarning):
        assert distance(explained("llama", Neurons(-1)).scores, expected) > 0.1


def test_a_broken_mixing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in the wrong order keep all shapes."""
    right = NeuronGroupAfterAttention.states

    def swapped(self: NeuronGroupAfterAttention, components: slice, positions: Tensor) -> Tensor:
        attention = replace(self.attention, mixture=DenseMixture(self.attention.mixture.whole().flip(1)))
        return right(replace(self, attention=attention), components, positions)

    monkeypatch.setattr(NeuronGroupAfterAttention, "states", swapped)
    expected = twin.scores(trace("llama"), naive("llama", 2, "softmax")[LAYERS], 6, 5, 7)
    with pytest.warns(DePassWarning):
        assert distance(explained("llama", Neurons(-2)).scores, expected) > 0.01


# Memory


@pytest.mark.parametrize("rule", RULES)
def test_rows_in_a_file_are_those_in_memory(rule: twin.Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = explained("llama-biases", Neurons(0), rule)
    made: list[Storage] = []
    in_file = Storage.of.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, *arguments: Any) -> Storage:
        made.append(in_file(cls, *arguments))
        return made[-1]

    monkeypatch.setattr(Storage, "of", classmethod(watched))
    monkeypatch.setattr(memory, "available", lambda: 64)
    found = explained("llama-biases", Neurons(0), rule)
    assert any(storage.file is not None for storage in made)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [0, 2])
def test_little_working_memory_gives_the_same(layer: int, rule: twin.Rule) -> None:
    """2 kB hold neither all components of a position nor the gates of all of them."""
    expected = explained("llama-biases", Neurons(layer), rule)
    small: Any = DePass(model("llama-biases"), memory_budget=2000)
    found = small.attribute(
        input_ids=prompt(8)[None],
        target=Contrast(5, 7, position=6),
        source=Neurons(layer),
        rule=rule,
        engine="propagate",
    )[0]
    assert distance(found.scores, expected.scores) < 1e-6


def test_near_the_target_nothing_of_the_rows_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    right = Storage.of.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, count: int, *arguments: Any) -> Storage:
        rows.append(count)
        return right(cls, count, *arguments)

    monkeypatch.setattr(Storage, "of", classmethod(watched))
    explained("llama", Neurons(-1))
    assert rows == []
    explained("llama", Neurons(-2))
    assert max(rows) == 44 + 1 + 1  # all components at one position, and the zero row
    explained("llama", Neurons(-3))
    assert max(rows) == 7 * (44 + 1) + 1


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(DePassError, match=r"GiB, more than there is .*TMPDIR"):
        Storage.of(2**40, torch.zeros(4), Budget(1, 1, 1, 1))


def test_the_files_pages_are_given_back() -> None:
    storage = Storage.of(1000, torch.zeros(8), Budget(1, 1, 1, 1))
    storage.rows.copy_(torch.arange(8000.0).view(1000, 8))
    storage.release_pages()
    assert torch.equal(storage.rows, torch.arange(8000.0).view(1000, 8))


# The approximation


@pytest.mark.parametrize("top", [22, 44, 1000])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_all_neurons_carried_exactly_are_the_exact_scores(name: str, layer: int, top: int) -> None:
    found, exact = explained(name, Neurons(layer, top=top)), explained(name, Neurons(layer))
    assert found.names == exact.names
    assert found.metadata["approximation"]["top"] == 44
    assert found.completeness < 1e-5
    assert distance(found.scores, exact.scores) < 1e-6


def silenced(name: str, layer: int) -> Any:
    """A model whose MLPs write little in one layer, so that first order is enough for its neurons."""
    quiet = copy.deepcopy(model(name))
    with torch.no_grad():
        quiet.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
    return quiet


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_small_neurons_are_right_to_first_order(name: str, layer: int) -> None:
    """With components 1000 times smaller the error is of second order: 1e-3 of the scores, not 1."""
    depass: Any = DePass(silenced(name, layer))
    arguments: dict[str, Any] = {"input_ids": prompt(8)[None], "target": Contrast(5, 7, position=6)}
    (exact,) = depass.attribute(**arguments, source=Neurons(layer))
    (found,) = depass.attribute(**arguments, source=Neurons(layer, top=1))
    neurons = slice(1, 45)
    assert found.completeness < 1e-5
    assert distance(found.scores[neurons], exact.scores[neurons]) < 3e-3


def test_neurons_that_are_zero_take_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some neurons are silent at every position, and others before some position."""
    quiet = silenced("llama", 0)
    up = quiet.model.layers[0].mlp.up_proj

    def silence(_module: Any, _arguments: Any, output: Tensor) -> Tensor:
        output[..., ::3] = 0
        output[:, :4, 1::3] = 0
        return output

    depass: Any = DePass(quiet)
    handle = up.register_forward_hook(silence)
    arguments: dict[str, Any] = {"input_ids": prompt(8)[None], "target": Contrast(5, 7, position=6)}
    (exact,) = depass.attribute(**arguments, source=Neurons(0))
    (found,) = depass.attribute(**arguments, source=Neurons(0, top=1))
    assert torch.equal(exact.scores[1:45:3], torch.zeros(15))
    assert torch.equal(found.scores[1:45:3], torch.zeros(15))
    assert distance(found.scores[1:45], exact.scores[1:45]) < 3e-3
    # Without asking who lives, their number would be wrong, and with it every share.
    monkeypatch.setattr(
        top_neurons, "_reached", lambda _attention, alive, bulk: bulk[:, None].expand_as(alive)
    )
    (wrong,) = depass.attribute(**arguments, source=Neurons(0, top=1))
    assert distance(wrong.scores[1:45], exact.scores[1:45]) > 0.05
    handle.remove()


def test_the_embedded_models_neurons_and_their_error() -> None:
    depass = DePass.from_pretrained("tiny")
    text = "When Mary and John went to the store, John gave a drink to"
    exact = depass.attribute(text, source=Neurons(0))
    errors, told = [], []
    for top in (8, 16, 32):
        found = depass.attribute(text, source=Neurons(0, top=top))
        approximation = found.metadata["approximation"]
        neurons = slice(1, len(found.scores))
        errors.append(distance(found.scores[neurons], exact.scores[neurons]))
        told.append(approximation["relative_change"])
        assert approximation["top"] == 2 * top
        assert found.completeness < 1e-5
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1e-2
    # What is told is the change from K to 2K, not a bound on what 2K still lacks: the order is right.
    assert all(0.1 < error / change < 10 for error, change in zip(errors, told, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "taylor"}, "rule='softmax'"),
        ({"rule": "max"}, "rule='softmax'"),
        ({"compat": "paper_code"}, "no compat"),
        ({"bias": "drop"}, "bias='component'"),
    ],
)
def test_only_the_whole_softmax_is_approximated(options: dict[str, Any], message: str) -> None:
    depass: Any = DePass(model("llama-biases"))
    with pytest.raises(DePassError, match=message):
        depass.attribute(input_ids=prompt(8)[None], source=Neurons(0, top=4), **options)


def test_the_bulk_has_no_states() -> None:
    depass: Any = DePass(model("llama"))
    with pytest.raises(DePassError, match="scores, not states"):
        depass.decompose(input_ids=prompt(8)[None], source=Neurons(0, top=4))
    with pytest.raises(DePassError, match="top is 0"):
        Neurons(0, top=0)
