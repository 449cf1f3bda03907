"""All edges between the nodes of a frozen pass, from one backward pass.

Under a linear rule the frozen pass is linear. Let `F_v` be the linear map from the residual stream to what
node `v` (a head, an MLP, the target) writes, and `g_v` the target's derivative with respect to what `v`
writes. What node `u`, which writes `o_u`, contributes to the target directly through `v` is

    edge(u, v) = (F_v^T g_v) . o_u

The residual stream is the sum of what is written to it, so the edges that leave a node sum to its score. If
the rule is complete, so do those that enter it, including the bias node's for its constants.

1. Propagate the target's derivative back block by block (`engine/adjoint.py`), keeping each `F_v^T g_v`.
2. Multiply what a block's nodes write by these, for all later nodes in one product.
3. If they no longer fit in memory, compute the edges from all earlier blocks for those kept, drop them, and
   continue.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.engine.adjoint import BlockGradients, TargetGradient, backward
from depass_lightning.engine.control import through_scores_in_parts
from depass_lightning.engine.frozen import FrozenAttention, FrozenBlock, FrozenMLP
from depass_lightning.engine.isolation import exact
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.mixture import DenseMixture, Mixture
from depass_lightning.engine.mlp import linear_paths
from depass_lightning.engine.norms import FrozenNorm
from depass_lightning.engine.record import Recording
from depass_lightning.engine.score_path import Side

PATHS = ("value", "query", "key")


@dataclass(frozen=True)
class FlowLayout:
    """The numbers of the nodes: tokens, the bias, each block's heads and its MLP, the target.

    Args:
        positions: the number of tokens.
        heads: of each block before the target.
        by_position: heads and MLPs have a node at each position, numbered in sequence.
        paths: the number of separate paths into a head, in the order of `PATHS`.
    """

    positions: int
    heads: tuple[int, ...]
    by_position: bool
    paths: int

    @property
    def places(self) -> int:
        """The number of nodes of one head or MLP."""
        return self.positions if self.by_position else 1

    @property
    def bias(self) -> int:
        """The number of the bias node."""
        return self.positions

    @property
    def target(self) -> int:
        """The number of the target, the last node."""
        return self.heads_of(len(self.heads))

    def heads_of(self, block: int) -> int:
        """Return the number of a block's first head."""
        return self.positions + 1 + sum(count + 1 for count in self.heads[:block]) * self.places

    def mlp_of(self, block: int) -> int:
        """Return the number of a block's MLP, at the first position."""
        return self.heads_of(block) + self.heads[block] * self.places


@dataclass(frozen=True)
class Flow:
    """The edges and scores of a prompt's nodes.

    Args:
        edges: what each node contributes directly through each other node.
        scores: each node's score. The first run is the explained one, a second one the corrupted one.
    """

    edges: Float[Tensor, "run path from to"]
    scores: Float[Tensor, "run node"]


def flow(
    recordings: Sequence[Recording],
    rule: LinearPaths,
    gradient: TargetGradient,
    layer: int,
    layout: FlowLayout,
    limit: int,
) -> Flow:
    """Compute all edges between the nodes before a target.

    Args:
        recordings: that of the prompt; with a second one, of a prompt of the same length, edges are also
            computed for what nodes write there, through the frozen maps of the first.
        rule: the linear rule.
        gradient: the target's derivative where it is read.
        layer: the block whose input it is read from.
        layout: the nodes.
        limit: how many readers are held in memory; for more, several sweeps are made.
    """
    with exact(gradient.states.device):
        return _Sweep(recordings, rule, layout, limit)(gradient, layer)


@dataclass(frozen=True)
class _Readers:
    """What nodes read of the residual stream at one point, as derivatives of the target through each node."""

    states: Float[Tensor, "reader position hidden"]
    nodes: Int[Tensor, "reader"]
    paths: Int[Tensor, "reader"]

    def joined(self, others: Sequence["_Readers"]) -> "_Readers":
        """Append other readers of the same point."""
        every = (self, *others)
        return _Readers(
            torch.cat([reader.states for reader in every]),
            torch.cat([reader.nodes for reader in every]),
            torch.cat([reader.paths for reader in every]),
        )

    def before(self, skip: FrozenNorm | None) -> "_Readers":
        """Move them to before a sublayer, through a norm on the residual stream if there is one."""
        return self if skip is None else replace(self, states=skip.transposed(self.states, skip.scale))


