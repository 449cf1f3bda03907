"""A circuit: nodes, the edges between them, and pruning, comparing and averaging these."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.results.circuit_edges import CircuitComparison, Edge, overlap
from depass_lightning.results.component import Component, from_columns, to_columns
from depass_lightning.results.score_file import read_result, write_result

if TYPE_CHECKING:
    import networkx
    from matplotlib.figure import Figure

INPUTS = ("token", "embedding", "bias")  # nodes that nothing enters


@dataclass(eq=False)
class Circuit:
    """How a target's value is computed: the score of every node of a model, and of every edge between two.

    The edges that leave a node sum to its score. Under a complete rule (half, taylor, shap) so do those that
    enter a head, an MLP or the target, including the bias node's.

    Attributes:
        nodes: tokens, the bias, each block's heads and its MLP, and, last, the target.
        edges: for each path, what each node contributes directly through each other node; float32, on the
            CPU.
        scores: the total contribution of each node; the target's is the sum of what enters it.
        value: the model's value of the target.
        target: the target in words.
        text: the prompt, or "".
        tokens: the text of the token at each position.
        token_ids: the id at each position.
        rule: the linear rule.
        position: the position at which the target was read.
        paths: the name of each path.
        prompts: the number of prompts in the mean.
        difference: with a corrupted prompt, the circuit of the difference between what each node writes on
            the two prompts, through the frozen maps of this one. What enters a node need not sum to its
            score.
        notes: what nodes promote, by label (`logit_lens.describe_nodes`).
        patterns: heads' attention probabilities `[query][key]`, by label.
        metadata: anything else worth keeping; JSON must be able to hold it.
    """

    nodes: list[Component]
    edges: Float[Tensor, "path from to"]
    scores: Float[Tensor, " node"]
    value: float
    target: str
    text: str
    tokens: list[str]
    token_ids: list[int]
    rule: str
    position: int
    paths: list[str] = field(default_factory=lambda: ["value"])
    prompts: int = 1
    difference: "Circuit | None" = None
    notes: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, list[list[float]]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edges = torch.as_tensor(self.edges).detach().to("cpu", torch.float32)
        self.scores = torch.as_tensor(self.scores).detach().to("cpu", torch.float32)
        count, paths = len(self.nodes), len(self.paths)
        if self.edges.shape != (paths, count, count) or self.scores.shape != (count,):
            raise DePassError(
                f"{count} nodes and {paths} paths need edges of shape {(paths, count, count)} and {count} "
                f"scores; got {tuple(self.edges.shape)} and {tuple(self.scores.shape)}"
            )

    def __repr__(self) -> str:
        top = ", ".join(
            f"{edge.source.label!r} → {edge.reader.label!r} {edge.score:+.3g}" for edge in self.top(3)
        )
        return (
            f"Circuit(target={self.target}, value={self.value:.4g}, {len(self.nodes)} nodes, "
            f"{self.edge_count} edges, rule={self.rule!r}, top: {top or 'none'})"
        )

    @property
    def edge_count(self) -> int:
        """The number of edges that are not zero."""
        return int(self.edges.count_nonzero())

    @property
    def completeness(self) -> float:
        """The largest relative error of a sum of edges.

        The error is the difference between the sum of the edges that leave or enter a node and its score (for
        the target, its value), relative to the largest score.
        """
        total, scores = self.edges.double().sum(0), self.scores.double()
        scores[-1] = self.value
        computed = [i for i, node in enumerate(self.nodes) if node.kind not in INPUTS]
        leaving, entering = (total.sum(1) - scores)[:-1], (total.sum(0) - scores)[computed]
        scale = float(scores.abs().max()) or 1.0
        return float(torch.cat([leaving, entering]).abs().max()) / scale

    def node(self, label: str) -> int:
        """Return the index of the first node with a label, such as "layer 3 head 2".

        Args:
            label: the label.

        Raises:
            DePassError: there is no such node.
        """
        for index, node in enumerate(self.nodes):
            if node.label == label:
                return index
        raise DePassError(f"no node is labelled {label!r}; nodes are labelled like {self.nodes[-2].label!r}")

    def edge(self, source: str | int, reader: str | int) -> float:
        """Return what one node contributes directly through another, summed over paths.

        Args:
            source: the label or the index of the node that writes.
            reader: the label or the index of the node that reads.

        Raises:
            DePassError: there is no such node.
        """
        start, end = (node if isinstance(node, int) else self.node(node) for node in (source, reader))
        return float(self.edges[:, start, end].sum())

    def top(self, edges: int = 200) -> list[Edge]:
        """Return the edges with the largest scores by absolute value, the largest first.

        Args:
            edges: the largest number of edges.
        """
        return [self._edge(index) for index in self._largest(edges)]

    def _largest(self, edges: int) -> list[int]:
        """Return the indices of the largest edges in the flattened tensor of edges."""
        flat = self.edges.flatten()
        order = flat.abs().sort(descending=True, stable=True).indices[: max(edges, 0)]
        return order[flat[order] != 0].tolist()

    def _edge(self, index: int) -> Edge:
        path, pair = divmod(index, len(self.nodes) ** 2)
        start, end = divmod(pair, len(self.nodes))
        score = float(self.edges[path, start, end])
        return Edge(self.nodes[start], self.nodes[end], self.paths[path], score)

    def prune(self, threshold: float | None = None, edges: int | None = None) -> "Circuit":
        """Return the circuit with the largest edges alone, and of these only those that reach the target.

        The nodes' scores are not changed: they remain sums over all edges.

        Args:
            threshold: the smallest absolute score of an edge that is kept, as a fraction of the value's.
            edges: the maximum number of edges, instead of a threshold.

        Raises:
            DePassError: not exactly one of the two is given, or it is negative.
        """
        if (threshold is None) == (edges is None) or (edges or threshold or 0) < 0:
            raise DePassError("prune takes one of threshold and edges, at least 0")
        kept = self.edges != 0
        if threshold is not None:
            kept &= self.edges.abs() >= threshold * abs(self.value)
        elif edges is not None:
            largest = torch.zeros_like(kept)
            largest.view(-1)[self._largest(edges)] = True
            kept &= largest
        kept &= self._reaching(kept.any(0))
        used = kept.any(0).any(0) | kept.any(0).any(1)
        used[-1] = True
        return replace(
            self,
            nodes=[node for node, wanted in zip(self.nodes, used.tolist(), strict=True) if wanted],
            edges=torch.where(kept, self.edges, 0)[:, used][:, :, used],
            scores=self.scores[used],
            difference=None,
        )

    def _reaching(self, kept: Bool[Tensor, "from to"]) -> Bool[Tensor, "node"]:
        """Which nodes reach the target. Edges lead to later nodes, so the last nodes are resolved first."""
        reaching = torch.zeros(len(self.nodes), dtype=torch.bool)
        reaching[-1] = True
        for node in range(len(self.nodes) - 2, -1, -1):
            reaching[node] = bool((kept[node] & reaching).any())
        return reaching

    def compare(self, other: "Circuit", edges: int = 200) -> CircuitComparison:
        """Compare with another circuit over the same nodes.

        Args:
            other: the other circuit, such as that of a later checkpoint.
            edges: how many of the largest edges of each are compared.

        Raises:
            DePassError: the two do not have the same nodes and paths.
        """
        if self.paths != other.paths or self.nodes[:-1] != other.nodes[:-1]:
            raise DePassError("only circuits with the same nodes and paths can be compared")
        before, after = (dict.fromkeys(circuit._largest(edges)) for circuit in (self, other))
        changes = {name: getattr(other, name) - getattr(self, name) for name in ("edges", "scores", "value")}
        return CircuitComparison(
            difference=replace(other, difference=None, **changes),
            overlap=overlap(before.keys(), after.keys()),
            appeared=[other._edge(index) for index in after if index not in before],
            vanished=[self._edge(index) for index in before if index not in after],
        )

    def merged(self, key: Callable[[Component], Component]) -> "Circuit":
        """Return the circuit with nodes merged: those that map to the same node are summed.

        Args:
            key: the node that a node is merged into.
        """
        members: dict[Component, list[int]] = {}
        for index, node in enumerate(self.nodes):
            members.setdefault(key(node), []).append(index)
        table = torch.zeros(len(members), len(self.nodes))
        for row, indices in enumerate(members.values()):
            table[row, indices] = 1
        difference = None if self.difference is None else self.difference.merged(key)
        edges, scores = table @ self.edges @ table.T, table @ self.scores
        return replace(self, nodes=list(members), edges=edges, scores=scores, difference=difference)

    def by_role(self, roles: Mapping[int, str]) -> "Circuit":
        """Return the circuit with nodes at positions of the same role summed.

        Args:
            roles: names by position, such as `{3: "S1"}`; other positions are "other".

        Raises:
            DePassError: a position does not exist.
        """
        if wrong := [place for place in roles if not 0 <= place <= self.position]:
            raise DePassError(f"a role is at position {wrong[0]}, but the target is read at {self.position}")

        def role(node: Component) -> Component:
            if node.span is None:
                return node
            name = roles.get(node.span[0], "other")
            label = name if node.kind == "token" else f"{node.label.rpartition(' at ')[0]} at {name}"
            return replace(node, label=label, span=None)

        return self.merged(role)

    @staticmethod
    def mean(circuits: Sequence["Circuit"]) -> "Circuit":
        """Return the mean of several prompts' circuits, aligned by `by_role`.

        Args:
            circuits: the circuits; a node that a circuit lacks counts as zero in it.

        Raises:
            DePassError: there are none, or their paths differ.
        """
        if not circuits or any(circuit.paths != circuits[0].paths for circuit in circuits):
            raise DePassError("a mean needs circuits of one prompt at least, all with the same paths")
        target = Component("target", "target")
        aligned = [[*circuit.nodes[:-1], target] for circuit in circuits]
        nodes = sorted(dict.fromkeys(node for names in aligned for node in names), key=_order)
        numbers = {node: number for number, node in enumerate(nodes)}
        edges, scores = torch.zeros(len(circuits[0].paths), len(nodes), len(nodes)), torch.zeros(len(nodes))
        for circuit, names in zip(circuits, aligned, strict=True):
            places = torch.tensor([numbers[node] for node in names])
            edges[:, places[:, None], places] += circuit.edges / len(circuits)
            scores[places] += circuit.scores / len(circuits)
        differences = [circuit.difference for circuit in circuits if circuit.difference is not None]
        return replace(
            circuits[0],
            nodes=nodes,
            edges=edges,
            scores=scores,
            value=sum(circuit.value for circuit in circuits) / len(circuits),
            target="the targets",
            text="",
            tokens=[node.label for node in nodes if node.kind == "token"],
            token_ids=[],
            prompts=sum(circuit.prompts for circuit in circuits),
            difference=Circuit.mean(differences) if len(differences) == len(circuits) else None,
            notes={},
            patterns={},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit to one safetensors file: edges and scores as tensors, the rest in its header.

        Args:
            path: the file, which is written whole or not at all.

        Raises:
            DePassError: `metadata` holds something that JSON cannot.
        """
        tensors = {"edges": self.edges, "scores": self.scores}
        record = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in tensors
        }
        difference = record.pop("difference")
        if difference is not None:
            record["difference_value"] = difference.value
            tensors |= {"difference_edges": difference.edges, "difference_scores": difference.scores}
        write_result(path, "circuit", tensors, record | {"nodes": to_columns(self.nodes)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read a circuit that `save` wrote.

        Args:
            path: the file.

        Raises:
            DePassError: the file is not a saved circuit, or has the format of another version.
        """
        tensors, record = read_result(path, "circuit")
        record["nodes"] = from_columns(record["nodes"])
        value = record.pop("difference_value", None)
        circuit = cls(edges=tensors["edges"], scores=tensors["scores"], **record)
        if value is not None:
            edges, scores = tensors["difference_edges"], tensors["difference_scores"]
            circuit.difference = replace(circuit, edges=edges, scores=scores, value=value)
        return circuit

    # The renderers are imported when something is drawn, as in `Attribution`.

    def show(self) -> None:
        """Print what flows into the target as a tree."""
        from rich.console import Console

        from depass_lightning.reports.circuit_page import circuit_tree

        Console().print(circuit_tree(self))

    def _repr_html_(self) -> str:
        from depass_lightning.reports.circuit_page import circuit_tree
        from depass_lightning.reports.notebook import console_html

        return console_html(circuit_tree(self))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows the circuit: one file, which needs no network.

        Args:
            path: the page's file.
        """
        from depass_lightning.reports.circuit_page import write_circuit_page

        write_circuit_page(path, self, title=f"How {self.target} is computed", subtitle=self.text)

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw the largest edges, layers upwards.

        Args:
            path: the picture's file, with the format as its ending (.png, .svg, .pdf); None writes none.
        """
        from depass_lightning.reports.circuit_page import circuit_figure
        from depass_lightning.reports.figures import save_figure

        figure = circuit_figure(self)
        if path is not None:
            save_figure(figure, path)
        return figure

    def to_networkx(self) -> "networkx.MultiDiGraph":
        """Return the circuit as a graph of networkx: a node by its index, an edge by path."""
        from depass_lightning.results.circuit_export import graph_of

        return graph_of(self)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit for other programs: GraphML, or the JSON of Neuronpedia's graph viewer.

        Prune large circuits first.

        Args:
            path: the file, which ends with .graphml or .json.

        Raises:
            DePassError: it ends with anything else.
        """
        from depass_lightning.results.circuit_export import export

        export(self, path)


def _order(node: Component) -> float:
    """Order inputs first, then the blocks, and the target last."""
    if node.kind in INPUTS:
        return -1.0 if node.kind == "bias" else -2.0
    if node.layer is None:
        return float("inf")
    return node.layer + 0.5 * (node.kind == "mlp")
