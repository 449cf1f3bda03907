"""The rules half, shap and dual and attention's control path, against the real model's derivatives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from depass_lightning import Contrast, DePass, DePassError, Heads, Module, Neurons, Token, Tokens
from depass_lightning.engine import score_path
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.rule_files import rule_content
from tests.engine.test_untouched import must_stay_untouched
from tests.reference.models import build, distance, padded, prompt

pytestmark = pytest.mark.covering

NAMES = ("llama", "llama-biases", "mistral-window", "qwen2-window", "qwen3", "qwen3-biases")
LENGTHS = (9, 6)
TARGETS = ((5, 7, -1), (4, None, -2))
# How much of a derivative passes each map's output: by the rule, and where control is all that is left open.
HALF = {"gate_proj": 0.5, "up_proj": 0.5}
SHAP = HALF | {"q_proj": 0.5, "k_proj": 0.5}
SCORE_WEIGHT = 0.3
DUAL = {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.5, "gate_proj": 0.5, "up_proj": 0.5}
TAYLOR = {"up_proj": 0.0}


class Frozen(TorchFunctionMode):
    """Lets the real model run with its norms' scales and activations' slopes held fixed."""

    def __init__(self, *, probabilities: bool) -> None:
        super().__init__()
        self.probabilities = probabilities

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.silu:
            return args[0] * (function(args[0]) / args[0]).detach()
        result = function(*args, **kwargs)
        held = function is torch.rsqrt or (self.probabilities and function is torch.nn.functional.softmax)
        return result.detach() if held else result


def mean_derivative(scores: Tensor, nodes: int = 40) -> Tensor:
    """The softmax's mean Jacobian `[..., key, key]` on the line from zero scores, of all scores at once."""
    places, weights = (torch.from_numpy(own) / 2 for own in np.polynomial.legendre.leggauss(nodes))
    hidden = scores < -1e30
    total = torch.zeros(())
    for place, weight in zip(places + 0.5, weights, strict=True):
        shares = (place * scores).masked_fill(hidden, -torch.inf).softmax(-1)
        total = total + weight * (torch.diag_embed(shares) - shares[..., None] * shares[..., None, :])
    return total


class Shapley(Frozen):
    """Attention's output with the derivative of the shap rule: what mixes values changes by the scores' mean
    derivative, and values are mixed partly by the probabilities and partly evenly."""

    def __init__(self, weights: Iterable[float] = itertools.repeat(SCORE_WEIGHT)) -> None:
        super().__init__(probabilities=False)
        self.weights, self.weight = iter(weights), 0.0  # of each block, which takes one softmax
        self.mixture: Tensor | None = None  # with its derivative
        self.even: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.softmax:
            scores, held, self.weight = args[0], args[0].detach(), next(self.weights)
            probabilities = super().__torch_function__(function, types, args, kwargs).detach()
            change = (mean_derivative(held) @ (scores - held)[..., None])[..., 0]
            self.mixture = probabilities + change
            self.even = (held > -1e30) / (held > -1e30).sum(-1, keepdim=True)
            return self.mixture
        result = super().__torch_function__(function, types, args, kwargs)
        if function in (Tensor.to, torch.nn.functional.dropout) and args[0] is self.mixture:
            return self.mixture
        if function is torch.matmul and args[0] is self.mixture:
            mixture, even, values = args[0], self.even, args[1]
            assert even is not None
            held, weight = mixture.detach(), self.weight
            by_values = ((1 - weight) * held + weight * even) @ (values - values.detach())
            return held @ values.detach() + by_values + weight * (mixture - held) @ values.detach()
        return result


def scaled(weight: float) -> Callable[..., Tensor]:
    """Let this much of a derivative pass."""
    return lambda _module, _inputs, output: weight * output + (1 - weight) * output.detach()


