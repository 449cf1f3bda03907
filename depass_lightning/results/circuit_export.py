"""A circuit in other programs' formats: networkx, GraphML, and the JSON of Neuronpedia's graph viewer."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx

from depass_lightning.errors import DePassError
from depass_lightning.results.component import Component
from depass_lightning.utils.atomic_files import write_whole

if TYPE_CHECKING:
    from depass_lightning.results.circuit import Circuit

# The viewer's types of nodes; all others are drawn as transcoder features.
TYPES = {
    "token": "embedding",
    "embedding": "embedding",
    "target": "logit",
    "bias": "mlp reconstruction error",
}
SCHEMA = 1  # of Neuronpedia's attribution graphs


def graph_of(circuit: "Circuit") -> "networkx.MultiDiGraph":
    """Return a circuit as a graph: nodes by index, edges by path, with scores."""
    graph = networkx.MultiDiGraph(target=circuit.target, value=circuit.value, rule=circuit.rule)
    for index, (node, score) in enumerate(zip(circuit.nodes, circuit.scores.tolist(), strict=True)):
        places = {"layer": node.layer, "index": node.index, "position": node.span and node.span[0]}
        known = {name: place for name, place in places.items() if place is not None}
        graph.add_node(index, label=node.label, kind=node.kind, score=score, **known)
    for path, start, end in circuit.edges.nonzero().tolist():
        name = circuit.paths[path]
        graph.add_edge(start, end, key=name, path=name, weight=float(circuit.edges[path, start, end]))
    return graph


def export(circuit: "Circuit", path: str | os.PathLike[str]) -> None:
    """Write a circuit in the format of a file's extension, .graphml or .json."""
    suffix = Path(path).suffix
    if suffix == ".graphml":
        write_whole(path, "\n".join(networkx.generate_graphml(graph_of(circuit))).encode())
    elif suffix == ".json":
        slug = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-")
        content = json.dumps(_attribution_graph(circuit, slug), ensure_ascii=False)
        write_whole(path, content.encode())
    else:
        raise DePassError(f"{path} ends with {suffix!r}; circuits are exported as .graphml or .json")


def _attribution_graph(circuit: "Circuit", slug: str) -> dict[str, Any]:
    """Return the circuit in Neuronpedia's layout of attribution graphs; paths are summed."""
    names = [_node_id(circuit, index) for index in range(len(circuit.nodes))]
    total = circuit.edges.sum(0)
    return {
        "metadata": {
            "slug": slug,
            "scan": circuit.metadata.get("model", ""),
            "prompt_tokens": circuit.tokens[: circuit.position + 1],
            "prompt": circuit.text or "".join(circuit.tokens),
            "schema_version": SCHEMA,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": names[-1]},
        "nodes": [_graph_node(circuit, index, name) for index, name in enumerate(names)],
        "links": [
            {"source": names[start], "target": names[end], "weight": float(total[start, end])}
            for start, end in total.nonzero().tolist()
        ],
    }


def _node_id(circuit: "Circuit", index: int) -> str:
    """Return the viewer's id of a node: its row, its index and its position."""
    return f"{_row(circuit, circuit.nodes[index])}_{index}_{_place(circuit, circuit.nodes[index])}"


def _row(circuit: "Circuit", node: Component) -> str:
    if node.layer is not None:
        return str(node.layer)
    blocks = 1 + max((other.layer for other in circuit.nodes if other.layer is not None), default=-1)
    return str(blocks) if node.kind == "target" else "E"


def _place(circuit: "Circuit", node: Component) -> int:
    return circuit.position if node.span is None else node.span[0]


def _graph_node(circuit: "Circuit", index: int, name: str) -> dict[str, Any]:
    node, place = circuit.nodes[index], _place(circuit, circuit.nodes[index])
    score = float(circuit.scores[index])
    return {
        "node_id": name,
        "jsNodeId": f"{name}-0",
        "feature": index,
        "layer": _row(circuit, node),
        "ctx_idx": place,
        "feature_type": TYPES.get(node.kind, "cross layer transcoder"),
        "clerp": node.label,
        "influence": abs(score / circuit.value) if circuit.value else 0.0,
        "activation": score,
        "token_prob": circuit.metadata.get("probability") or 0.0 if node.kind == "target" else 0.0,
        "is_target_logit": node.kind == "target",
        "run_idx": 0,
        "reverse_ctx_idx": circuit.position - place,
    }
