"""Every baseline against values found in another way, on tiny random models in float64."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from depass_lightning import Contrast, DePass, Heads, Module, Neurons
from depass_lightning.methods import (
    Activation,
    AttentionRollout,
    AttributionPatching,
    GradientNorm,
    GradientShap,
    InputGradient,
    IntegratedGradients,
    LastLayerAttention,
    MeanAttention,
    Norm,
    Occlusion,
    Random,
)
from tests.reference import zoo
from tests.reference.models import VOCABULARY, build, prompt

TOKEN, FOIL = 7, 11
TARGET = Contrast(TOKEN, FOIL)
IDS = prompt(7)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A Llama with biases and fewer keys than queries."""
    return build("llama-biases", dtype=torch.float64)


@pytest.fixture(scope="module")
def depass(model: PreTrainedModel) -> DePass:
    return DePass(model)


def scores(method: Any, ids: Tensor = IDS, target: Any = TARGET) -> Tensor:
    (found,) = method.attribute(input_ids=ids[None], target=target)
    return found.scores.double()


def close(given: Tensor, expected: Any, error: float = 2e-6) -> None:
    """Attributions keep float32."""
    expected = torch.as_tensor(expected).detach().double()
    assert given.shape == expected.shape
    assert float((given - expected).abs().max()) < error * float(expected.abs().max())


def value(model: Any, embeddings: Tensor) -> Tensor:
    """The difference of logits after each row of embeddings, by the model's own `inputs_embeds`."""
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
    return logits[:, TOKEN] - logits[:, FOIL]


def embedded(model: Any, ids: Tensor = IDS) -> Tensor:
    return model.get_input_embeddings()(ids[None]).detach()


def gradient(model: Any, embeddings: Tensor) -> Tensor:
    leaf = embeddings.clone().requires_grad_()
    return torch.autograd.grad(value(model, leaf).sum(), leaf)[0]


def test_gradients_are_autograds(model: PreTrainedModel, depass: DePass) -> None:
    states = embedded(model)
    found = gradient(model, states)[0]
    close(scores(InputGradient(depass)), (found * states[0]).sum(-1))
    close(scores(GradientNorm(depass)), found.norm(dim=-1))


def test_gradient_times_input_is_a_finite_difference(model: PreTrainedModel, depass: DePass) -> None:
    """Make one token's embedding a little larger and a little smaller."""
    states, step = embedded(model), 1e-5
    expected = []
    for n in range(len(IDS)):
        larger, smaller = states.clone(), states.clone()
        larger[0, n] *= 1 + step
        smaller[0, n] *= 1 - step
        difference = (value(model, larger) - value(model, smaller)).detach()
        expected.append(float(difference) / (2 * step))
    close(scores(InputGradient(depass)), expected)


def test_integrated_gradients_are_the_integral(model: PreTrainedModel, depass: DePass) -> None:
    """Against NumPy's own quadrature, whatever number of points go through the model at once."""
    states, steps = embedded(model), 8
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    mean = torch.zeros_like(states)
    for node, weight in zip(nodes, weights, strict=True):
        mean += gradient(model, states * (node + 1) / 2) * weight / 2
    expected = (mean * states).sum(-1)[0]
    close(scores(IntegratedGradients(depass, steps=steps)), expected)
    close(scores(IntegratedGradients(depass, steps=steps, rows=3)), expected)


def test_integrated_gradients_sum_to_what_the_prompt_adds(model: PreTrainedModel, depass: DePass) -> None:
    """Their own completeness; a norm is steep near zero, so that it takes many steps."""
    states = embedded(model)
    added = float(value(model, states).detach() - value(model, torch.zeros_like(states)).detach())
    errors = [abs(float(scores(IntegratedGradients(depass, steps=n)).sum()) - added) for n in (4, 400)]
    assert errors[1] < 1e-3 * abs(added) < errors[0]


def test_gradient_shap_is_the_expected_gradient(model: PreTrainedModel, depass: DePass) -> None:
    """Against a loop with draws of its own: both come near the expectation; and sums come near the mean
    difference from random prompts."""
    samples, ids = 3000, IDS[:4]
    states = embedded(model, ids)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(VOCABULARY, (samples, len(ids)), generator=generator)
    background = model.get_input_embeddings()(drawn).detach()
    at = torch.rand(samples, 1, 1, dtype=torch.float64, generator=generator)
    way = states - background
    each = (gradient(model, background + at * way) * way).sum(-1)
    found = scores(GradientShap(depass, samples=samples), ids)
    assert torch.all((found - each.mean(0)).abs() < 5 * each.std(0) * (2 / samples) ** 0.5)
    differences = value(model, states).detach() - value(model, background).detach()
    spread = each.sum(1).std() + differences.std()
    assert abs(float(found.sum() - differences.mean())) < 5 * float(spread) * (1 / samples) ** 0.5
    again = scores(GradientShap(depass, samples=8, seed=1), ids)
    assert torch.equal(again, scores(GradientShap(depass, samples=8, seed=1), ids))
    assert not torch.equal(again, scores(GradientShap(depass, samples=8, seed=2), ids))