def logits(
    model: Any,
    weights: dict[str, float],
    states: Tensor,
    *,
    probabilities: bool = False,
    mode: Callable[[], Frozen] | None = None,
) -> Tensor:
    """The model's logits from embeddings, of which only the given parts are open to derivatives."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = weights.get(name, weights.get(name.rsplit(".", 1)[-1]))
            if weight is not None:
                stack.callback(module.register_forward_hook(scaled(weight)).remove)
        stack.enter_context(Frozen(probabilities=probabilities) if mode is None else mode())
        return model(inputs_embeds=states, use_cache=False).logits[0]


def value_of(given: Tensor, target: tuple[int, int | None, int]) -> Tensor:
    token, foil, position = target
    at = given[position]
    return at[token] - (0 if foil is None else at[foil])


def reference(
    model: Any, row: Tensor, target: tuple[int, int | None, int], weights: dict[str, float], **options: Any
) -> Tensor:
    """Each token's embedding times its derivative, and last the biases times theirs where there are any."""
    embedded = model.get_input_embeddings()(row)[None].detach().requires_grad_()
    biases = [own for name, own in model.named_parameters() if name.endswith("bias")]
    value = value_of(logits(model, weights, embedded, **options), target)
    states, *others = torch.autograd.grad(value, [embedded, *biases], allow_unused=True)
    scores = (states * embedded).sum(-1)[0]
    if not biases:
        return scores.detach()
    added = sum((own * grad).sum() for own, grad in zip(biases, others, strict=True) if grad is not None)
    return torch.cat([scores, torch.as_tensor(added)[None]]).detach()


REFERENCES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "half": (HALF, {"probabilities": True}),
    "half forward": (HALF, {"probabilities": True}),
    "shap": (SHAP, {"mode": Shapley}),
    "dual": (DUAL, {}),
}


def expected_scores(model: Any, row: Tensor, target: tuple[int, int | None, int], kind: str) -> Tensor:
    if kind in REFERENCES:
        weights, options = REFERENCES[kind]
        return reference(model, row, target, weights, **options)
    free = reference(model, row, target, TAYLOR)
    return free - reference(model, row, target, TAYLOR, probabilities=True)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "half": {"rule": "half", "engine": "adjoint"},
    "half forward": {"rule": "half", "engine": "propagate"},
    "shap": {"rule": "shap", "score_weight": SCORE_WEIGHT},
    "dual": {"rule": "dual"},
    "control": {"rule": "taylor", "attention_path": "control"},
}


CALIBRATED = ((0.9, 0.0), (0.2, 0.7), (0.6, 1.0))  # the gate's weight and the scores', of each block


@pytest.fixture
def rule_file(tmp_path: Path) -> str:
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(rule_content(CALIBRATED, DePass(build("llama")).decoder)))
    return str(path)


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_a_calibrated_rule_has_weights_in_each_block(name: str, rule_file: str) -> None:
    """Heads, neurons and tokens are the real model's derivatives; they are complete up to the quadrature."""
    model: Any = build(name, dtype=torch.float64)
    weights = dict(SHAP)
    for index, (gate, _) in enumerate(CALIBRATED):
        weights |= {
            f"model.layers.{index}.mlp.gate_proj": gate,
            f"model.layers.{index}.mlp.up_proj": 1 - gate,
        }
    row = prompt(8)
    shares = [scores for _, scores in CALIBRATED]
    expected = reference(model, row, TARGETS[0], weights, mode=lambda: Shapley(shares))
    arguments: dict[str, Any] = {"input_ids": row[None], "target": Contrast(5, 7), "rule": rule_file}
    found = DePass(model).attribute(**arguments)[0]
    assert distance(found.scores, expected.float()) < 1e-5
    assert (found.rule, found.metadata["rule_file"]) == ("calibrated", rule_file)
    for source in (Heads(), Module("mlp"), Neurons(1)):
        assert DePass(model).attribute(**arguments, source=source)[0].completeness < 1e-5
    with pytest.raises(DePassError, match="'calibrated' only goes back"):
        DePass(model).attribute(**arguments, engine="propagate")
    with pytest.raises(DePassError, match="published code has no rule 'calibrated'"):
        DePass(model).attribute(**arguments, compat="paper_code")


