"""Baselines on spans of tokens against values found in another way, on a tiny random model in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depass_lightning import Contrast, DePass, Spans
from depass_lightning.faithfulness import removal_curves, text_components
from depass_lightning.methods import (
    METHODS,
    AttentionRollout,
    Baseline,
    GradientNorm,
    GradientShap,
    InputGradient,
    IntegratedGradients,
    LastLayerAttention,
    MeanAttention,
    Occlusion,
    Random,
    make_method,
)
from tests.methods.test_methods import FOIL, IDS, TARGET, TOKEN, close, embedded, gradient, scores, value
from tests.reference.models import build, prompt

pytestmark = pytest.mark.filterwarnings("ignore:the model's tokenizer does not know")

# The first position stands alone, spans have the order in which they are given, and the rest comes last.
SPANS = Spans([(4, 6), (1, 3)], "token")
GROUPS = [[0], [4, 5], [1, 2], [3, 6]]
NAMES = [name for name, own in METHODS.items() if issubclass(own, Baseline) and Spans in own.sources]
OPTIONS: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "gradient_shap": {"samples": 2},
    "shapley": {"samples": 1},
    "lime": {"samples": 6},
    "context_cite": {"samples": 6},
    "reagent": {"samples": 2, "steps": 3},
}
TEXTS = [
    "When Mary-Anna and John went out, John didn't give it to",
    "Then Anna met Mary. She gave a drink to",
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A Llama with biases and fewer keys than queries."""
    return build("llama-biases", dtype=torch.float64)


@pytest.fixture(scope="module")
def depass(model: PreTrainedModel) -> DePass:
    return DePass(model)


