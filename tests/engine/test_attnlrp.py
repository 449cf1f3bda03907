"""The rule dual has the relevances of AttnLRP, propagated as its paper has them (arXiv 2402.05602)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from depass_lightning import Contrast, DePass
from tests.reference.models import build, distance, prompt

TOKEN, FOIL = 5, 7


def through(function: Callable[[Tensor], Tensor], states: Tensor, relevance: Tensor) -> Tensor:
    """The epsilon rule, with an epsilon of zero, of an affine map (equation 8)."""
    output, pull = torch.func.vjp(function, states)[:2]
    return states * pull(relevance / output)[0]


def of_product(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Epsilon and uniform rule of a matrix product (proposition 3.3)."""
    shares = relevance / (2 * (a @ b))
    return a * (shares @ b.mT), b * (a.mT @ shares)


def of_softmax(scores: Tensor, relevance: Tensor) -> Tensor:
    """Deep Taylor decomposition at the scores themselves (proposition 3.1)."""
    seen = torch.where(scores.isinf(), 0, scores)
    return seen * (relevance - scores.softmax(-1) * relevance.sum(-1, keepdim=True))


def of_sum(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    return relevance * a / (a + b), relevance * b / (a + b)


class Block:
    """One block of a Llama, forward and back; norms and activations pass relevance on (proposition 3.4)."""

    def __init__(self, block: Any, cosine: Tensor, sine: Tensor) -> None:
        self.block, self.attention, self.mlp = block, block.self_attn, block.mlp
        self.cosine, self.sine = cosine, sine

    def head(self, name: str) -> Callable[[Tensor], Tensor]:
        """The map to queries, keys or values of all query heads, rotated."""
        attention, size = self.attention, self.attention.head_dim

        def project(states: Tensor) -> Tensor:
            table = getattr(attention, f"{name}_proj")(states).view(len(states), -1, size).transpose(0, 1)
            if name != "v":
                table = table * self.cosine + rotate_half(table) * self.sine
            groups = attention.q_proj.out_features // (size * len(table))
            return table.repeat_interleave(groups, 0)

        return project

    def forward(self, state: Tensor) -> Tensor:
        self.state, self.normed = state, self.block.input_layernorm(state)
        self.q, self.k, self.v = (self.head(name)(self.normed) for name in "qkv")
        mask = torch.full((len(state), len(state)), -torch.inf, dtype=state.dtype).triu(1)
        self.products, self.size = self.q @ self.k.mT, self.attention.head_dim**0.5
        self.scores = self.products / self.size + mask
        self.mixed = self.scores.softmax(-1) @ self.v
        self.added = self.attention.o_proj(self.mixed.transpose(0, 1).flatten(1))
        self.middle = state + self.added
        self.read = self.block.post_attention_layernorm(self.middle)
        self.gate, self.up = self.mlp.gate_proj(self.read), self.mlp.up_proj(self.read)
        self.neurons = self.mlp.act_fn(self.gate) * self.up
        self.written = self.mlp.down_proj(self.neurons)
        return self.middle + self.written

    def backward(self, relevance: Tensor) -> Tensor:
        middle, written = of_sum(self.middle, self.written, relevance)
        neurons = through(self.mlp.down_proj, self.neurons, written)
        middle = middle + through(self.mlp.gate_proj, self.read, neurons / 2)
        middle = middle + through(self.mlp.up_proj, self.read, neurons / 2)
        entry, added = of_sum(self.state, self.added, middle)
        output = self.attention.o_proj
        mixed = through(lambda states: output(states.transpose(0, 1).flatten(1)), self.mixed, added)
        probabilities, values = of_product(self.scores.softmax(-1), self.v, mixed)
        queries, keys = of_product(self.q, self.k.mT, of_softmax(self.scores, probabilities))
        for name, part in (("q", queries), ("k", keys.mT), ("v", values)):
            entry = entry + through(self.head(name), self.normed, part)
        return entry


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_dual_is_attnlrp(name: str) -> None:
    model: Any = build(name, dtype=torch.float64)
    ids = prompt(7)
    embedded = state = model.get_input_embeddings()(ids).detach()
    cosine, sine = model.model.rotary_emb(state[None], torch.arange(len(ids))[None])
    with torch.no_grad():
        blocks = [Block(block, cosine[0], sine[0]) for block in model.model.layers]
        for block in blocks:
            state = block.forward(state)
        row = model.lm_head.weight[TOKEN] - model.lm_head.weight[FOIL]
        relevance = torch.zeros_like(state)
        relevance[-1] = model.model.norm(state)[-1] * row
        for block in reversed(blocks):
            relevance = block.backward(relevance)
    found = DePass(model).attribute(input_ids=ids[None], target=Contrast(TOKEN, FOIL), rule="dual")[0]
    expected = relevance.sum(-1)
    assert float(expected.abs().max()) > 1e-2
    assert torch.equal(embedded, blocks[0].state)
    assert distance(found.scores[: len(ids)], expected.float()) < 1e-5