def test_a_calibrated_rule_without_scores_goes_forward(tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    model = build("llama-biases", dtype=torch.float64)
    path.write_text(json.dumps(rule_content([(gate, 0.0) for gate, _ in CALIBRATED], DePass(model).decoder)))
    arguments: dict[str, Any] = {"input_ids": prompt(8)[None], "target": Contrast(5, 7), "rule": str(path)}
    back, forward = (
        DePass(model).attribute(**arguments, engine=engine)[0] for engine in ("adjoint", "propagate")
    )
    assert distance(forward.scores, back.scores) < 1e-6
    assert forward.completeness < 1e-5
    state = DePass(model).decompose(input_ids=prompt(8)[None], rule=str(path))[0]
    assert state.states.shape[1] == 8
    half = build("llama-biases", dtype=torch.bfloat16)
    for engine in ("adjoint", "propagate"):
        found = DePass(half).attribute(**arguments, engine=engine)[0]
        assert found.names[-1] == "rounding"
        assert found.completeness < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no rule file .*rule\.json; `experiment=calibrate` writes one"),
        ("{", r"rule file .*rule\.json cannot be read"),
        ("[1]", r"rule\.json is no rule file"),
        ({"kind": "other"}, r'its "kind" is not'),
        ({"blocks": []}, r'needs a "family" and a list of "blocks"'),
        ({"blocks": [{"gate": 0.5}]}, r'"scores" of block 0 is None; it must be from 0 to 1'),
        ({"blocks": [{"gate": 1.5, "scores": 0}]}, r'"gate" of block 0 is 1\.5'),
        (
            {"blocks": [{"gate": 0.5, "scores": 0}]},
            r"type 'llama' with 1 blocks; this one is of type 'llama'",
        ),
        ({"family": "gpt2"}, r"fitted to a model of type 'gpt2' with 3 blocks"),
    ],
)
def test_a_wrong_rule_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    depass, path = DePass(build("llama")), tmp_path / "rule.json"
    if content is not None:
        whole = rule_content(CALIBRATED, depass.decoder)
        path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(DePassError, match=message):
        depass.attribute(input_ids=prompt(6)[None], target=4, rule=str(path))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_token_scores_are_the_real_models_derivatives(name: str, kind: str, side: str) -> None:
    model = build(name, dtype=torch.float64)
    rows = [prompt(length, seed=length) for length in LENGTHS]
    ids, mask = padded(rows, side)
    targets = [Contrast(5, 7), Token(4, position=-2)]
    found = DePass(model).attribute(input_ids=ids, attention_mask=mask, target=targets, **ARGUMENTS[kind])
    for own, row, target in zip(found, rows, TARGETS, strict=True):
        expected = expected_scores(model, row, target, kind)
        assert expected.abs().max() > 1e-2
        assert distance(own.scores, expected.float()) < 1e-5


# Torch compiles its forward-mode formulas by what it deprecates itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["half", "shap", "dual"])
def test_scores_are_the_forward_derivative_too(kind: str) -> None:
    """`torch.func.jvp` along each token's embedding."""
    weights, options = REFERENCES[kind]
    model = build("qwen3", dtype=torch.float64)
    row = prompt(6)
    embedded = model.get_input_embeddings()(row)[None].detach()
    expected = []
    for position in range(len(row)):
        tangent = torch.zeros_like(embedded)
        tangent[0, position] = embedded[0, position]
        change = torch.func.jvp(
            lambda states: logits(model, weights, states, **options), (embedded,), (tangent,)
        )[1]
        expected.append(value_of(change, TARGETS[0]))
    found = DePass(model).attribute(input_ids=row[None], target=Contrast(5, 7), **ARGUMENTS[kind])[0]
    assert distance(found.scores, torch.stack(expected).float()) < 1e-5


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_heads_and_neurons_are_the_real_models_derivatives(kind: str) -> None:
    model: Any = build("llama", dtype=torch.float64)
    row, layer = prompt(7), 1
    block = model.model.layers[layer]
    embedded = model.get_input_embeddings()(row)[None].detach()

    def derivatives(weights: dict[str, float], **options: Any) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        with ExitStack() as stack:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                hook = module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
                stack.callback(hook.remove)
            value = value_of(logits(model, weights, embedded, **options), TARGETS[0])
        heads, neurons = (
            own * grad for own, grad in zip(kept, torch.autograd.grad(value, kept), strict=True)
        )
        return heads[0].unflatten(1, (6, -1)).sum((0, 2)).detach(), neurons[0].sum(0).detach()

    if kind in REFERENCES:
        weights, options = REFERENCES[kind]
        expected = derivatives(weights, **options)
    else:
        open_, held = derivatives(TAYLOR), derivatives(TAYLOR, probabilities=True)
        expected = (open_[0] - held[0], open_[1] - held[1])
    sources = [Heads(layer), Neurons(layer), Module("attention", layer)]
    found = DePass(model).attribute_sources(
        None, Contrast(5, 7), sources, input_ids=row[None], **ARGUMENTS[kind]
    )[0]
    assert distance(found[0].scores[1:], expected[0].float()) < 1e-5
    assert distance(found[1].scores[1:], expected[1].float()) < 1e-5
    assert found[2].scores[1] == pytest.approx(float(expected[0].sum()), rel=1e-5)


