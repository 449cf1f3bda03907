"""Every edge of a circuit against a naive twin, the sums that edges must have, and circuits built by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from depass_lightning import Circuit, Contrast, DePass, DePassError, Direction, Heads, Module, Token, Tokens
from depass_lightning.engine import flow
from tests.reference import zoo
from tests.reference.models import build, prompt
from tests.reference.twin import Layer, Options, Trace, attention_part, frozen_norm, mlp_parts, record

TARGET = Contrast(5, 7)
KINDS = ("gpt2", "gpt_neox", "falcon-40b", "olmo2", "bloom-normed", "gpt_oss", "deepseek_v3", "qwen3_5")


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


class Twin:
    """What each node writes, propagated alone through the true pass's frozen blocks.

    An edge is the difference of two paths: the node's states, read through the reader alone and then carried
    to the end by everything.
    """

    def __init__(self, model: Any, ids: Tensor, rule: Any) -> None:
        self.trace: Trace = record(model, ids)
        self.options = Options(rule=rule)
        self.row = self.trace.model.lm_head.weight[5] - self.trace.model.lm_head.weight[7]

    def head(self, layer: Layer, state: Tensor, head: int) -> Tensor:
        """What one head adds, by a block in which the others attend to nothing."""
        alone = torch.zeros_like(layer.attention)
        alone[head] = layer.attention[head]
        return attention_part(Layer(**{**vars(layer), "attention": alone}), state, is_bias=False)

    def mlp(self, layer: Layer, state: Tensor) -> Tensor:
        normed = frozen_norm(layer.block.post_attention_layernorm, layer.middle, state)
        return mlp_parts(layer, [normed], None, self.options)[0]

    def read(self, state: Tensor) -> float:
        normed = frozen_norm(self.trace.model.model.norm, self.trace.final, state)
        return float(normed[-1] @ self.row)

    def to_the_end(self, state: Tensor, block: int, after_attention: bool) -> float:
        for index in range(block, len(self.trace.layers)):
            layer = self.trace.layers[index]
            if index > block or not after_attention:
                state = state + attention_part(layer, state, is_bias=False)
            state = state + self.mlp(layer, state)
        return self.read(state)

    def nodes(self) -> list[tuple[int, Any, Tensor]]:
        """The block, the head or "mlp", and what it writes; tokens are in block -1."""
        entering = self.trace.layers[0].entering
        nodes: list[tuple[int, Any, Tensor]] = []
        for position in range(len(entering)):
            alone = torch.zeros_like(entering)
            alone[position] = entering[position]
            nodes.append((-1, position, alone))
        for index, layer in enumerate(self.trace.layers):
            for head in range(len(layer.attention)):
                nodes.append((index, head, self.head(layer, layer.entering, head)))
            nodes.append((index, "mlp", layer.leaving - layer.middle))
        return nodes

    def edges(self) -> Tensor:
        nodes = self.nodes()
        table = torch.zeros(len(nodes), len(nodes) + 1, dtype=torch.float64)
        for row, (block, _, written) in enumerate(nodes):
            table[row, -1] = self.read(written)
            for column, (later, reader, _) in enumerate(nodes[row + 1 :], start=row + 1):
                if later < 0 or (later == block and reader != "mlp"):
                    continue
                layer = self.trace.layers[later]
                if reader == "mlp":
                    table[row, column] = self.to_the_end(self.mlp(layer, written), later + 1, False)
                else:
                    table[row, column] = self.to_the_end(self.head(layer, written, reader), later, True)
        return table


@pytest.mark.parametrize("rule", ["half", "taylor"])
@torch.no_grad()
def test_edges_are_those_of_a_twin_that_propagates_each_node_alone(rule: str) -> None:
    model, ids = build("llama", dtype=torch.float64), prompt(5)
    expected = Twin(model, ids, rule).edges()
    circuit = DePass(model).circuit(input_ids=ids[None], target=TARGET, rule=rule)
    kept = [i for i, node in enumerate(circuit.nodes) if node.kind != "bias"]
    assert relative(circuit.edges[0][kept][:, kept], torch.nn.functional.pad(expected, (0, 0, 0, 1))) < 1e-5
    assert not circuit.edges[0][5].any()  # no biases


def scores_by_attribution(depass: DePass, circuit: Circuit, rule: str) -> Tensor:
    """The nodes' scores, less the target's, as `attribute` gives them."""
    sources = [Tokens(), Heads(), Module("mlp")]
    ids = torch.tensor([circuit.token_ids])
    ((tokens, heads, mlps),) = depass.attribute_sources(None, TARGET, sources, input_ids=ids, rule=rule)
    layers = len(depass.decoder.blocks)
    bias = tokens.scores[len(ids[0]) :]
    parts = [tokens.scores[: len(ids[0])], bias if len(bias) else torch.zeros(1)]
    for layer in range(layers):
        of_layer = [c.layer == layer and c.kind == "head" for c in heads.components]
        parts.append(heads.scores[torch.tensor(of_layer)])
        parts.append(
            mlps.scores[torch.tensor([c.layer == layer and c.kind == "mlp" for c in mlps.components])]
        )
    return torch.cat(parts)


@pytest.mark.covering
@pytest.mark.parametrize("rule", ["half", "shap"])
@pytest.mark.parametrize("name", KINDS)
def test_edges_add_up_in_every_order_of_sublayers(name: str, rule: str) -> None:
    """Incoming with the constants, the node's score, and outgoing."""
    depass = DePass(zoo.build(name, dtype=torch.float64))
    circuit = depass.circuit(input_ids=prompt(6)[None], target=TARGET, rule=rule)
    assert circuit.completeness < 1e-5
    assert circuit.paths == (["value"] if rule == "half" else ["value", "query", "key"])


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ALL)
def test_edges_add_up_in_every_family(name: str) -> None:
    depass = DePass(zoo.build(name, dtype=torch.float64))
    circuit = depass.circuit(input_ids=prompt(6)[None], target=TARGET)
    assert circuit.completeness < 1e-5