def test_attention_is_read_by_plain_loops(model: PreTrainedModel, depass: DePass) -> None:
    probabilities = model(IDS[None], output_attentions=True, use_cache=False).attentions
    layers = [own[0].detach() for own in probabilities]  # [head, query, key]
    mean = [0.0] * len(IDS)
    for own in layers:
        for head in own:
            for n in range(len(IDS)):
                mean[n] += float(head[-1, n]) / (len(layers) * len(own))
    close(scores(MeanAttention(depass)), mean)
    close(scores(LastLayerAttention(depass)), [float(layers[-1][:, -1, n].mean()) for n in range(len(IDS))])


def test_the_rollout_multiplies_layer_by_layer(model: PreTrainedModel, depass: DePass) -> None:
    """One entry of the product after another, first layer first."""
    count = len(IDS)
    rolled = [[float(i == j) for j in range(count)] for i in range(count)]
    for given in model(IDS[None], output_attentions=True, use_cache=False).attentions:
        own = given.detach()
        both = [
            [0.5 * float(own[0, :, i, j].mean()) + 0.5 * (i == j) for j in range(count)] for i in range(count)
        ]
        both = [[entry / sum(row) for entry in row] for row in both]
        rolled = [
            [sum(both[i][k] * rolled[k][j] for k in range(count)) for j in range(count)] for i in range(count)
        ]
    close(scores(AttentionRollout(depass)), rolled[-1])


def test_occlusion_takes_out_one_token_after_another(model: PreTrainedModel, depass: DePass) -> None:
    states = embedded(model)
    whole = value(model, states).detach()
    expected = []
    for n in range(len(IDS)):
        left = torch.cat([IDS[:n], IDS[n + 1 :]])
        expected.append(float(whole - value(model, embedded(model, left)).detach()))
    close(scores(Occlusion(depass)), expected)
    close(scores(Occlusion(depass, rows=3)), expected)


def test_occlusion_by_zeros_is_captums_ablation(model: PreTrainedModel, depass: DePass) -> None:
    features = torch.arange(len(IDS))[None, :, None]
    found = FeatureAblation(lambda states: value(model, states).detach()).attribute(
        embedded(model), feature_mask=features
    )
    assert isinstance(found, Tensor)
    close(scores(Occlusion(depass, how="zero")), found[0, :, 0])


def test_the_only_token_has_the_whole_value(depass: DePass) -> None:
    (found,) = Occlusion(depass).attribute(input_ids=IDS[None, :1], target=TARGET)
    assert found.scores.tolist() == pytest.approx([found.value])


