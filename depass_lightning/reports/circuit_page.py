"""A circuit as a page, as a figure and as a tree in the terminal: its largest edges that reach the target."""

import os
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from rich.text import Text
from rich.tree import Tree

from depass_lightning.reports.numbers import model_name, signed, visible
from depass_lightning.reports.page import asset, joined, rendered
from depass_lightning.reports.palette import LIGHT, hexadecimal
from depass_lightning.results.circuit import INPUTS, Circuit
from depass_lightning.results.component import Component
from depass_lightning.utils.atomic_files import write_whole

LARGEST = 3000  # edges on a page
DRAWN = 40  # edges of a figure
TIMELINE = 60  # edges of a timeline
BRANCHES, DEPTH = 5, 3  # of a tree
SMALLEST = 0.03  # edge of a tree, as a fraction of the value


def write_circuit_page(
    path: str | os.PathLike[str],
    circuit: Circuit,
    *,
    title: str,
    subtitle: str = "",
    timeline: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """Write the page of a circuit: one file, which needs no network.

    Args:
        path: the page's file, written whole or not at all.
        circuit: the circuit.
        title: the page's title.
        subtitle: a sentence below the title.
        timeline: by training step, the scores of the circuit's largest edges then; None shows none.
    """
    largest = circuit.top(LARGEST)
    numbers = {id(node): number for number, node in enumerate(circuit.nodes)}
    paths = {name: number for number, name in enumerate(circuit.paths)}
    data = {
        "nodes": [
            _node_data(circuit, node, score)
            for node, score in zip(circuit.nodes, circuit.scores.tolist(), strict=True)
        ],
        "edges": [
            [numbers[id(edge.source)], numbers[id(edge.reader)], paths[edge.path], float(f"{edge.score:.4g}")]
            for edge in largest
        ],
        "paths": circuit.paths,
        "heads": _columns(circuit),
        "tokens": [visible(token) for token in circuit.tokens],
        "total": circuit.edge_count,
        "value": circuit.value,
    }
    settings = {
        "model": model_name(str(circuit.metadata.get("model", "unnamed"))),
        "rule": circuit.rule,
        "value": signed(circuit.value),
        "prompts": f"{circuit.prompts:,}",
        "nodes": f"{len(circuit.nodes):,}",
    }
    page = rendered(
        "circuit",
        joined(["circuit.js"]),
        data,
        title=visible(title),
        subtitle=visible(subtitle),
        settings={name: visible(value) for name, value in settings.items()},
        style=Markup(asset("page.css")),
        timeline=_timeline(timeline) if timeline else None,
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def _timeline(steps: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Return a table of edges by step, the largest at any step first; absent edges have no cell."""
    largest: dict[str, float] = {}
    for edges in steps.values():
        for name, score in edges.items():
            largest[name] = max(largest.get(name, 0.0), abs(score))
    names = sorted(largest, key=largest.__getitem__, reverse=True)
    scale = largest[names[0]] or 1.0

    def cell(score: float | None) -> tuple[str, bool, str] | None:
        return None if score is None else (signed(score), score > 0, f"{abs(score) / scale:.2f}")

    runs = list(steps.values())
    changes = [
        (len(now.keys() - before.keys()), len(before.keys() - now.keys()))
        for before, now in zip([runs[0], *runs], runs, strict=False)
    ]
    return {
        "steps": list(zip(steps, changes, strict=True)),
        "rows": [(visible(name), [cell(edges.get(name)) for edges in runs]) for name in names[:TIMELINE]],
        "edges": len(names),
    }


def _node_data(circuit: Circuit, node: Component, score: float) -> dict[str, Any]:
    known = {
        "label": visible(node.label),
        "kind": node.kind,
        "layer": node.layer,
        "index": node.index,
        "position": None if node.span is None else node.span[0],
        "score": float(f"{score:.4g}"),
        "note": visible(circuit.notes[node.label]) if node.label in circuit.notes else None,
        "pattern": circuit.patterns.get(node.label),
    }
    return {name: value for name, value in known.items() if value is not None}


def circuit_figure(circuit: Circuit) -> Figure:
    """Draw a circuit's largest edges: layers upwards, tokens along the bottom."""
    small = circuit.prune(edges=DRAWN)
    layers = sorted({node.layer for node in small.nodes if node.layer is not None})
    places = _places(small, layers)
    figure = Figure(figsize=(8, 2 + 0.45 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    largest = max((abs(edge.score) for edge in small.top(1)), default=1.0)
    for edge in small.top(DRAWN)[::-1]:
        strength = abs(edge.score) / largest
        colour = hexadecimal(LIGHT.positive if edge.score > 0 else LIGHT.negative)
        ends = places[id(edge.source)], places[id(edge.reader)]
        look = {"color": colour, "linewidth": 0.5 + 4 * strength, "alpha": 0.3 + 0.6 * strength}
        axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-", connectionstyle="arc3,rad=0.06", **look))
    for node, score in zip(small.nodes, small.scores.tolist(), strict=True):
        x, y = places[id(node)]
        colour = hexadecimal(LIGHT.positive if score >= 0 else LIGHT.negative)
        axes.plot(x, y, "s" if node.kind == "mlp" else "o", color=colour, markersize=7)
        below, name = node.kind in INPUTS, _short(node)
        axes.annotate(
            name,
            (x, y),
            (0, -9 if below else 7),
            textcoords="offset points",
            ha="right" if below else "center",
            va="top" if below else "bottom",
            rotation=40 if below else 0,
            fontsize=8,
        )
    axes.set_yticks(range(1, len(layers) + 1), [f"layer {layer}" for layer in layers])
    axes.set_xticks([])
    axes.set_ylim(-0.9, len(layers) + 2.2)
    axes.spines[:].set_visible(False)
    return figure


def _columns(circuit: Circuit) -> int:
    """Return the number of columns that heads are drawn in."""
    return 1 + max((node.index or 0 for node in circuit.nodes if node.layer is not None), default=0)


def _places(circuit: Circuit, layers: list[int]) -> dict[int, tuple[float, float]]:
    """Return where each node is drawn: heads from left to right, an MLP at the right and slightly higher."""
    heads = _columns(circuit)
    inputs = [node for node in circuit.nodes if node.kind in INPUTS]
    places = {id(node): ((number + 0.5) / len(inputs), 0.0) for number, node in enumerate(inputs)}
    for node in circuit.nodes:
        if node.layer is not None:
            column, height = (heads, 0.4) if node.kind == "mlp" else (node.index or 0, 0.0)
            places[id(node)] = (column + 0.5) / (heads + 1), layers.index(node.layer) + 1 + height
    return places | {id(circuit.nodes[-1]): (0.5, len(layers) + 1.6)}


def _short(node: Component) -> str:
    if node.layer is None:
        return visible(node.label).strip()
    kind = {"head": f"H{node.index}", "mlp": "MLP"}.get(node.kind, node.kind)
    return kind if node.span is None else f"{kind} at {node.span[0]}"


def circuit_tree(circuit: Circuit) -> Tree:
    """Return what flows into the target as a tree: the largest edges, and what flows into their sources.

    Each node is expanded once, where it is nearest to the target.
    """
    title = f"{visible(circuit.target)} = {signed(circuit.value)}"
    tree = Tree(Text.assemble((title, "bold"), f", {circuit.rule}"))
    open_nodes, followed = [(tree, len(circuit.nodes) - 1, 0)], set()
    while open_nodes:  # breadth first, so that each node is expanded where it is nearest to the target
        branch, reader, depth = open_nodes.pop(0)
        if reader in followed or depth == DEPTH:
            continue
        followed.add(reader)
        entering = circuit.edges[:, :, reader].flatten()  # [path * from]
        order = entering.abs().sort(descending=True, stable=True).indices[:BRANCHES].tolist()
        for path, source in (divmod(index, len(circuit.nodes)) for index in order):
            score = float(circuit.edges[path, source, reader])
            if abs(score) >= SMALLEST * abs(circuit.value):
                line = _line(circuit, circuit.nodes[source], path, score)
                open_nodes.append((branch.add(line), source, depth + 1))
    return tree


def _line(circuit: Circuit, node: Component, path: int, score: float) -> Text:
    name = visible(node.label).strip()
    if node.kind == "token" and node.span is not None:
        name += f" ({node.span[0]})"
    by = f", by {circuit.paths[path]}" if path else ""
    return Text.assemble((signed(score), "blue" if score > 0 else "red"), f"  {name}{by}")