@pytest.mark.parametrize("rule", ["half", "dual"])
def test_scores_are_those_of_attribute(rule: str) -> None:
    """A head's value biases are part of what it writes, but its component's score leaves them out."""
    depass = DePass(build("llama", dtype=torch.float64))
    circuit = depass.circuit(input_ids=prompt(6)[None], target=TARGET, rule=rule)
    assert relative(circuit.scores[:-1], scores_by_attribution(depass, circuit, rule)) < 1e-5


def test_query_and_key_paths_are_those_of_the_whole_rule() -> None:
    """Paths apart sum to the tokens' scores, also where the rule is not complete."""
    depass = DePass(build("qwen2", dtype=torch.float64))
    for rule in ("shap", "dual"):
        ids = prompt(6)[None]
        circuit = depass.circuit(input_ids=ids, target=TARGET, rule=rule)
        assert all(bool(path.any()) for path in circuit.edges)
        plain = depass.attribute(input_ids=ids, target=TARGET, rule=rule)[0]
        assert relative(circuit.scores[:6], plain.scores[:6]) < 1e-5


@pytest.mark.parametrize("rule", ["half", "shap"])
def test_nodes_by_position_sum_to_the_others(rule: str) -> None:
    depass = DePass(build("qwen2", dtype=torch.float64))
    arguments: dict[str, Any] = {"input_ids": prompt(5)[None], "target": TARGET, "rule": rule}
    whole = depass.circuit(**arguments)
    apart = depass.circuit(**arguments, by_position=True)
    assert apart.completeness < 1e-5
    names = {node.label: node for node in whole.nodes if node.kind in ("head", "mlp")}
    summed = apart.merged(lambda node: names.get(node.label.rpartition(" at ")[0], node))
    assert summed.nodes == whole.nodes
    assert relative(summed.edges, whole.edges) < 1e-5
    assert relative(summed.scores, whole.scores) < 1e-5


