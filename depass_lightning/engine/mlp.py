"""What happens to components in a frozen MLP: they share every neuron's value (Hong et al., section 3).

1. Norm the components and take their gates, all components of a position together.
2. Share every neuron's true value by the rule.
3. Project the shares down into the rows, in place, a chunk of positions at a time.

Of a mixture of experts each works only on the positions that were routed to it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from depass_lightning.engine.frozen import Expert, FrozenMLP
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.packing import Chunk, Run
from depass_lightning.engine.parallel import ComponentParallel, ParallelRule
from depass_lightning.engine.rules import CompetingRule, Rule, Summary
from depass_lightning.engine.state import DecomposedState
from depass_lightning.models.affine import AffineMap


def propagate_mlp(state: DecomposedState, mlp: FrozenMLP, rule: Rule | ParallelRule) -> None:
    """Add each component's share of an MLP's output to it, in place."""
    state.skip_mlp(mlp)
    step = MLPStep.of(state, mlp)
    if isinstance(rule, ParallelRule):
        groups = [group for chunk in state.layout.chunks(step.limit) for group in step.pieces(chunk)]
        step.two_passes(rule.rule, groups, rule.ranks)
        state.mlp_input = None
        return
    paths = []
    if isinstance(rule, LinearPaths):
        paths = [MLPPath.of(mlp, *path) for path in linear_paths(mlp, rule, state.at_positions)]
    limit = step.limit
    for chunk in state.layout.chunks(limit):
        count = len(chunk.row_places)
        if mlp.experts is not None:
            step.among_experts(rule, chunk, paths)
        elif isinstance(rule, LinearPaths):
            for part in _parts(count, limit):
                step.add_down(chunk, part, step.through(chunk, part, paths))
        elif isinstance(rule, CompetingRule):
            if count > limit and len(chunk.places) == 1:  # one position's components do not fit
                step.two_passes(rule, step.pieces(chunk))
            else:
                step.whole(rule, chunk)
    state.mlp_input = None


def linear_paths(
    mlp: FrozenMLP, rule: LinearPaths, pick: Callable[[Tensor], Tensor] = lambda values: values
) -> list[tuple[AffineMap, Float[Tensor, "*places neuron"]]]:
    """The maps through which a linear rule reads what enters an MLP, each with its weight times its slopes.

    Args:
        mlp: the MLP.
        rule: the rule; both its weights go to the one factor of an MLP that has no second.
        pick: selects the positions of what was recorded.
    """
    neurons = pick(mlp.activations)
    gate = rule.gate if mlp.up_projection is not None else rule.gate + rule.up
    slopes = rule.slopes(pick(mlp.pre_activations), neurons)
    paths = [(mlp.gate, slopes if gate == 1 else gate * slopes)]
    if rule.up and mlp.up is not None:
        paths.append((mlp.up, rule.up * rule.slopes(pick(mlp.up_values), neurons)))
    return paths


@dataclass(frozen=True)
class MLPPath:
    """One path of a linear rule through an MLP, for components that are propagated forward.

    Args:
        linear: the map that reads what enters the MLP.
        slopes: each neuron's slope in the map's output.
        constant: the part of the map's output that biases give the bias component.
    """

    linear: AffineMap
    slopes: Float[Tensor, "places neuron"]
    constant: Float[Tensor, "neuron"] | None

    @classmethod
    def of(cls, mlp: FrozenMLP, linear: AffineMap, slopes: Tensor) -> "MLPPath":
        """One of `linear_paths`."""
        return cls(linear, slopes, mlp.norm.constant_through(linear))


@dataclass(frozen=True)
class MLPStep:
    """A frozen MLP, its values at the positions of a decomposed state, and the components that share it."""

    state: DecomposedState
    mlp: FrozenMLP
    scale: Float[Tensor, "at"]
    neurons: Float[Tensor, "at neuron"]
    constant: Float[Tensor, "neuron"] | None
    added: Float[Tensor, "at hidden"] | None

    @classmethod
    def of(cls, state: DecomposedState, mlp: FrozenMLP) -> "MLPStep":
        """Bring an MLP and components together."""
        return cls(
            state,
            mlp,
            state.at_positions(mlp.norm.scale),
            state.at_positions(mlp.activations),
            mlp.norm.constant_through(mlp.gate),
            None if mlp.bias_terms is None else state.at_positions(mlp.bias_terms),
        )

    @property
    def limit(self) -> int:
        """How many rows may go through the MLP at once."""
        hidden, neurons = self.mlp.down.weight.shape
        if self.mlp.experts is not None:
            neurons = max(expert.neurons.stop - expert.neurons.start for expert in self.mlp.experts)
        return self.state.budget.rows(2 * hidden + 2 * neurons, self.state.rows.dtype)

    def gates(self, chunk: Chunk, part: slice) -> Tensor:
        """The components' parts of the pre-activation, for some of a chunk's rows."""
        rows = self._read(chunk)[part]
        gates = self.mlp.norm(rows, self.scale[chunk.row_places[part]]) @ self.mlp.gate.weight.T
        if self.constant is not None:
            gates[_within(chunk.bias, part)] += self.constant
        return gates

    def through(self, chunk: Chunk, part: slice, paths: Sequence[MLPPath]) -> Tensor:
        """The components' parts of the neurons under a linear rule, for some of a chunk's rows."""
        places, bias = chunk.row_places[part], _within(chunk.bias, part)
        normed = self.mlp.norm(self._read(chunk)[part], self.scale[places])
        total = None
        for path in paths:
            values = normed @ path.linear.weight.T  # [row, neuron]
            if path.constant is not None:
                values[bias] += path.constant
            values.mul_(path.slopes[places])
            total = values if total is None else total.add_(values)
        assert total is not None
        return total

    def add_down(self, chunk: Chunk, part: slice, shared: Tensor) -> None:
        """Project shared neurons down into the rows."""
        rows = self.state.rows[chunk.rows.start + part.start : chunk.rows.start + part.stop]
        rows.addmm_(shared, self.mlp.down.weight.T)
        self._add_constants(chunk, part, rows)
        self.state.release_pages()

    def whole(self, rule: CompetingRule, chunk: Chunk) -> None:
        """Share the neurons of a chunk whose segments each fit."""
        everything = slice(0, len(chunk.row_places))
        gates = self.gates(chunk, everything)
        present = torch.cat([nonzero(gates[run.rows]) for run in chunk.runs])
        all_present = bool(present.all())
        neurons = self.neurons[chunk.places]
        for run in chunk.runs:
            table = gates[run.rows].unflatten(0, (run.segments.stop - run.segments.start, -1))
            live = present[run.rows].view(*table.shape[:2], 1)
            prepared, live = rule.prepare(table, live, self._at_origin(chunk.places[run.segments]))
            shares = rule.shares(prepared, live, all_present=all_present)
            torch.mul(shares, neurons[run.segments, None], out=table)
            if rule.complete and not all_present:
                self._assign_unclaimed(chunk, live.any(1)[:, 0], run.segments)
        self.add_down(chunk, everything, gates)

    def two_passes(
        self, rule: CompetingRule, groups: "list[list[_Piece]]", ranks: ComponentParallel | None = None
    ) -> None:
        """Share neurons among components that do not fit in memory, or on this rank, in two passes over them.

        The first pass finds what normalises the shares, the second writes them.

        Args:
            rule: how neurons are shared.
            groups: the components, divided into pieces that fit and grouped by their positions.
            ranks: the ranks among which the components are divided; None where all are on this one.
        """
        width, budget = self.neurons.shape[1], self.state.budget
        rows = sum(piece.rows.stop - piece.rows.start for group in groups for piece in group)
        # Gates that fit in memory are kept for the second pass.
        limit = budget.working if ranks is None else budget.components // 4
        keep = rows * width * self.neurons.itemsize <= limit
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # No two ranks give a component the same number.
        offset = 0 if ranks is None else ranks.rank * (self.state.layout.components + 1)
        normalisers: list[tuple[Summary, Tensor]] = []
        for group in groups:
            summary, any_present = None, torch.zeros_like(group[0].places, dtype=torch.bool)
            for piece in group:
                gates, present = self._prepared(rule, piece)
                part = rule.summarise(gates, present, offset + piece.rows.start)
                summary = part if summary is None else rule.merge(summary, part)
                any_present |= present.flatten(1).any(1)
                if keep:
                    kept[piece.key] = gates, present
                self.state.release_pages()
            assert summary is not None
            normalisers.append((summary, any_present))
        merged = normalisers if ranks is None else self._over_ranks(rule, groups, normalisers, ranks)
        # No row changes before the first pass is over.
        for group, (summary, any_present) in zip(groups, merged, strict=True):
            for piece in group:
                gates, present = kept.pop(piece.key) if keep else self._prepared(rule, piece)
                shares = rule.share(gates, present, summary, offset + piece.rows.start)
                shares = shares * self.neurons[piece.places][:, None]  # [segment, component, neuron]
                self.add_down(piece.chunk, piece.rows, shares.flatten(0, 1))
            if rule.complete:
                self._assign_unclaimed(group[0].chunk, any_present, group[0].segments)

    def _over_ranks(
        self,
        rule: CompetingRule,
        groups: "list[list[_Piece]]",
        normalisers: list[tuple[Summary, Tensor]],
        ranks: ComponentParallel,
    ) -> Iterator[tuple[Summary, Tensor]]:
        """Merge what normalises the shares over all ranks, and return each group's part of it."""
        # Ranks have components at different positions: the tables cover all of them, [place, 1, neuron].
        count, width = self.neurons.shape
        none = self.neurons.new_zeros(1, 1, width)
        empty = rule.summarise(none, torch.zeros_like(none[..., :1], dtype=torch.bool))
        tables = tuple(part.repeat(count, 1, 1) for part in empty)
        present = torch.zeros(count, device=none.device)
        for group in groups:
            summary, any_present = normalisers.pop(0)
            for table, part in zip(tables, summary, strict=True):
                table[group[0].places] = part
            present[group[0].places] = any_present.to(present)
        tables, present = ranks.merged(rule, tables), ranks.summed(present)
        for group in groups:
            places = group[0].places
            yield tuple(table[places] for table in tables), present[places] > 0

    def _prepared(self, rule: CompetingRule, piece: "_Piece") -> tuple[Tensor, Tensor]:
        """A piece's gates `[segment, component, neuron]`, and which of its components take part."""
        places = piece.places
        gates = self.gates(piece.chunk, piece.rows).unflatten(0, (len(places), -1))
        present = nonzero(gates.flatten(0, 1)).view(*gates.shape[:2], 1)
        return rule.prepare(gates, present, self._at_origin(places) & piece.has_first)

    def pieces(self, chunk: Chunk) -> "list[list[_Piece]]":
        """A chunk's rows in pieces that fit, grouped by their positions."""
        count, limit = len(chunk.row_places), self.limit
        if count > limit and len(chunk.places) == 1:  # one position's components do not fit
            parts = _parts(count, limit)
            return [[_Piece(chunk, part, slice(0, 1), part.start == 0) for part in parts]]
        return [[_Piece(chunk, run.rows, run.segments, True)] for run in chunk.runs]

    def among_experts(self, rule: Rule, chunk: Chunk, paths: Sequence[MLPPath]) -> None:
        """Share the neurons of a mixture of experts, of each only where it was routed to."""
        rows = self.state.rows[chunk.rows]
        added = torch.zeros_like(rows)
        for expert in self.mlp.experts or ():
            active = self.state.at_positions(expert.active)
            for run in chunk.runs:
                segments = active[chunk.places[run.segments]].nonzero()[:, 0]
                if len(segments):
                    self._expert(rule, chunk, run, expert, segments, paths, added)
        # Every expert reads what the rows were before any of them wrote.
        rows += added
        self._add_constants(chunk, slice(0, len(chunk.row_places)), rows)
        self.state.release_pages()

    def _expert(
        self,
        rule: Rule,
        chunk: Chunk,
        run: Run,
        expert: Expert,
        segments: Int[Tensor, "segment"],
        paths: Sequence[MLPPath],
        added: Float[Tensor, "row hidden"],
    ) -> None:
        """Share one expert's neurons at some segments of a run."""
        members = (run.rows.stop - run.rows.start) // (run.segments.stop - run.segments.start)
        every = torch.arange(members, device=segments.device)
        rows = (run.rows.start + segments[:, None] * members + every).flatten()
        normed = self.mlp.norm(self._read(chunk)[rows], self.scale[chunk.row_places[rows]])
        bias, places = torch.isin(rows, chunk.bias), chunk.places[run.segments][segments]

        def table(linear: AffineMap, constant: Tensor | None) -> Tensor:
            values = normed @ linear.weight[expert.neurons].T
            if constant is not None:
                values[bias] += constant[expert.neurons]
            return values.unflatten(0, (len(segments), members))  # [segment, component, neuron]

        if isinstance(rule, CompetingRule):
            gates = table(self.mlp.gate, self.constant)
            present = nonzero(gates.flatten(0, 1)).view(len(segments), members, 1)
            prepared, live = rule.prepare(gates, present, self._at_origin(places))
            shared = rule.shares(prepared, live) * self.neurons[places][:, None, expert.neurons]
            if rule.complete:
                self._assign_unclaimed(chunk, live.any(1)[:, 0], run.segments, segments, expert.neurons)
        else:
            shared = torch.zeros((), device=rows.device, dtype=normed.dtype)
            for path in paths:
                slopes = path.slopes[places][:, None, expert.neurons]
                shared = shared + table(path.linear, path.constant) * slopes
        added.index_add_(0, rows, shared.flatten(0, 1) @ self.mlp.down.weight[:, expert.neurons].T)

    def _read(self, chunk: Chunk) -> Float[Tensor, "row hidden"]:
        """A chunk's rows as the MLP reads them."""
        source = self.state.rows if self.state.mlp_input is None else self.state.mlp_input
        return source[chunk.rows]

    def _add_constants(self, chunk: Chunk, part: slice, rows: Float[Tensor, "row hidden"]) -> None:
        """Add what biases after the neurons add to the bias component."""
        if self.added is not None:
            bias = _within(chunk.bias, part)
            rows[bias] += self.added[chunk.row_places[part][bias]]

    def _at_origin(self, places: Tensor) -> Bool[Tensor, "segment"]:
        """Which segments are a prompt's first position."""
        return self.state.positions.flatten()[places] == 0

    def _assign_unclaimed(
        self,
        chunk: Chunk,
        any_present: Bool[Tensor, "segment"],
        run: slice,
        segments: Tensor | slice = slice(None),
        neurons: slice = slice(None),
    ) -> None:
        """Give a position's whole output of some neurons to one component where none competes for it."""
        if not bool(any_present.all()):
            rows, places = chunk.fallback[run][segments], chunk.places[run][segments]
            # The component may be on another rank.
            unclaimed = ~any_present & (rows < self.state.layout.rows)
            rows, places = rows[unclaimed], places[unclaimed]
            output = self.neurons[places][:, neurons] @ self.mlp.down.weight[:, neurons].T
            self.state.rows.index_add_(0, rows, output)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a chunk that fit in memory together.

    Args:
        chunk: the chunk.
        rows: the rows, counted from the chunk's start.
        segments: their segments, counted from the chunk's first.
        has_first: the rows include the first component of each segment.
    """

    chunk: Chunk
    rows: slice
    segments: slice
    has_first: bool

    @property
    def key(self) -> tuple[int, int]:
        """A key that no other piece has."""
        return self.chunk.rows.start, self.rows.start

    @property
    def places(self) -> Int[Tensor, "segment"]:
        """The flat `batch * position` index of each segment."""
        return self.chunk.places[self.segments]


def nonzero(gates: Float[Tensor, "row neuron"]) -> Bool[Tensor, "row 1"]:
    """Which components are not exactly zero (and, for the bias component, have no gate bias)."""
    return gates.abs().amax(1, keepdim=True) != 0


def _within(rows: Tensor, part: slice) -> Tensor:
    """Those of the row numbers that lie in a part, counted from its start."""
    return rows[(rows >= part.start) & (rows < part.stop)] - part.start


def _parts(count: int, limit: int) -> list[slice]:
    """Divide `count` rows into parts of at most `limit`."""
    return [slice(first, min(first + limit, count)) for first in range(0, count, limit)]