class HeldLayerNorm(torch.nn.LayerNorm):
    """A LayerNorm whose derivative is that of its scale held fixed."""

    def forward(self, input: Tensor) -> Tensor:
        scale = (input.var(-1, correction=0, keepdim=True) + self.eps).rsqrt().detach()
        return (input - input.mean(-1, keepdim=True)) * scale * self.weight + self.bias


def test_a_layernorm_on_queries_is_held_fixed_and_its_bias_counted() -> None:
    model: Any = build("qwen3-biases", dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for block in model.model.layers:
        norm = HeldLayerNorm(10, dtype=torch.float64)
        torch.nn.init.uniform_(norm.weight, 0.6, 1.4, generator=generator)
        torch.nn.init.normal_(norm.bias, 0.0, 0.4, generator=generator)
        block.self_attn.q_norm = norm
    row = prompt(8)
    found = DePass(model).attribute(
        input_ids=row[None], target=Contrast(5, 7), rule="taylor", attention_path="control"
    )[0]
    assert distance(found.scores, expected_scores(model, row, TARGETS[0], "control").float()) < 1e-5


def test_content_and_control_are_told_apart() -> None:
    """The content path is the default and complete; the control path is not, as `completeness` reports."""
    depass = DePass(build("qwen2"))
    arguments: dict[str, Any] = {"input_ids": prompt(9)[None], "target": 5, "rule": "taylor"}
    paths: list[dict[str, Any]] = [{}, {"attention_path": "content"}, {"attention_path": "control"}]
    plain, content, control = (depass.attribute(**arguments, **more)[0] for more in paths)
    assert torch.equal(plain.scores, content.scores)
    assert content.completeness < 1e-5
    assert content.attention_path == "content"
    assert control.attention_path == "control"
    assert control.completeness > 1e-2
    assert control.value == content.value
    # After the last attention no path leads through a query or a key.
    last = depass.attribute(**arguments, source=Neurons(-1), attention_path="control")[0]
    assert float(last.scores.abs().max()) == 0


def test_dual_is_complete_without_attention_alone() -> None:
    """Its two paths through a neuron sum to the neuron; those through attention do not sum to attention."""
    model: Any = build("llama-biases", dtype=torch.float64)
    depass = DePass(model)
    arguments: dict[str, Any] = {"input_ids": prompt(9)[None], "target": 5, "rule": "dual"}
    assert depass.attribute(**arguments, source=Tokens(0))[0].completeness > 1e-2
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    assert depass.attribute(**arguments, source=Tokens(0))[0].completeness < 1e-5


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-biases"])
@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_untouched(name: str, surroundings: Any) -> None:
    model = build(name, attention="sdpa", attention_dropout=0.5)
    depass = DePass(model)
    quiet = depass.attribute(input_ids=prompt(7)[None], target=5, rule="taylor", attention_path="control")[0]
    model.train()
    with surroundings(), must_stay_untouched(model):
        found = [
            depass.attribute(input_ids=prompt(7)[None], target=5, **own)[0] for own in ARGUMENTS.values()
        ]
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(found[-1].scores, quiet.scores)


def test_the_model_is_left_untouched_by_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("qwen3")
    depass = DePass(model)

    def broken(*_arguments: Any, **_keywords: Any) -> None:
        raise RuntimeError("broken")

    with must_stay_untouched(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", broken)
            with pytest.raises(RuntimeError, match="broken"):
                depass.attribute(input_ids=prompt(7)[None], target=5, rule="dual")
        assert depass.attribute(input_ids=prompt(7)[None], target=5, rule="taylor")[0].completeness < 1e-5


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_blocks_that_are_run_again_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depass = DePass(build("qwen2"))
    arguments: dict[str, Any] = {"input_ids": prompt(9)[None], "target": 5, **ARGUMENTS[kind]}
    kept = depass.attribute(**arguments)[0]
    original = Budget.default
    monkeypatch.setattr(Budget, "default", lambda *given: replace(original(*given), recording=0))
    again = depass.attribute(**arguments)[0]
    torch.testing.assert_close(again.scores, kept.scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "dual", "engine": "propagate"}, r"rule='dual' only goes back from a target"),
        ({"rule": "dual", "compat": "paper_code"}, r"rule='dual' only goes back from a target"),
        ({"rule": "shap", "engine": "propagate"}, r"rule='shap' only goes back from a target"),
        ({"rule": "shap", "compat": "paper_code"}, r"published code has no rule 'shap'"),
        ({"rule": "half", "compat": "paper_code"}, r"published code has no rule 'half'"),
        ({"rule": "half", "attention_path": "control"}, r"attention_path='control' needs rule='taylor'"),
        ({"rule": "shap", "score_weight": 1.1}, r"score_weight is 1.1; it must be from 0"),
        ({"rule": "shap", "score_weight": "all"}, r"score_weight is 'all', a str"),
        ({"rule": "softmax", "attention_path": "control"}, r"attention_path='control' needs rule='taylor'"),
        ({"rule": "dual", "attention_path": "control"}, r"attention_path='control' needs rule='taylor'"),
        (
            {"rule": "taylor", "attention_path": "control", "engine": "propagate"},
            r"engine='auto' or 'adjoint'",
        ),
        (
            {"rule": "taylor", "attention_path": "query"},
            r"attention_path='query' is unknown; choose 'content' or 'control'",
        ),
    ],
)
def test_what_does_not_go_together_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DePassError, match=message):
        DePass(build("llama")).attribute(input_ids=prompt(6)[None], target=4, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_shap_is_complete(name: str) -> None:
    """In float64 up to the quadrature, which is exact to 1e-9 for scores of this size, for any weight."""
    depass, ids = DePass(build(name, dtype=torch.float64)), prompt(9)[None]
    for weight in (0.0, 0.5, 1.0):
        found = depass.attribute(input_ids=ids, target=Contrast(5, 7), rule="shap", score_weight=weight)[0]
        assert found.completeness < 1e-6
        assert found.metadata["score_weight"] == weight
        if weight == 0:
            half = depass.attribute(input_ids=ids, target=Contrast(5, 7), rule="half")[0]
            assert torch.equal(found.scores, half.scores)


def test_completeness_reports_a_coarse_quadrature(monkeypatch: pytest.MonkeyPatch) -> None:
    depass, ids = DePass(build("llama-biases", dtype=torch.float64)), prompt(9)[None]
    arguments: dict[str, Any] = {"input_ids": ids, "target": Contrast(5, 7), "rule": "shap"}
    fine = depass.attribute(**arguments)[0].completeness
    monkeypatch.setattr(score_path, "NODES", 2)
    assert depass.attribute(**arguments)[0].completeness > max(1e-4, 100 * fine)


@pytest.mark.parametrize("sink", [0, 1])
def test_the_mean_derivative_times_scores_is_what_they_add_to_even_attention(sink: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 5 + sink, generator=generator, dtype=torch.float64) * 3
    seen = torch.ones(5, 5 + sink, dtype=torch.bool).tril() | (torch.arange(5 + sink) == 5)
    scores = scores.masked_fill(~seen, torch.finfo(torch.float64).min).requires_grad_()
    values = torch.randn(2, 3, 5, 5 + sink, generator=generator, dtype=torch.float64)
    path = score_path.ScorePath(torch.nn.Linear(1, 1), heads=3)
    with path:
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
    assert torch.equal(probabilities, scores.softmax(-1))
    (gradient,) = torch.autograd.grad((probabilities * values).sum(), scores)
    even = seen / seen.sum(-1, keepdim=True)
    expected = ((probabilities - even) * values).sum().item()
    assert (gradient * scores).sum().item() == pytest.approx(expected, rel=1e-6)
    assert path.uniform is not None
    torch.testing.assert_close(path.uniform, even[:, :5].double().expand(2, 3, 5, 5))


def test_shap_refuses_attention_whose_softmax_it_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    depass = DePass(build("llama"))
    depass.decoder.recomputes = False
    monkeypatch.setattr(score_path, "SOFTMAX", ())
    with pytest.raises(DePassError, match="LlamaAttention of block 2 does not take one softmax"):
        depass.attribute(input_ids=prompt(6)[None], target=4, rule="shap")


def test_states_cannot_be_had_of_dual() -> None:
    with pytest.raises(DePassError, match=r"rule='taylor' or 'half' to propagate"):
        DePass(build("llama")).decompose(input_ids=prompt(6)[None], rule="dual")