def test_what_does_not_fit_in_memory_is_taken_in_several_sweeps() -> None:
    depass = DePass(build("llama-biases", dtype=torch.float64))
    arguments: dict[str, Any] = {"input_ids": prompt(6)[None], "target": TARGET}
    expected = depass.circuit(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        original = flow._Sweep.__init__

        def small(self: Any, recordings: Any, rule: Any, layout: Any, limit: int) -> None:
            original(self, recordings, rule, layout, 3)

        patch.setattr(flow._Sweep, "__init__", small)
        assert relative(depass.circuit(**arguments).edges, expected.edges) < 1e-6


def test_the_difference_of_two_runs() -> None:
    """Its edges are the plain ones less those of the other run's writing; what leaves a node is its score."""
    depass = DePass(build("qwen2", dtype=torch.float64))
    ids = prompt(6)
    other = ids.clone()
    other[2] = 9
    circuit = depass.circuit(input_ids=ids[None], target=TARGET, corrupted=other[None])
    difference = circuit.difference
    assert difference is not None
    assert relative(difference.edges.sum(0).sum(1)[:-1], difference.scores[:-1]) < 1e-5
    tokens = difference.scores[:6]
    assert bool(tokens[2])
    assert not tokens[[0, 1, 3, 4, 5]].any()
    assert not difference.edges[0, circuit.node("bias")].any()
    same = depass.circuit(input_ids=ids[None], target=TARGET, corrupted=ids[None]).difference
    assert same is not None
    assert not same.edges.any()


def test_all_edges_take_three_plain_passes_and_a_product() -> None:
    """By the operations that torch counts, the recorded pass included."""
    depass = DePass.from_pretrained("tiny")
    ids = torch.arange(3, 23)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        depass.model(ids)
    plain = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        circuit = depass.circuit(input_ids=ids, target=TARGET)
    product = len(circuit.nodes) ** 2 * 20 * depass.decoder.hidden_size
    assert counter.get_total_flops() < 3 * plain + product


def test_coarser_nodes_and_a_target_inside() -> None:
    depass = DePass(build("llama", dtype=torch.float64))
    ids = prompt(6)[None]
    coarse = depass.circuit(input_ids=ids, target=TARGET, nodes=("embedding", "attentions", "mlps"))
    assert [node.kind for node in coarse.nodes[:4]] == ["embedding", "bias", "attention", "mlp"]
    assert coarse.completeness < 1e-5
    inside = depass.circuit(input_ids=ids, target=Direction(torch.ones(36), layer=1, position=3))
    assert {node.layer for node in inside.nodes} == {None, 0}
    assert len([node for node in inside.nodes if node.kind == "token"]) == 4
    assert inside.completeness < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "softmax"}, "'softmax' is no linear rule"),
        ({"nodes": ("tokens", "heads")}, "nodes needs one of mlps"),
        ({"nodes": ("tokens", "heads", "neurons")}, "there are no nodes 'neurons'"),
        ({"corrupted": [[1, 2, 3]]}, "the corrupted prompt has 3 tokens and the prompt 6"),
        ({"target": [5, 7]}, "a circuit has one target"),
        ({"input_ids": prompt(6)[None].repeat(2, 1)}, "there are 2 prompts"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    depass = DePass(build("llama"))
    with pytest.raises(DePassError, match=message):
        depass.circuit(**({"input_ids": prompt(6)[None], "target": 5} | arguments))


# Models built weight by weight. The residual stream has blocks of `V` numbers, one for each token, so that
# what a weight does can be read off: here a token is, there the token before it, here what comes next.

V, HEAD = 12, 24


def empty(layers: int, blocks: int, *, heads: int = 2) -> Any:
    """A Llama without any effect: all weights are zero, norms are even and positions do not rotate."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=blocks * HEAD,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
    return model


def total(circuit: Circuit) -> float:
    """The mass of all edges."""
    return float(circuit.edges.abs().sum())


def read_at(head: int, block: int) -> tuple[slice, slice]:
    """The rows of a head in a projection, and the columns of a block of the stream."""
    return slice(head * HEAD, head * HEAD + V), slice(block * HEAD, block * HEAD + V)


@torch.no_grad()
def test_a_copying_model_is_found_exactly() -> None:
    """One head attends to a marked token and copies it; all others and the MLPs do nothing."""
    model = empty(2, 2)
    one = torch.eye(V, dtype=torch.float64)
    model.model.embed_tokens.weight[:, :V] = one
    attention = model.model.layers[1].self_attn
    rows, columns = read_at(1, 0)
    attention.v_proj.weight[rows, columns] = one
    attention.o_proj.weight[HEAD : HEAD + V, rows] = one  # written to the second block
    marked, query = 3, 5
    attention.k_proj.weight[rows.start + HEAD - 1, marked] = 30.0  # a channel that hardly rotates
    attention.q_proj.weight[rows.start + HEAD - 1, query] = 30.0
    model.lm_head.weight[:, HEAD : HEAD + V] = one
    circuit = DePass(model).circuit(input_ids=torch.tensor([[7, 3, 8, 5]]), target=Token(3))
    assert circuit.completeness < 1e-5
    path = circuit.edge(1, "layer 1 head 1"), circuit.edge("layer 1 head 1", len(circuit.nodes) - 1)
    assert path[0] == pytest.approx(circuit.value, rel=1e-4)
    assert path[1] == pytest.approx(circuit.value, rel=1e-4)
    assert sum(map(abs, path)) > 0.99 * total(circuit)
    assert [node.label for node in circuit.prune(threshold=0.01).nodes[1:-1]] == ["layer 1 head 1"]


@torch.no_grad()
def test_an_induction_model_is_found_exactly() -> None:
    """A head of the first block writes the token before; one of the second copies what follows its own."""
    model = empty(2, 4, heads=2)
    one = torch.eye(V, dtype=torch.float64)
    model.model.embed_tokens.weight[:, :V] = one
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    rows, columns = read_at(0, 0)
    # A token looks for the one with the number before its own: prompts count up.
    first.q_proj.weight[rows, columns] = 0.8 * torch.roll(one, 1, 1)
    first.k_proj.weight[rows, columns] = one
    first.v_proj.weight[rows, columns] = one
    first.o_proj.weight[HEAD : HEAD + V, rows] = one  # the token before, in the second block
    rows, columns = read_at(1, 0)
    second.q_proj.weight[rows, columns] = 1.5 * one
    second.k_proj.weight[rows, HEAD : HEAD + V] = one
    second.v_proj.weight[rows, columns] = one
    second.o_proj.weight[2 * HEAD : 2 * HEAD + V, rows] = one
    model.lm_head.weight[:, 2 * HEAD : 2 * HEAD + V] = one
    ids = torch.tensor([[2, 3, 4, 5, 3]])  # after 3 came 4
    depass = DePass(model)
    circuit = depass.circuit(input_ids=ids, target=Token(4), rule="shap", score_weight=1.0)
    assert circuit.completeness < 1e-4
    assert int(model(ids).logits[0, -1].argmax()) == 4
    induction = circuit.node("layer 1 head 1")
    keys = circuit.edges[circuit.paths.index("key")]
    # The only head that writes into another one is that of the token before, and it does so by keys.
    before = circuit.node("layer 0 head 0")
    assert float(keys[before, induction]) > 0.1 * circuit.value
    others = circuit.edges.clone()
    others[:, before], others[:, :, induction], others[:, induction] = 0, 0, 0
    others[:, :, before] = 0
    assert float(others.abs().sum()) < 0.01 * total(circuit)
    plain = depass.circuit(input_ids=ids, target=Token(4))
    assert plain.edge(2, induction) > 0.99 * plain.value
    assert plain.edge(2, induction) + plain.edge(induction, -1) > 0.99 * total(plain)


@torch.no_grad()
def test_a_comparator_is_found_exactly() -> None:
    """A neuron that fires for a marked token alone votes for it: token, MLP, target."""
    model = empty(2, 2)
    one = torch.eye(V, dtype=torch.float64)
    model.model.embed_tokens.weight[:, :V] = one
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight[0, :V] = torch.tensor([-4.0] * 6 + [4.0] * 6, dtype=torch.float64)  # token >= 6
    mlp.up_proj.weight[0, :V] = 1.0
    mlp.down_proj.weight[HEAD, 0] = 1.0
    model.lm_head.weight[1, HEAD] = 1.0
    depass = DePass(model)
    large = depass.circuit(input_ids=torch.tensor([[2, 4, 9]]), target=Contrast(1, 0))
    small = depass.circuit(input_ids=torch.tensor([[2, 9, 4]]), target=Contrast(1, 0))
    assert large.value > 10 * abs(small.value)
    path = large.edge(2, "layer 0 mlp") + large.edge("layer 0 mlp", -1)
    assert path == pytest.approx(total(large), rel=1e-5)
    assert large.edge(2, "layer 0 mlp") == pytest.approx(large.value, rel=1e-5)
