"""What can be done with a circuit once it is computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import networkx
import pytest
import torch

from depass_lightning import Attribution, Circuit, DePassError
from depass_lightning.results.component import Component

TOKENS = [Component("token", name, span=(i, i + 1)) for i, name in enumerate(("A", " B"))]
BLOCK = [Component("head", "layer 0 head 0", 0, 0), Component("mlp", "layer 0 mlp", 0)]
NODES = [*TOKENS, Component("bias", "bias"), *BLOCK, Component("target", "' C'")]


def circuit(**changes: object) -> Circuit:
    """A head that reads both tokens, an MLP that reads the head, and what is direct."""
    edges = torch.zeros(1, 6, 6)
    for start, end, score in ((0, 3, 1.0), (1, 3, -3.0), (3, 4, -0.5), (3, 5, -1.5), (4, 5, 0.5)):
        edges[0, start, end] = score
    edges[0, 2, 4], edges[0, 1, 5] = 1.0, 3.0
    scores = torch.tensor([1.0, 0.0, 1.0, -2.0, 0.5, 2.0])
    whole = Circuit(NODES, edges, scores, 2.0, "' C'", "A B", ["A", " B"], [4, 5], "half", 1)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_edges_by_size_and_by_name() -> None:
    whole = circuit()
    assert whole.completeness == 0
    assert whole.edge(" B", "layer 0 head 0") == whole.edge(1, 3) == -3
    assert [edge.score for edge in whole.top(2)] == [-3, 3]
    assert whole.top(1)[0].source is NODES[1]
    assert len(whole.top()) == whole.edge_count == 7
    assert circuit(value=3.0).completeness == pytest.approx(1 / 3)
    with pytest.raises(DePassError, match="no node is labelled 'C'"):
        whole.node("C")
    with pytest.raises(DePassError, match="6 nodes and 1 paths need edges of shape"):
        circuit(scores=torch.zeros(5))


def test_pruning_keeps_what_reaches_the_target() -> None:
    whole = circuit()
    assert [edge.score for edge in whole.prune(edges=3).top()] == [-3, 3, -1.5]
    # Without the MLP's small edge to the target, what the bias gives it leads nowhere.
    pruned = whole.prune(threshold=0.5)
    assert sorted(edge.score for edge in pruned.top()) == [-3, -1.5, 1, 3]
    assert [node.label for node in pruned.nodes] == ["A", " B", "layer 0 head 0", "' C'"]
    assert pruned.scores.tolist() == [1, 0, -2, 2]
    assert whole.prune(threshold=0).edge_count == whole.edge_count
    assert [node.kind for node in whole.prune(edges=0).nodes] == ["target"]
    for wrong in ({}, {"edges": 3, "threshold": 0.5}, {"edges": -1}, {"threshold": -0.1}):
        with pytest.raises(DePassError, match="prune takes one of"):
            whole.prune(**wrong)  # type: ignore[arg-type]


def test_comparing_two_checkpoints() -> None:
    edges = circuit().edges.clone()
    edges[0, 1, 3], edges[0, 3, 4] = 0.25, 2.0
    later = circuit(edges=edges, target="' D'", nodes=[*NODES[:-1], Component("target", "' D'")], value=5.0)
    comparison = circuit().compare(later, edges=3)
    assert comparison.overlap == 0.5
    assert [(edge.source.label, edge.score) for edge in comparison.appeared] == [("layer 0 head 0", 2)]
    assert [(edge.source.label, edge.score) for edge in comparison.vanished] == [(" B", -3)]
    assert comparison.difference.edge(1, 3) == 3.25
    assert comparison.difference.value == 3
    with pytest.raises(DePassError, match="same nodes and paths"):
        circuit().compare(circuit().prune(edges=3))


def test_the_mean_over_prompts_is_aligned_by_role() -> None:
    one = circuit().by_role({0: "IO"})
    other = circuit(scores=circuit().scores * 3, edges=circuit().edges * 3, value=6.0).by_role(
        {0: "IO", 1: "S"}
    )
    assert [node.label for node in one.nodes[:2]] == ["IO", "other"]
    mean = Circuit.mean([one, other])
    assert [node.label for node in mean.nodes] == [
        "IO",
        "other",
        "S",
        "bias",
        *[n.label for n in BLOCK],
        "target",
    ]
    assert mean.edge("IO", "layer 0 head 0") == 2
    assert mean.edge("other", "layer 0 head 0") == -1.5
    assert mean.edge("S", "target") == 4.5
    assert (mean.value, mean.prompts, mean.completeness) == (4, 2, 0)
    with pytest.raises(DePassError, match="a role is at position 2"):
        circuit().by_role({2: "END"})
    with pytest.raises(DePassError, match="one prompt at least"):
        Circuit.mean([])


def test_heads_at_a_position_get_its_role() -> None:
    nodes = [*NODES[:3], replace(BLOCK[0], label="layer 0 head 0 at 0", span=(0, 1)), BLOCK[1], NODES[5]]
    assert circuit(nodes=nodes).by_role({0: "IO"}).nodes[3] == Component("head", "layer 0 head 0 at IO", 0, 0)


def test_a_circuit_comes_back_from_its_file(tmp_path: Path) -> None:
    whole = circuit(metadata={"model": "m"}, difference=circuit(value=0.5, edges=circuit().edges * 2))
    whole.save(tmp_path / "a.safetensors")
    back = Circuit.load(tmp_path / "a.safetensors")
    assert back.nodes == whole.nodes
    assert torch.equal(back.edges, whole.edges)
    assert torch.equal(back.scores, whole.scores)
    assert (back.value, back.metadata, back.paths) == (2.0, {"model": "m"}, ["value"])
    assert back.difference is not None
    assert torch.equal(back.difference.edges, whole.edges * 2)
    assert back.difference.value == 0.5
    with pytest.raises(DePassError, match=r"holds no attribution that Attribution\.save wrote"):
        Attribution.load(tmp_path / "a.safetensors")
    with pytest.raises(DePassError, match="metadata cannot be JSON"):
        circuit(metadata={"model": {1, 2}}).save(tmp_path / "b.safetensors")


def test_other_programs_formats(tmp_path: Path) -> None:
    whole = circuit()
    graph = whole.to_networkx()
    assert graph.number_of_edges() == 7
    assert graph.edges[1, 3, "value"]["weight"] == -3
    assert graph.nodes[3] == {"label": "layer 0 head 0", "kind": "head", "score": -2, "layer": 0, "index": 0}
    whole.export(tmp_path / "a.graphml")
    assert networkx.read_graphml(tmp_path / "a.graphml").nodes["0"]["label"] == "A"
    whole.export(tmp_path / "My circuit.json")
    content = json.loads((tmp_path / "My circuit.json").read_text(encoding="utf-8"))
    assert content["metadata"]["slug"] == "my-circuit"
    assert content["metadata"]["prompt_tokens"] == ["A", " B"]
    names = {node["node_id"]: node for node in content["nodes"]}
    assert len(names) == 6
    assert [node["layer"] for node in content["nodes"]] == ["E", "E", "E", "0", "0", "1"]
    assert names["1_5_1"]["is_target_logit"]
    assert {"source": "E_1_1", "target": "0_3_1", "weight": -3.0} in content["links"]
    assert all({link["source"], link["target"]} <= names.keys() for link in content["links"])
    with pytest.raises(DePassError, match=r"ends with '\.txt'"):
        whole.export(tmp_path / "a.txt")