def scaled_pass(model: Any, heads: Tensor, neurons: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A Llama written out, with a factor at every head `[layer, head]` and neuron `[layer, neuron]`.

    Returns:
        The difference of logits, each block's heads `[head, position, size]`, and neurons `[position,
        neuron]`.
    """
    state = embedded(model)[0]
    count, inner = len(state), model.model
    cosine, sine = inner.rotary_emb(state[None], torch.arange(count)[None])
    mask = torch.full((count, count), -torch.inf, dtype=state.dtype).triu(1)
    values, activations = [], []
    for layer, block in enumerate(inner.layers):
        attention, mlp = block.self_attn, block.mlp
        size = attention.head_dim
        normed = block.input_layernorm(state)
        q, k, v = (
            getattr(attention, f"{name}_proj")(normed).view(count, -1, size).transpose(0, 1) for name in "qkv"
        )
        q, k = q * cosine[0] + rotate_half(q) * sine[0], k * cosine[0] + rotate_half(k) * sine[0]
        parts = []
        for head in range(len(q)):
            shared = head // (len(q) // len(k))
            pattern = (q[head] @ k[shared].T / size**0.5 + mask).softmax(-1)
            parts.append(pattern @ v[shared])
        values.append(torch.stack(parts))
        scaled = [heads[layer, head] * part for head, part in enumerate(parts)]
        state = state + attention.o_proj(torch.cat(scaled, -1))
        normed = block.post_attention_layernorm(state)
        activations.append(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        state = state + mlp.down_proj(neurons[layer] * activations[-1])
    logits = model.lm_head(inner.norm(state))[-1]
    return logits[TOKEN] - logits[FOIL], values, activations


def test_patching_is_the_derivative_by_each_heads_and_neurons_factor(
    model: PreTrainedModel, depass: DePass
) -> None:
    """The factor's derivative at one is gradient x activation."""
    heads = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    neurons = torch.ones(3, 44, dtype=torch.float64, requires_grad=True)
    found, _, _ = scaled_pass(model, heads, neurons)
    assert float(found.detach()) == pytest.approx(float(value(model, embedded(model)).detach()))
    by_head, by_neuron = torch.autograd.grad(found, [heads, neurons])
    close(scores(AttributionPatching(depass, Heads())), by_head.flatten())
    close(scores(AttributionPatching(depass, Heads(1))), by_head[1])
    close(scores(AttributionPatching(depass, Neurons())), by_neuron.flatten())
    close(scores(AttributionPatching(depass, Neurons(-1, indices=[5, 2]))), by_neuron[-1, [5, 2]])


def test_sizes_are_those_of_what_is_written(model: PreTrainedModel, depass: DePass) -> None:
    ones = torch.ones(3, 44, dtype=torch.float64)
    _, values, activations = scaled_pass(model, ones, ones)
    blocks: Any = model.model.layers
    places: tuple[tuple[Literal["all", "last"], slice], ...] = (
        ("all", slice(None)),
        ("last", slice(-1, None)),
    )
    for at, kept in places:
        heads, norms, sizes = [], [], []
        for block, own, neurons in zip(blocks, values, activations, strict=True):
            size = own.shape[-1]
            for head, each in enumerate(own):
                written = each @ block.self_attn.o_proj.weight[:, head * size : (head + 1) * size].T
                heads.append(float(written.norm(dim=-1)[kept].mean().detach()))
            columns = block.mlp.down_proj.weight.T
            written = neurons[..., None] * columns
            norms += written.norm(dim=-1)[kept].mean(0).tolist()
            sizes += neurons[kept].mean(0).tolist()
        close(scores(Norm(depass, Heads(), positions=at)), heads)
        close(scores(Norm(depass, Neurons(), positions=at)), norms)
        close(scores(Activation(depass, Neurons(), positions=at)), sizes)


OUTPUTS: dict[str, tuple[str, str | None]] = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "falcon-rw": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "deepseek_v2": ("self_attn.o_proj", None),
    "qwen3_moe": ("self_attn.o_proj", None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_patching_is_a_finite_difference_in_every_family(name: str) -> None:
    """Scale a head or a neuron a little up and down, at the input of its output map."""
    model = zoo.build(name, dtype=torch.float64)
    depass = DePass(model)
    by_head = scores(AttributionPatching(depass, Heads())).view(3, -1)
    own, step, count = OUTPUTS[name], 1e-5, by_head.shape[1]
    for path, source, places in (
        (own[0], Heads(), [(0, 1), (2, count - 1)]),
        (own[1], Neurons(), [(1, 3), (2, 40)]),
    ):
        if path is None:
            continue
        found = scores(AttributionPatching(depass, source)).view(3, -1)
        for layer, index in places:
            behind = zoo.blocks_of(model)[layer].get_submodule(path)
            values = []
            for factor in (1 + step, 1 - step):
                handle = behind.register_forward_pre_hook(_scaling(found.shape[1], index, factor))
                values.append(depass.attribute(input_ids=IDS[None], target=TARGET)[0].value)
                handle.remove()
            difference = (values[0] - values[1]) / (2 * step)
            assert found[layer, index] == pytest.approx(difference, abs=1e-5 * float(found.abs().max()))


def _scaling(count: int, index: int, factor: float) -> Callable[..., Any]:
    def scale(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        size = arguments[0].shape[-1] // count
        factors = torch.ones(arguments[0].shape[-1], dtype=arguments[0].dtype)
        factors[index * size : (index + 1) * size] = factor
        return (arguments[0] * factors,)

    return scale


def test_random_scores_depend_on_the_seed_and_the_prompt_alone(depass: DePass) -> None:
    for source in (None, Heads(), Neurons(1)):
        first = scores(Random(depass, source))
        assert torch.equal(first, scores(Random(depass, source)))
        assert not torch.equal(first, scores(Random(depass, source, seed=1)))
        assert not torch.equal(first, scores(Random(depass, source), prompt(7, seed=3)))
        assert len(first.unique()) == len(first)


def test_patching_of_sublayers_is_a_finite_difference() -> None:
    """Make what a sublayer adds a little larger and a little smaller, after the norm that follows it."""
    step = 1e-5
    for name, attention, mlp in (
        ("gemma2", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
        ("opt", "self_attn.out_proj", "fc2"),
    ):
        model = zoo.build(name, dtype=torch.float64)
        depass = DePass(model)
        kinds: tuple[tuple[Literal["attention", "mlp"], str], ...] = (("attention", attention), ("mlp", mlp))
        for kind, path in kinds:
            by_layer = scores(AttributionPatching(depass, Module(kind)))
            assert len(by_layer) == 3
            module = zoo.blocks_of(model)[1].get_submodule(path)
            values = []
            for factor in (1 + step, 1 - step):
                handle = module.register_forward_hook(lambda _m, _a, output, factor=factor: output * factor)
                values.append(depass.attribute(input_ids=IDS[None], target=TARGET)[0].value)
                handle.remove()
            difference = (values[0] - values[1]) / (2 * step)
            assert by_layer[1] == pytest.approx(difference, abs=1e-5 * float(by_layer.abs().max()))