class _Sweep:
    """One computation of a flow."""

    def __init__(
        self, recordings: Sequence[Recording], rule: LinearPaths, layout: FlowLayout, limit: int
    ) -> None:
        self.recordings, self.rule, self.layout, self.limit = recordings, rule, layout, limit
        like = recordings[0].final_state
        runs, nodes = len(recordings), layout.target + 1
        self.edges = like.new_zeros(runs, layout.paths, nodes, nodes)
        self.scores = like.new_zeros(runs, nodes)

    def __call__(self, gradient: TargetGradient, layer: int) -> Flow:
        layout, recording = self.layout, self.recordings[0]
        self.edges[:, 0, layout.bias, layout.target] = gradient.constants
        readers = self._readers(gradient.states, layout.target, 0)
        entry = gradient.states
        for (gradients,) in backward(recording, self.rule, [gradient], layer=layer, first=0):
            index = gradients.block.index
            blocks = [gradients.block, *(other.block(index) for other in self.recordings[1:])]
            readers = self._past(blocks, readers, gradients)
            if len(readers.nodes) > self.limit and index:
                self._finish(readers, index)
                readers = _Readers(readers.states[:0], readers.nodes[:0], readers.paths[:0])
            entry = gradients.resid_pre.states
        self._finish(readers, 0)
        embedded = torch.cat([other.state(0) for other in self.recordings])  # [run, position, hidden]
        self.scores[:, : layout.positions] = (embedded * entry).sum(2)
        self.scores[:, layout.bias] = self.edges[:, :, layout.bias].sum((1, 2))
        self.scores[:, layout.target] = self.edges[:, :, :, layout.target].sum((1, 2))
        return Flow(self.edges, self.scores)

    def _finish(self, readers: _Readers, index: int) -> None:
        """Multiply readers before a block by everything that is written before it."""
        for lower in range(index - 1, -1, -1):
            readers = self._past([recording.block(lower) for recording in self.recordings], readers)
        embedded = torch.cat([recording.state(0) for recording in self.recordings])
        products = torch.einsum("snd,rnd->snr", embedded, readers.states)
        self.edges[:, readers.paths, : self.layout.positions, readers.nodes] += products.permute(2, 0, 1)

    def _past(
        self, blocks: Sequence[FrozenBlock], readers: _Readers, gradients: BlockGradients | None = None
    ) -> _Readers:
        """Move readers to before a block, adding its nodes' edges; with gradients, add its readers."""
        block, layout = blocks[0], self.layout
        index, mlps = block.index, []
        written = torch.cat([block.mlp.activations @ block.mlp.down.weight.T for block in blocks])
        self._write(layout.mlp_of(index), written[:, None], readers)
        self._write_bias([block.mlp.bias_terms for block in blocks], readers)
        readers = readers.before(block.mlp.skip)
        if gradients is not None:
            states, constants = self._through_mlp(block.mlp, gradients)
            mlps = [self._added(states, constants, layout.mlp_of(index), 0)]
            self._score(layout.mlp_of(index), [block.mlp.activations for block in blocks], gradients)
        if not block.parallel:
            readers = readers.joined(mlps)
        values = [_head_values(block) for block in blocks]
        written = torch.cat([block.attention.head_outputs(value) for value in values])
        self._write(layout.heads_of(index), written, readers)
        self._write_bias([block.attention.bias_terms for block in blocks], readers)
        readers = readers.before(block.attention.skip)
        if block.parallel:
            readers = readers.joined(mlps)
        if gradients is None:
            return readers
        self._score(layout.heads_of(index), values, gradients)
        heads = [
            self._added(states, constants, layout.heads_of(index), path)
            for path, states, constants in self._through_heads(block.attention, gradients)
        ]
        return readers.joined(heads)

    def _readers(self, states: Tensor, first: int, path: int) -> _Readers:
        nodes = torch.arange(first, first + len(states), device=states.device)
        return _Readers(states, nodes, torch.full_like(nodes, path))

    def _added(self, states: Tensor, constants: Tensor, first: int, path: int) -> _Readers:
        """Return a sublayer's nodes as readers, and add their constants to the bias node's edges."""
        readers = self._readers(states, first, path)
        self.edges[:, path, self.layout.bias, readers.nodes] += constants
        return readers

    def _write(
        self, first: int, written: Float[Tensor, "run unit position hidden"], readers: _Readers
    ) -> None:
        """Multiply what nodes of one kind write by all readers."""
        if self.layout.by_position:  # [run, unit * position, reader]
            products = torch.einsum("sund,rnd->sunr", written, readers.states).flatten(1, 2)
        else:
            products = written.flatten(2) @ readers.states.flatten(1).T
        rows = slice(first, first + products.shape[1])
        self.edges[:, readers.paths, rows, readers.nodes] += products.permute(2, 0, 1)

    def _write_bias(self, terms: Sequence[Tensor | None], readers: _Readers) -> None:
        for run, term in enumerate(terms):
            if term is not None:
                products = readers.states.flatten(1) @ term.flatten()
                self.edges[run, readers.paths, self.layout.bias, readers.nodes] += products

    def _score(self, first: int, values: Sequence[Tensor], gradients: BlockGradients) -> None:
        """Score a sublayer's nodes: their values times the target's derivatives with respect to these."""
        for run, value in enumerate(values):
            of_heads = value.ndim == 4
            products = (value * (gradients.heads if of_heads else gradients.activations)).sum(-1)[0]
            scores = products.T if of_heads else products[None]  # [unit, position]
            if not self.layout.by_position:
                scores = scores.sum(1)
            self.scores[run, first : first + scores.numel()] = scores.flatten()

    def _through_mlp(self, mlp: FrozenMLP, gradients: BlockGradients) -> tuple[Tensor, Tensor]:
        """Return what an MLP's nodes read, `[node, position, hidden]`, and what is constant in them."""
        states = torch.zeros_like(gradients.resid_post.states)
        constants = states.new_zeros(states.shape[:2])
        for linear, slopes in linear_paths(mlp, self.rule.for_block(gradients.block.index)):
            derivative = gradients.activations * slopes
            states = states + derivative @ linear.weight
            added = mlp.norm.constant_through(linear)
            if added is not None:
                constants = constants + derivative @ added
        states = mlp.norm.transposed(states, mlp.norm.scale)
        if not self.layout.by_position:
            return states, constants.sum(1)
        return _diagonal(states), constants[0]

    def _through_heads(
        self, attention: FrozenAttention, gradients: BlockGradients
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield by path what the heads' nodes read, `[node, position, hidden]`, and what is constant."""
        paths = self.rule.for_block(gradients.block.index)
        mixture = attention.mixture
        if attention.has_scores:  # a linear mixer has no control path, only values
            uniform = None
            if paths.control:
                for path, states, constants, even in self._through_scores(attention, paths, gradients):
                    yield path, states, constants
                    uniform = even
            if paths.value != 1:
                mixture = mixture.weighted(paths.value, paths.uniform, uniform)
        mixture = DenseMixture(mixture.whole())
        states, constants = [], []
        for query in range(self.layout.places):
            heads = gradients.heads
            if self.layout.by_position:
                heads = torch.zeros_like(heads)
                heads[:, query] = gradients.heads[:, query]
            of_query, constant = _through_values(attention, heads, mixture)
            states.append(of_query)
            constants.append(constant)
        yield 0, torch.stack(states, 1).flatten(0, 1), torch.stack(constants, 1).flatten()

    def _through_scores(
        self, attention: FrozenAttention, paths: LinearPaths, gradients: BlockGradients
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Yield what the heads read through queries, then through keys, and the even mixture."""
        count, norm = attention.heads, attention.call.norm
        parts = torch.eye(count, device=gradients.heads.device)[:, None, None]  # [head, 1, 1, head]
        if self.layout.by_position:  # [head * query, 1, query, head]
            positions = torch.eye(self.layout.positions, device=parts.device)[None, :, None, :, None]
            parts = (parts[:, None] * positions).flatten(0, 1)
        output = paths.control * gradients.resid_mid.states
        mean = paths.uniform > 0
        sides: tuple[Side, ...] = ("query", "key")
        for path, side in enumerate(sides, start=1):
            parts_back = through_scores_in_parts(
                self.recordings[0].decoder, attention, output, list(parts), side, mean=mean
            )
            normed = torch.cat([gradient.normed for gradient in parts_back])  # [node, position, hidden]
            constants = torch.cat([gradient.constants for gradient in parts_back])
            if norm.probe.bias is not None:
                constants = constants + normed.sum(1) @ norm.probe.bias
            yield path, norm.transposed(normed, norm.scale), constants, parts_back[0].uniform


def _head_values(block: FrozenBlock) -> Float[Tensor, "1 position head size"]:
    """Each head's mixed values, which the output map reads, including value biases."""
    values, constants = block.attention.head_values(block.resid_pre)
    return values if constants is None else values + constants


def _through_values(
    attention: FrozenAttention, heads: Float[Tensor, "1 position head size"], mixture: Mixture
) -> tuple[Float[Tensor, "head position hidden"], Float[Tensor, "head"]]:
    """Propagate each head's derivative separately back through its values; also return their constants.

    The heads of a group share their values, so those of one group are computed one after another.
    """
    groups = attention.key_value_heads
    members = attention.heads // groups
    weight = attention.value.weight.unflatten(0, (groups, -1))  # [group, size, hidden]
    added = attention.norm.constant_through(attention.value)
    states, constants = [], []
    for member in range(members):
        alone = torch.zeros_like(heads)
        alone[:, :, member::members] = heads[:, :, member::members]
        values = attention.transposed(alone[None], mixture)[0, 0].unflatten(1, (groups, -1))
        states.append(torch.einsum("ngc,gcd->gnd", values, weight))
        if added is not None:
            constants.append((values * added.unflatten(0, (groups, -1))).sum((0, 2)))
    # [group, member, ...] is the heads' order
    read = attention.norm.transposed(torch.stack(states, 1).flatten(0, 1), attention.norm.scale)
    if not constants:
        return read, read.new_zeros(len(read))
    return read, torch.stack(constants, 1).flatten()


def _diagonal(states: Float[Tensor, "1 position hidden"]) -> Float[Tensor, "position position hidden"]:
    """Return a row for each position that is zero at all other positions."""
    places = torch.arange(states.shape[1], device=states.device)
    rows = states.new_zeros(len(places), *states.shape[1:])
    rows[places, places] = states[0]
    return rows
