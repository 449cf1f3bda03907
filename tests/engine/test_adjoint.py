"""One backward pass for a linear rule, against the forward engine and the real model's derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from depass_lightning import (
    Contrast,
    DePass,
    DePassError,
    Direction,
    Heads,
    Module,
    Neurons,
    ProbeLogit,
    Spans,
    Subspace,
    Token,
    Tokens,
)
from tests.reference.models import ALL, ONE_OF_EACH, build, distance, prompt

pytestmark = pytest.mark.covering

SOURCES: dict[str, Any] = {
    "tokens": Tokens(),
    "tokens in the middle": Tokens(1),
    "spans": Spans([(1, 3), (5, 6)], "token"),
    "heads": Heads(),
    "heads of one layer": Heads(1),
    "attention": Module("attention"),
    "mlp": Module("mlp"),
    "neurons": Neurons(1),
    "some neurons": Neurons(0, [3, 5]),
    "subspace": Subspace(1, torch.randn(3, 36, generator=torch.Generator().manual_seed(0))),
}


def ids() -> tuple[Tensor, Tensor]:
    """Two prompts of 9 and 6 tokens, padded on the left."""
    rows = torch.stack([prompt(9), torch.cat([torch.zeros(3, dtype=torch.long), prompt(6)])])
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    return rows, mask


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", ALL)
def test_both_engines_give_the_same_scores(name: str, source: Any) -> None:
    depass = DePass(build(name, dtype=torch.float64))
    rows, mask = ids()
    arguments: dict[str, Any] = {
        "input_ids": rows,
        "attention_mask": mask,
        "target": [Contrast(5, 7), Token(4, position=-2)],
        "source": source,
        "rule": "taylor",
    }
    forward = depass.attribute(**arguments, engine="propagate")
    backward = depass.attribute(**arguments, engine="adjoint")
    for one, other in zip(forward, backward, strict=True):
        assert one.names == other.names
        assert one.completeness < 1e-5
        assert other.completeness < 1e-5
        assert distance(other.scores, one.scores) < 1e-6


class Frozen(TorchFunctionMode):
    """Lets the real model run with its norms, probabilities and activations' slopes held fixed."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.silu:
            z = args[0]
            return z * (function(z) / z).detach()
        result = function(*args, **kwargs)
        if function in (torch.rsqrt, torch.nn.functional.softmax):
            return result.detach()
        return result


def frozen_logits(model: Any, states: Tensor) -> Tensor:
    """The model's last logits from embeddings, linear in them."""
    handles = [
        block.mlp.up_proj.register_forward_hook(lambda _module, _inputs, output: output.detach())
        for block in model.model.layers
    ]
    try:
        with Frozen():
            return model(inputs_embeds=states, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


# Torch compiles its forward-mode formulas by what it deprecates itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_token_scores_are_the_frozen_models_derivative(name: str) -> None:
    """`torch.func.jvp` of the real model, each token's embedding its own direction."""
    model = build(name, dtype=torch.float64)
    row = prompt(7)
    embedded = model.get_input_embeddings()(row)[None].detach()
    expected = []
    for position in range(len(row)):
        tangent = torch.zeros_like(embedded)
        tangent[0, position] = embedded[0, position]
        change = torch.func.jvp(lambda states: frozen_logits(model, states), (embedded,), (tangent,))[1]
        expected.append(change[5] - change[7])
    reference = torch.stack(expected)
    for engine in ("propagate", "adjoint"):
        found = DePass(model).attribute(
            input_ids=row[None], target=Contrast(5, 7), rule="taylor", engine=engine
        )[0]
        assert distance(found.scores[: len(row)], reference.float()) < 1e-5


def test_several_sources_are_read_from_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import depass_lightning.attribution.scoring as scores

    depass = DePass(build("qwen2"))
    rows, mask = ids()
    sources = [Tokens(), Heads(), Neurons(2)]
    calls = []
    original = scores.backward
    monkeypatch.setattr(scores, "backward", lambda *a, **k: calls.append(1) or original(*a, **k))
    together = depass.attribute_sources(None, 5, sources, input_ids=rows, attention_mask=mask, rule="taylor")
    assert len(calls) == 1
    for index, source in enumerate(sources):
        alone = depass.attribute(input_ids=rows, attention_mask=mask, target=5, source=source, rule="taylor")
        for own, single in zip(together, alone, strict=True):
            torch.testing.assert_close(own[index].scores, single.scores)
            assert own[index].names == single.names


class Probe:
    """What a fitted scikit-learn probe looks like."""

    coef_ = torch.randn(1, 36, generator=torch.Generator().manual_seed(3)).numpy()
    intercept_ = torch.tensor([0.7]).numpy()


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_target_inside_the_model(name: str, rule: Any) -> None:
    model = build(name, dtype=torch.float64)
    depass = DePass(model)
    row = prompt(8)
    vector = torch.randn(36, generator=torch.Generator().manual_seed(1))
    for layer in (1, 2, None):
        found = depass.attribute(
            input_ids=row[None], target=Direction(vector, layer, position=5), source=Tokens(), rule=rule
        )[0]
        states = depass.decompose(input_ids=row[None], source=Tokens(), rule=rule, to_layer=layer)[0].states
        expected = states[:, 5] @ vector.double()
        torch.testing.assert_close(found.scores, expected.float(), rtol=1e-4, atol=1e-5)
        assert found.completeness < 1e-5
        assert found.probability is None
    probe = depass.attribute(input_ids=row[None], target=ProbeLogit(Probe(), 2), rule=rule)[0]
    state = depass.decompose(input_ids=row[None], rule=rule, to_layer=2)[0].states.sum(0)[-1]
    logit = float(state @ torch.as_tensor(Probe.coef_[0]).double()) + 0.7
    assert probe.value == pytest.approx(logit, rel=1e-5)
    if name == "qwen2":
        assert probe.completeness < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "softmax", "engine": "adjoint"}, r"linear in the components: rule='taylor'"),
        ({"engine": "backward"}, r"choose 'auto' or 'propagate' or 'adjoint'"),
        ({"target": Direction(torch.ones(36), 1), "source": Tokens(1)}, r"read it at a later layer"),
        ({"target": Direction(torch.ones(35))}, r"shape is \(35,\), but the model's states have 36"),
        ({"target": Direction(torch.full((36,), torch.nan))}, r"the direction is not finite"),
        ({"target": ProbeLogit(object())}, r"it has no coef_"),
        ({"source": "token"}, r"source 'token' is unknown; did you mean tokens\?"),
        ({"source": Neurons(0, [44])}, r"there is no neuron 44; the MLP has 44, 0 to 43"),
        ({"source": Spans([(2, 3), (2, 4)], "token")}, r"share a token"),
        ({"source": Spans("verse")}, r"choose one of word, sentence"),  # type: ignore[arg-type]
        ({"source": Spans("word")}, r"has no text"),
        ({"source": Heads(7)}, r"Heads: layer 7 is out of range"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    depass: Any = DePass(build("llama"))
    with pytest.raises(DePassError, match=message):
        depass.attribute(input_ids=prompt(6)[None], **({"target": 4} | arguments))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r"list of sources is empty"),
        ("tokens", r"source 't' is unknown; there are tokens"),
        ([Tokens], r"is a ABCMeta"),
    ],
)
def test_bad_sources_are_named(sources: Any, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        DePass(build("llama")).attribute_sources(None, 4, sources, input_ids=prompt(6)[None])
