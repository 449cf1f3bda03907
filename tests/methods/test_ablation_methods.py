"""Methods that ablate, against values found in another way, on tiny random models in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from depass_lightning import DePass, DePassError, Spans, tasks
from depass_lightning.methods import (
    ContextCite,
    InformationFlow,
    Lime,
    Occlusion,
    ReAGent,
    Shapley,
    ValueZeroing,
    make_method,
    reagent,
)
from depass_lightning.methods.random_scores import seed_of
from tests.methods.test_methods import FOIL, TARGET, TOKEN, close, embedded, scores, value
from tests.reference import zoo
from tests.reference.models import build, prompt

IDS = prompt(7)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama-biases", dtype=torch.float64)


@pytest.fixture(scope="module")
def depass(model: PreTrainedModel) -> DePass:
    return DePass(model)


def ablated(model: Any, ids: Tensor, kept: list[bool], how: str) -> Tensor:
    """The next token's logits with some tokens removed, or their embeddings zeroed."""
    if how == "zero":
        states = embedded(model, ids)
        states[0, [i for i, keep in enumerate(kept) if not keep]] = 0
    else:
        kept = kept if any(kept) else [False] * (len(kept) - 1) + [True]
        states = embedded(model, ids[torch.tensor(kept)])
    return model(inputs_embeds=states, use_cache=False).logits[0, -1].detach()


def difference(logits: Tensor) -> float:
    return float(logits[TOKEN] - logits[FOIL])


@pytest.mark.parametrize("how", ["remove", "zero"])
def test_shapley_values_are_those_of_all_orders(model: PreTrainedModel, depass: DePass, how: Any) -> None:
    """Every order sums to the same, and many orders come near the mean over all 24."""
    ids = IDS[:4]
    known = {
        kept: difference(ablated(model, ids, list(kept), how))
        for kept in itertools.product([False, True], repeat=4)
    }
    added = torch.zeros(24, 4, dtype=torch.float64)
    for number, order in enumerate(itertools.permutations(range(4))):
        kept = [False] * 4
        for token in order:
            before = known[tuple(kept)]
            kept[token] = True
            added[number, token] = known[tuple(kept)] - before
    whole = known[(True,) * 4] - known[(False,) * 4]
    few = scores(Shapley(depass, samples=1, how=how), ids)
    assert float(few.sum()) == pytest.approx(whole, rel=1e-5)
    assert any(torch.allclose(few, order, rtol=1e-5, atol=1e-6) for order in added)
    samples = 100
    found = scores(Shapley(depass, samples=samples, how=how, rows=3), ids)
    assert torch.all((found - added.mean(0)).abs() < 5 * added.std(0) / math.sqrt(samples) + 1e-6)