def by_factors(model: Any, at: float) -> Tensor:
    """The derivative by a factor that a span's embeddings share, where all factors are `at`."""
    factors = torch.full((len(GROUPS),), at, dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([next(g for g, own in enumerate(GROUPS) if n in own) for n in range(len(IDS))])
    found = value(model, embedded(model) * factors[owner][None, :, None])
    return torch.autograd.grad(found.sum(), factors)[0]


def test_gradient_times_input_is_the_derivative_by_the_spans_factor(
    model: PreTrainedModel, depass: DePass
) -> None:
    close(scores(InputGradient(depass, SPANS)), by_factors(model, 1.0))


def test_integrated_gradients_are_the_integral_of_it(model: PreTrainedModel, depass: DePass) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(8)
    points = [(node + 1) / 2 for node in nodes.tolist()]
    both = zip(points, weights.tolist(), strict=True)
    # The factors have gone from zero to `at`: what a span's embeddings add is the derivative by its factor.
    expected = torch.stack([by_factors(model, at) * weight / 2 for at, weight in both]).sum(0)
    close(scores(IntegratedGradients(depass, SPANS, steps=8)), expected)


def test_the_norm_is_of_the_gradient_by_all_embeddings_of_a_span(
    model: PreTrainedModel, depass: DePass
) -> None:
    expected = []
    for group in GROUPS:
        states = embedded(model)
        leaf = states[0, group].flatten().requires_grad_()
        states[0, group] = leaf.view(len(group), -1)
        (found,) = torch.autograd.grad(value(model, states).sum(), leaf)
        expected.append(found.norm())
    close(scores(GradientNorm(depass, SPANS)), torch.stack(expected))
    apart = gradient(model, embedded(model))[0].norm(dim=-1)
    assert expected[1] < 0.99 * apart[GROUPS[1]].sum()


def test_gradient_shap_is_the_sum_over_the_same_draws(depass: DePass) -> None:
    each = scores(GradientShap(depass, samples=4, seed=3))
    close(scores(GradientShap(depass, SPANS, samples=4, seed=3)), [each[own].sum() for own in GROUPS])


def test_attention_is_that_on_all_of_a_span(model: PreTrainedModel, depass: DePass) -> None:
    found = model(IDS[None], output_attentions=True, use_cache=False).attentions
    layers = [own[0].mean(0).detach() for own in found]  # [query, key]
    identity = torch.eye(len(IDS), dtype=torch.float64)
    rolled = torch.linalg.multi_dot([(own + identity) / 2 for own in reversed(layers)])
    for method, each in (
        (MeanAttention, torch.stack(layers).mean(0)),
        (LastLayerAttention, layers[-1]),
        (AttentionRollout, rolled),
    ):
        close(scores(method(depass, SPANS)), [sum(float(each[-1, n]) for n in own) for own in GROUPS])


def test_occlusion_takes_out_a_whole_span(model: PreTrainedModel, depass: DePass) -> None:
    """The last of them with the prompt's last token, so that another token is read."""
    whole = value(model, embedded(model)).detach()
    removed, zeroed = [], []
    for group in GROUPS:
        left = IDS[[n for n in range(len(IDS)) if n not in group]]
        removed.append(whole - value(model, embedded(model, left)).detach())
        states = embedded(model)
        states[0, group] = 0
        zeroed.append(whole - value(model, states).detach())
    for rows in (64, 3):
        close(scores(Occlusion(depass, SPANS, rows=rows)), torch.cat(removed))
        close(scores(Occlusion(depass, SPANS, how="zero", rows=rows)), torch.cat(zeroed))
    each = scores(Occlusion(depass))
    assert all(abs(float(removed[g] - each[GROUPS[g]].sum())) > 1e-3 for g in (1, 2, 3))


def test_a_prompt_that_is_one_span_has_the_whole_value(depass: DePass) -> None:
    (found,) = Occlusion(depass, Spans([(0, 1)], "token")).attribute(input_ids=IDS[None, :1], target=TARGET)
    assert found.scores.tolist() == pytest.approx([found.value])


def test_random_draws_once_a_span(depass: DePass) -> None:
    draws = torch.stack([scores(Random(depass, SPANS, seed=seed)) for seed in range(40)])
    assert draws.shape == (40, 4)
    assert len(draws.unique()) == draws.numel()
    assert draws.min() > 0
    assert draws.max() < 1
    assert torch.all((draws.mean(0) - 0.5).abs() < 0.2)
    assert torch.equal(draws[3], scores(Random(depass, SPANS, seed=3)))


@pytest.mark.parametrize("name", NAMES)
def test_what_of_a_span_stands_behind_the_target_scores_nothing(name: str, depass: DePass) -> None:
    own = prompt(9)[None]
    whole = make_method(name, depass, Spans([(6, 8), (1, 3), (4, 6)], "token"), **OPTIONS.get(name, {}))
    cut = make_method(name, depass, Spans([(1, 3), (4, 5)], "token"), **OPTIONS.get(name, {}))
    (found,) = whole.attribute(input_ids=own, target=Contrast(TOKEN, FOIL, position=4))
    first, *others = scores(cut, own[0, :5]).tolist()
    assert found.scores.tolist() == pytest.approx([first, 0, *others], rel=1e-6)
    assert found.positions == [(0, 1), (6, 8), (1, 3), (4, 6), None]


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.covering(8)
def test_words_and_sentences_are_depass_own(name: str, tiny: DePass) -> None:
    """Their names and places, in a batch of two as alone; a special token stands by itself."""
    for source in (Spans("word"), Spans("sentence"), Spans([(5, 14), (19, 23)])):
        ours = tiny.attribute(TEXTS, source=source, bias="drop")
        method = make_method(name, tiny, source, **OPTIONS.get(name, {}))
        together = method.attribute(TEXTS)
        for text, found, own in zip(TEXTS, together, ours, strict=True):
            kept = [i for i, name in enumerate(own.names) if name not in ("bias", "rounding")]
            assert found.names == [own.names[i] for i in kept]
            assert found.positions == [own.positions[i] for i in kept]
            assert found.names[0] == "<s>"
            assert (found.source, found.layer, found.rule) == ("spans", 0, name)
            alone = method.attribute(text).scores
            assert torch.allclose(found.scores, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_faithfulness_takes_spans_out(tiny: DePass) -> None:
    """A word's tokens together, but never a special token or the rest."""
    words = make_method("occlusion", tiny, Spans("word")).attribute(TEXTS[0], " Mary")
    assert text_components(words) == list(range(1, len(words)))
    found = make_method("occlusion", tiny, Spans([(39, 45), (5, 14)])).attribute(TEXTS[0], " Mary")
    assert found.names == ["<s>", " didn't", " Mary-Anna", "rest"]
    assert text_components(found) == [1, 2]
    (answer,) = found.target_ids
    expected = []
    for gone in ((0, 0), found.positions[1 + int(found.scores[1:3].argmax())]):
        assert gone is not None
        left = found.token_ids[: gone[0]] + found.token_ids[gone[1] :]
        logits = tiny.model(torch.tensor([left])).logits[0, -1].detach()
        expected.append(float(logits.softmax(-1)[answer]))
    (curves,) = removal_curves(tiny.model, [found], [answer], percents=[0, 50])
    assert curves.patch_top == pytest.approx(expected, rel=1e-4)
