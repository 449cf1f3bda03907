"""Ablation of edges against a twin that computes every node's input from stored outputs, and edge scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from depass_lightning import Contrast, DePass, DePassError, Heads
from depass_lightning.faithfulness.edge_circuits import (
    PairBatch,
    ablated_values,
    edge_layout,
    input_gradients,
    node_outputs,
    possible_edges,
)
from depass_lightning.methods.model_runs import as_depass_runs
from tests.reference import zoo
from tests.reference.models import build, prompt

KINDS = ("gpt2", "gptj", "gpt_neox", "falcon-40b", "gemma3", "olmo2", "granite", "bloom", "deepseek_v3")
REFUSED = {
    "bloom-normed": "rescales its residual stream",
    "opt-350m": "rescales its residual stream",
    "granitemoe": "run their experts without a module",
    "granitemoehybrid": "run their experts without a module",
    "nemotron_h": "have no attention",
}


def batch_of(depass: DePass, lengths: tuple[int, ...] = (6, 4)) -> PairBatch:
    """Prompts of different lengths with corrupted ones; the second is padded."""
    rows = [prompt(length, seed=seed) for seed, length in enumerate(lengths)]
    attributions = [
        depass.attribute(input_ids=row[None], target=Contrast(7, 11), source=Heads(0))[0] for row in rows
    ]
    others = [prompt(length, seed=10 + length).tolist() for length in lengths]
    return PairBatch.of(depass.decoder, attributions, others)


class Twin:
    """A Llama in which every head and MLP reads a sum of stored outputs, a position's attention by hand."""

    def __init__(self, model: Any) -> None:
        self.model, self.heads = model, model.config.num_attention_heads

    def head(self, attention: Any, states: Tensor, head: int) -> Tensor:
        """What one head writes, without the output map's bias."""
        size, group = attention.head_dim, self.heads // self.model.config.num_key_value_heads
        positions = torch.arange(len(states))[None]
        cos, sin = (part[0] for part in self.model.model.rotary_emb(states[None], positions))

        def mapped(linear: nn.Linear, index: int) -> Tensor:
            return linear(states)[:, index * size : (index + 1) * size]

        def rotated(vector: Tensor) -> Tensor:
            first, second = vector.chunk(2, 1)
            return vector * cos + torch.cat([-second, first], 1) * sin

        query, key = rotated(mapped(attention.q_proj, head)), rotated(mapped(attention.k_proj, head // group))
        scores = query @ key.T / size**0.5
        future = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(1) @ mapped(attention.v_proj, head // group)
        return mixed @ attention.o_proj.weight[:, head * size : (head + 1) * size].T

    def run(self, ids: Tensor, kept: Tensor, substitutes: Tensor | None) -> tuple[list[Tensor], float]:
        """Every node's output, and the target's value at the last position."""
        model, outputs = self.model, [self.model.get_input_embeddings()(ids)]
        constant = torch.zeros((), dtype=torch.float64)  # of the output maps' biases

        def read(node: int) -> Tensor:
            terms = [
                output if kept[i, node] or substitutes is None else substitutes[i].expand_as(output)
                for i, output in enumerate(outputs)
                if not (i > first and node < first + self.heads + 1)  # of the same block's heads
            ]
            return torch.stack(terms).sum(0) + constant

        for layer in model.model.layers:
            first = len(outputs) - 1
            start, written = len(outputs), []
            for head in range(self.heads):
                normed = layer.input_layernorm(read(start + head))
                written.append(self.head(layer.self_attn, normed, head))
            outputs += written
            constant = constant + layer.self_attn.o_proj.bias
            first = len(outputs)
            outputs.append(layer.mlp(layer.post_attention_layernorm(read(len(outputs)))))
        first = len(outputs)
        logits = model.lm_head(model.model.norm(read(len(outputs))))[-1]
        return outputs, float((logits[7] - logits[11]).detach())


@pytest.mark.parametrize("attention_only", [True, False])
@torch.no_grad()
def test_circuits_are_those_of_a_twin_that_sums_stored_outputs(attention_only: bool) -> None:
    """All edges kept, none, one alone, all but one, and any half of them; resampled and zero."""
    model: Any = build("llama-biases", dtype=torch.float64, num_hidden_layers=2)
    if attention_only:
        for layer in model.model.layers:
            for parameter in layer.mlp.down_proj.parameters():
                parameter.zero_()
    depass, twin = DePass(model), Twin(model)
    batch, edges = batch_of(depass), possible_edges(depass.decoder)
    nothing, everything = torch.zeros_like(edges), torch.ones_like(edges)
    one, but_one = nothing.clone(), everything.clone()
    one[3, 9], but_one[0, -1] = True, False  # a head to one of the next block; the embedding to the target
    half = torch.rand(edges.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    ends = [int(end) + 1 for end in batch.ends]
    with as_depass_runs(depass.decoder):
        plain, other = (node_outputs(depass.decoder, batch, ids) for ids in (batch.ids, batch.corrupted))
        zero = torch.zeros(len(edges) - 1, 1, 1, 1, dtype=torch.float64)
        for kept in (nothing, everything, one, but_one, half):
            for substitutes in (other[0], zero):
                values = ablated_values(depass.decoder, batch, kept, substitutes)
                for row, end in enumerate(ends):
                    stored = zero[:, 0] if substitutes is zero else substitutes[:, row, :end]
                    expected = twin.run(batch.ids[row, :end], kept, stored)[1]
                    assert float(values[row]) == pytest.approx(expected, abs=1e-9)
        outputs, _ = twin.run(batch.ids[0], everything, None)
    torch.testing.assert_close(plain[0][:, 0], torch.stack(outputs), rtol=0, atol=1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("name", KINDS)
def test_the_whole_and_the_empty_circuit_are_the_two_runs(name: str) -> None:
    """Exactly the prompt's run with all edges; the corrupted one's with none; outputs sum to the state."""
    depass = DePass(zoo.build(name, dtype=torch.float64))
    decoder, batch = depass.decoder, batch_of(depass, (5, 5))
    edges = possible_edges(decoder)
    final: Any = decoder.final_norm
    states: list[Tensor] = []
    with as_depass_runs(decoder):
        handle = final.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
        (outputs, clean), (other, corrupted) = (
            node_outputs(decoder, batch, ids) for ids in (batch.ids, batch.corrupted)
        )
        handle.remove()
        # Constants, such as the output maps' biases, are the same in both runs.
        torch.testing.assert_close((other - outputs).sum(0), states[1] - states[0], rtol=0, atol=1e-8)
        assert torch.equal(ablated_values(decoder, batch, edges, other), clean)
        empty = ablated_values(decoder, batch, torch.zeros_like(edges), other)
        torch.testing.assert_close(empty, corrupted, rtol=0, atol=1e-8)
        assert not torch.allclose(clean, corrupted)
        # The derivative along one edge: a small step towards the other run.
        gradients = input_gradients(decoder, batch, decoder.token_embedding(batch.ids).detach())
        step, mlp = 1e-6, edge_layout(decoder).mlp_of(1)
        places = edges.nonzero()[:: 1 + int(edges.sum()) // 8].tolist()
        for writer, reader in [*places, [0, mlp]]:
            kept = edges.clone()
            kept[writer, reader] = False
            near = outputs + step * (other - outputs)
            found = (ablated_values(decoder, batch, kept, near) - clean) / step
            change = (other - outputs)[writer] * gradients[reader - 1]
            torch.testing.assert_close(found, change.sum((1, 2)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_stream_that_is_no_sum_is_refused(name: str) -> None:
    with pytest.raises(DePassError, match=f"edges cannot be ablated in .*{REFUSED[name]}"):
        possible_edges(DePass(zoo.build(name)).decoder)