def lasso(inputs: Tensor, outputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Coordinate descent on the weighted squares' half mean, plus the L1 penalty; the intercept is free."""
    weights = weights / weights.sum()
    centred = inputs - weights @ inputs
    outputs = outputs - weights @ outputs
    solution = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(200):
        for j in range(len(solution)):
            column = centred[:, j]
            rest = outputs - centred @ solution + column * solution[j]
            pull, size = float(weights @ (column * rest)), float(weights @ column.square())
            solution[j] = math.copysign(max(abs(pull) - alpha, 0), pull) / size if size else 0
    return solution


@pytest.mark.parametrize("how", ["remove", "zero"])
def test_context_cite_is_the_lasso_of_its_draws(model: PreTrainedModel, depass: DePass, how: Any) -> None:
    generator = torch.Generator().manual_seed(seed_of(IDS.tolist(), 3))
    kept = torch.rand(24, len(IDS), generator=generator) < 0.5
    logits = torch.stack([ablated(model, IDS, row.tolist(), how) for row in kept])
    scale = kept.double().std(0, correction=0)
    inputs = (kept.double() - kept.double().mean(0)) / scale
    probabilities = logits.softmax(-1)[:, TOKEN]
    for target, outputs in (
        (TARGET, logits[:, TOKEN] - logits[:, FOIL]),
        (TOKEN, probabilities.log() - (1 - probabilities).log()),
    ):
        expected = lasso(inputs, outputs, torch.ones(24, dtype=torch.float64), 0.05) / scale
        method = ContextCite(depass, samples=24, alpha=0.05, seed=3, how=how, rows=5)
        close(scores(method, target=target), expected, error=2e-3)  # scikit-learn stops at a tolerance
    strict = scores(ContextCite(depass, samples=24, alpha=100.0, seed=3, how=how))
    assert strict.tolist() == [0.0] * len(IDS)


def test_lime_is_the_weighted_lasso_of_its_draws(
    model: PreTrainedModel, depass: DePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt with k of n tokens kept has the cosine sqrt(k / n) to the whole one."""
    asked: list[Tensor] = []
    values = Lime.values

    def watched(self: Lime, batch: Any, rows: Tensor, removed: Tensor) -> Tensor:
        asked.append(~removed)
        return values(self, batch, rows, removed)

    monkeypatch.setattr(Lime, "values", watched)
    found = scores(Lime(depass, samples=40, alpha=0.02, rows=7))
    kept = torch.cat(asked)
    assert len(kept) >= 40
    kept = kept[-40:]
    outputs = torch.tensor([difference(ablated(model, IDS, row.tolist(), "remove")) for row in kept])
    distances = 1 - (kept.double().sum(1) / len(IDS)).sqrt()
    expected = lasso(kept.double(), outputs.double(), (-distances.square() / 2).exp(), 0.02)
    close(found, expected, error=2e-3)


def probability(model: Any, ids: Tensor) -> float:
    """The answer's, after a prompt."""
    return float(model(ids[None], use_cache=False).logits[0, -1].detach().softmax(-1)[TOKEN])


@pytest.mark.parametrize("top", [1, 12])
def test_reagent_follows_the_probability_that_replacements_take(
    model: PreTrainedModel, depass: DePass, monkeypatch: pytest.MonkeyPatch, top: int
) -> None:
    """Every pass is seen: which tokens it replaces, and with what. Importance is computed again in Python."""
    passes: list[Tensor] = []
    run = reagent.run

    def watched(decoder: Any, ids: Tensor, positions: Tensor) -> Any:
        passes.append(ids.clone())
        return run(decoder, ids, positions)

    monkeypatch.setattr(reagent, "run", watched)
    count, samples, ratio = len(IDS), 3, 0.3
    method = ReAGent(depass, samples=samples, steps=4, ratio=ratio, top=top, seed=5)
    found = scores(method)
    assert passes.pop(0).tolist() == [IDS.tolist()]
    size = round(ratio * count)
    generator = torch.Generator().manual_seed(seed_of(IDS.tolist(), 5))
    importance = torch.rand(samples, count, generator=generator, dtype=torch.float64).tolist()
    running = list(range(samples))
    likely = model(IDS[None], use_cache=False).logits[0]
    for changed, tested in zip(passes[::2], passes[1::2], strict=True):
        assert len(changed) == len(tested) == len(running)
        for number, ids in zip(running, changed, strict=True):
            replaced = ids != IDS
            assert int(replaced.sum()) == size, "a replacement is another token"
            lost = probability(model, IDS) - probability(model, ids)
            for token in range(count):
                sign = 1 if replaced[token] else -1
                importance[number][token] += math.log((1 + sign * lost) / (1 - sign * lost))
        left = []
        for number, ids in zip(running, tested, strict=True):
            best = sorted(range(count), key=lambda token, row=importance[number]: -row[token])[:size]
            assert (ids == IDS).nonzero()[:, 0].tolist() == sorted(best)
            logits = model(ids[None], use_cache=False).logits[0, -1]
            if int((logits > logits[TOKEN]).sum()) >= top:
                left.append(number)
            for place in set(range(1, count)) - set(best):
                order = likely[place - 1].argsort(descending=True).tolist()
                assert order.index(int(ids[place])) <= reagent.CHOICES
        running = left
    assert not running or len(passes) == 8
    chosen = range(samples) if len(running) == samples else set(range(samples)) - set(running)
    expected = torch.tensor([importance[number] for number in chosen]).softmax(-1).mean(0)
    close(found, expected.double())
    assert torch.equal(scores(method), found), "the draws depend on the seed and the prompt"


def test_special_tokens_are_never_removed_and_score_zero() -> None:
    tiny = DePass.from_pretrained("tiny")
    example = tasks.load("ioi", size=1)[0]
    for name in ("context_cite", "shapley", "lime", "reagent"):
        found = make_method(name, tiny, samples=8).attribute(example.prompt, example.answer)
        assert found.offsets is not None
        special = [i for i, (start, end) in enumerate(found.offsets) if start == end]
        assert special, "this tokenizer puts a special token first"
        assert all(found.scores[i] == 0 for i in special)
        assert bool(found.scores.any())
        words = make_method(name, tiny, Spans("word"), samples=8).attribute(example.prompt, example.answer)
        assert len(words) <= len(found)


def test_ablations_are_refused_without_draws(depass: DePass) -> None:
    for method in (ContextCite, Shapley, Lime, ReAGent):
        with pytest.raises(DePassError, match="samples must be at least 1"):
            method(depass, samples=0)
    for method in (ContextCite, Lime):
        with pytest.raises(DePassError, match="alpha must be positive"):
            method(depass, alpha=0.0)
    with pytest.raises(DePassError, match="rows must be at least 1"):
        ValueZeroing(depass, rows=0)
    with pytest.raises(DePassError, match="steps and top must be at least 1; got 0 and 3"):
        ReAGent(depass, steps=0)
    with pytest.raises(DePassError, match="ratio must be between 0 and 1; got 1"):
        ReAGent(depass, ratio=1.0)


def llama_layers(model: Any, ids: Tensor) -> list[dict[str, Tensor]]:
    """What each block of a Llama reads, attends with and writes, written out."""
    state = embedded(model, ids)[0]
    count = len(ids)
    cosine, sine = model.model.rotary_emb(state[None], torch.arange(count)[None])
    mask = torch.full((count, count), -torch.inf, dtype=state.dtype).triu(1)
    layers = []
    for block in model.model.layers:
        attention, size = block.self_attn, block.self_attn.head_dim
        normed = block.input_layernorm(state)
        q, k, v = (
            getattr(attention, f"{name}_proj")(normed).view(count, -1, size).transpose(0, 1) for name in "qkv"
        )
        q, k = q * cosine[0] + rotate_half(q) * sine[0], k * cosine[0] + rotate_half(k) * sine[0]
        k, v = (table.repeat_interleave(len(q) // len(table), 0) for table in (k, v))
        patterns = (q @ k.transpose(1, 2) / size**0.5 + mask).softmax(-1)
        middle = state + attention.o_proj((patterns @ v).transpose(0, 1).flatten(1))
        layers.append({"state": state, "patterns": patterns, "values": v, "middle": middle})
        state = middle + block.mlp(block.post_attention_layernorm(middle))
    return layers


def test_value_zeroing_moves_each_blocks_output(model: PreTrainedModel, depass: DePass) -> None:
    blocks: Any = model.model.layers
    count = len(IDS)
    rolled = torch.eye(count, dtype=torch.float64)
    for block, layer in zip(blocks, llama_layers(model, IDS), strict=True):

        def output(values: Tensor, block: Any = block, layer: Any = layer) -> Tensor:
            mixed = (layer["patterns"] @ values).transpose(0, 1).flatten(1)
            middle = layer["state"] + block.self_attn.o_proj(mixed)
            return middle + block.mlp(block.post_attention_layernorm(middle))

        whole = output(layer["values"]).detach()
        mixing = torch.zeros(count, count, dtype=torch.float64)
        for key in range(count):
            values = layer["values"].clone()
            values[:, key] = 0
            without = output(values).detach()
            for query in range(key, count):
                a, b = whole[query], without[query]
                mixing[query, key] = 1 - a @ b / (a.norm() * b.norm())
        rolled = mixing / mixing.sum(1, keepdim=True) @ rolled
    close(scores(ValueZeroing(depass)), rolled[-1])
    close(scores(ValueZeroing(depass, rows=3)), rolled[-1])


def test_information_flows_along_all_routes(model: PreTrainedModel, depass: DePass) -> None:
    blocks: Any = model.model.layers
    count = len(IDS)
    rolled = torch.eye(count, dtype=torch.float64)
    for block, layer in zip(blocks, llama_layers(model, IDS), strict=True):
        weight, size = block.self_attn.o_proj.weight.detach(), block.self_attn.head_dim
        routes = torch.zeros(count, count, dtype=torch.float64)
        for query in range(count):
            whole = layer["middle"][query].detach()
            for head, pattern in enumerate(layer["patterns"]):
                for key in range(query + 1):
                    part = pattern[query, key] * (
                        weight[:, head * size : (head + 1) * size] @ layer["values"][head, key]
                    )
                    near = whole.abs().sum() - (whole - part.detach()).abs().sum()
                    routes[query, key] += max(0.0, float(near))
            near = whole.abs().sum() - (whole - layer["state"][query].detach()).abs().sum()
            routes[query, query] += max(0.0, float(near))
        rolled = routes / routes.sum(1, keepdim=True) @ rolled
    found = scores(InformationFlow(depass))
    close(found, rolled[-1])
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "falcon-rw", "phi3", "gemma2", "deepseek_v2", "opt"])
def test_the_values_are_found_in_every_family(family: str) -> None:
    """With the values of all tokens but one zeroed nothing else can matter; attention itself is untouched.

    A prompt of one token has nothing to mix; the second of two has a row that sums to one.
    """
    depass = DePass(zoo.build(family, dtype=torch.float64))
    for method in (ValueZeroing(depass), InformationFlow(depass)):
        assert scores(method, IDS[:1]).tolist() == pytest.approx([1.0])
        found = scores(method, IDS)
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)
        assert bool((found >= 0).all())


def test_occlusion_of_all_tokens_keeps_the_last(model: PreTrainedModel, depass: DePass) -> None:
    """A span over the whole prompt but its first token."""
    method = Occlusion(depass, Spans([(1, len(IDS))], "token"))
    first, rest = scores(method)
    whole = float(value(model, embedded(model)).detach())
    assert rest == pytest.approx(whole - float(value(model, embedded(model, IDS[:1])).detach()), rel=1e-5)
    assert first == pytest.approx(whole - float(value(model, embedded(model, IDS[1:])).detach()), rel=1e-5)
