"""What happens to components in a frozen MLP: they share every neuron's value (Hong et al., section 3).

1. Norm the components and take their gates, all components of a position together.
2. Share every neuron's true value by the rule.
3. Project the shares down into the rows, in place, a chunk of positions at a time.

Of a mixture of experts each works only on the positions that were routed to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from depass_lightning.engine.frozen import Expert, FrozenMLP
from depass_lightning.engine.packing import Chunk, Run
from depass_lightning.engine.parallel import ParallelRule
from depass_lightning.engine.rules import CompetingRule, Rule, Summary, TaylorRule
from depass_lightning.engine.state import DecomposedState


def propagate_mlp(carry: DecomposedState, mlp: FrozenMLP, rule: Rule | ParallelRule) -> None:
    """Add each component's share of an MLP's output to it.

    Args:
        carry: the components, changed in place.
        mlp: the MLP.
        rule: how neurons are shared.
    """
    sharing = MLPStep.of(carry, mlp)
    if isinstance(rule, ParallelRule):
        sharing.among_processes(rule)
        carry.mlp_input = None
        return
    slopes = None
    if isinstance(rule, TaylorRule):
        slopes = rule.slopes(carry.at_positions(mlp.pre_activations), sharing.neurons)
    limit = sharing.limit
    for chunk in carry.layout.chunks(limit):
        count = len(chunk.row_places)
        if mlp.experts is not None:
            sharing.among_experts(rule, chunk, slopes)
        elif slopes is not None:
            for part in _parts(count, limit):
                gates = sharing.gates(chunk, part)
                sharing.add_down(chunk, part, gates.mul_(slopes[chunk.row_places[part]]))
        elif isinstance(rule, CompetingRule):
            if count > limit and len(chunk.places) == 1:  # one position alone is too large
                sharing.in_parts(rule, chunk)
            else:
                sharing.whole(rule, chunk)
    carry.mlp_input = None


@dataclass(frozen=True)
class MLPStep:
    """A frozen MLP, what of it stands at a carry's positions, flattened, and the components that share it."""

    carry: DecomposedState
    mlp: FrozenMLP
    scale: Float[Tensor, "at"]
    neurons: Float[Tensor, "at neuron"]
    constant: Float[Tensor, "neuron"] | None
    added: Float[Tensor, "at hidden"] | None

    @classmethod
    def of(cls, carry: DecomposedState, mlp: FrozenMLP) -> "MLPStep":
        """Bring an MLP and components together.

        Args:
            carry: the components.
            mlp: the MLP.
        """
        return cls(
            carry,
            mlp,
            carry.at_positions(mlp.norm.scale),
            carry.at_positions(mlp.activations),
            mlp.norm.constant_through(mlp.gate),
            None if mlp.bias_terms is None else carry.at_positions(mlp.bias_terms),
        )

    @property
    def limit(self) -> int:
        """How many rows may go through the MLP at once."""
        hidden, neurons = self.mlp.down.weight.shape
        if self.mlp.experts is not None:
            neurons = max(own.neurons.stop - own.neurons.start for own in self.mlp.experts)
        return self.carry.budget.rows(2 * hidden + 2 * neurons, self.carry.rows.dtype)

    def gates(self, chunk: Chunk, part: slice) -> Tensor:
        """The components' parts of the pre-activation, for some of a chunk's rows."""
        rows = self._read(chunk)[part]
        gates = self.mlp.norm(rows, self.scale[chunk.row_places[part]]) @ self.mlp.gate.weight.T
        if self.constant is not None:
            gates[_within(chunk.bias, part)] += self.constant
        return gates

    def add_down(self, chunk: Chunk, part: slice, shared: Tensor) -> None:
        """Project shared neurons down into the rows."""
        rows = self.carry.rows[chunk.rows.start + part.start : chunk.rows.start + part.stop]
        rows.addmm_(shared, self.mlp.down.weight.T)
        self._add_constants(chunk, part, rows)
        self.carry.release_pages()

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

    def in_parts(self, rule: CompetingRule, chunk: Chunk) -> None:
        """Share one position's neurons among more components than fit at once: twice over them, in parts."""
        count, limit = len(chunk.row_places), self.limit
        neurons = self.neurons[chunk.places]
        # Gates that fit by themselves are kept for the second time.
        keep = count <= self.carry.budget.rows(neurons.shape[1], neurons.dtype)
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def table(part: slice) -> tuple[Tensor, Tensor]:
            if part.start in kept:
                return kept.pop(part.start)
            gates = self.gates(chunk, part)
            at_origin = self._at_origin(chunk.places) & (part.start == 0)
            return rule.prepare(gates[None], nonzero(gates)[None], at_origin)

        summary, any_present = None, torch.zeros_like(chunk.places, dtype=torch.bool)
        for part in _parts(count, limit):
            gates, present = table(part)
            own = rule.summarise(gates, present, part.start)
            summary = own if summary is None else rule.merge(summary, own)
            any_present |= present.any()
            if keep:
                kept[part.start] = gates, present
            self.carry.release_pages()
        assert summary is not None
        # The first time is over before any row changes.
        for part in _parts(count, limit):
            gates, present = table(part)
            self.add_down(chunk, part, rule.share(gates, present, summary, part.start)[0] * neurons)
        if rule.complete:
            self._assign_unclaimed(chunk, any_present, slice(None))

    def among_processes(self, rule: ParallelRule) -> None:
        """Share the neurons among components that are spread over processes: twice over this one's.

        Args:
            rule: the rule and the processes.
        """
        competing, layout = rule.rule, self.carry.layout
        places, width = self.neurons.shape
        offset = rule.ranks.rank * (layout.components + 1)  # no two processes number theirs alike
        none = self.neurons.new_zeros(1, 1, width)
        empty = competing.summarise(none, torch.zeros_like(none[..., :1], dtype=torch.bool))
        summary = tuple(part.repeat(places, 1, 1) for part in empty)
        any_present = torch.zeros(places, device=none.device)
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # Gates that fit by themselves are kept for the second time.
        keep = layout.rows * width * none.itemsize <= self.carry.budget.components // 4
        for chunk, rows, at in self._pieces():
            gates = self.gates(chunk, rows).unflatten(0, (len(at), -1))
            present = nonzero(gates.flatten(0, 1)).view(len(at), -1, 1)
            own = competing.summarise(gates, present, offset + rows.start)
            merged = competing.merge(tuple(part[at] for part in summary), own)
            for part, new in zip(summary, merged, strict=True):
                part[at] = new
            any_present[at] += present.any(1)[:, 0]
            if keep:
                kept[chunk.rows.start, rows.start] = gates, present
        summary = rule.ranks.merged(competing, summary)
        any_present = rule.ranks.summed(any_present)
        self._write_shares(competing, summary, offset, kept)
        self._assign_unclaimed_everywhere(any_present)

    def _write_shares(
        self,
        rule: CompetingRule,
        summary: Summary,
        offset: int,
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]],
    ) -> None:
        """Give this process's components their shares, once what normalises them is known."""
        for chunk, rows, at in self._pieces():
            if (chunk.rows.start, rows.start) in kept:
                gates, present = kept.pop((chunk.rows.start, rows.start))
            else:
                gates = self.gates(chunk, rows).unflatten(0, (len(at), -1))
                present = nonzero(gates.flatten(0, 1)).view(len(at), -1, 1)
            shares = rule.share(gates, present, tuple(part[at] for part in summary), offset + rows.start)
            self.add_down(chunk, rows, (shares * self.neurons[at][:, None]).flatten(0, 1))

    def _pieces(self) -> Iterator[tuple[Chunk, slice, Tensor]]:
        """This carry's rows in pieces that fit: the chunk, the rows in it, and the places they stand at."""
        limit = self.limit
        for chunk in self.carry.layout.chunks(limit):
            if len(chunk.row_places) > limit and len(chunk.places) == 1:
                yield from ((chunk, part, chunk.places) for part in _parts(len(chunk.row_places), limit))
            else:
                yield from ((chunk, run.rows, chunk.places[run.segments]) for run in chunk.runs)

    def _assign_unclaimed_everywhere(self, any_present: Tensor) -> None:
        """Give a place's whole output to one component where none competes for it, if that lives here."""
        layout = self.carry.layout
        rows = layout.index[:, :, layout.fallback].flatten().to(any_present.device)
        here = (any_present == 0) & (rows < layout.rows)
        if bool(here.any()):
            output = self.neurons[here] @ self.mlp.down.weight.T
            self.carry.rows.index_add_(0, rows[here], output)

    def among_experts(self, rule: Rule, chunk: Chunk, slopes: Float[Tensor, "at neuron"] | None) -> None:
        """Share the neurons of a mixture of experts, of each only where it was routed to.

        Args:
            rule: how neurons are shared.
            chunk: the chunk.
            slopes: of a linear rule.
        """
        rows = self.carry.rows[chunk.rows]
        added = torch.zeros_like(rows)
        for expert in self.mlp.experts or ():
            active = self.carry.at_positions(expert.active)
            for run in chunk.runs:
                segments = active[chunk.places[run.segments]].nonzero()[:, 0]
                if len(segments):
                    self._expert(rule, chunk, run, expert, segments, slopes, added)
        # Every expert reads what the rows were before any of them wrote.
        rows += added
        self._add_constants(chunk, slice(0, len(chunk.row_places)), rows)
        self.carry.release_pages()

    def _expert(
        self,
        rule: Rule,
        chunk: Chunk,
        run: Run,
        expert: Expert,
        segments: Int[Tensor, "segment"],
        slopes: Float[Tensor, "at neuron"] | None,
        added: Float[Tensor, "row hidden"],
    ) -> None:
        """Share one expert's neurons at some segments of a run."""
        members = (run.rows.stop - run.rows.start) // (run.segments.stop - run.segments.start)
        every = torch.arange(members, device=segments.device)
        rows = (run.rows.start + segments[:, None] * members + every).flatten()
        gate, down = self.mlp.gate.weight[expert.neurons], self.mlp.down.weight[:, expert.neurons]
        gates = self.mlp.norm(self._read(chunk)[rows], self.scale[chunk.row_places[rows]]) @ gate.T
        if self.constant is not None:
            gates[torch.isin(rows, chunk.bias)] += self.constant[expert.neurons]
        at = chunk.places[run.segments][segments]
        table = gates.unflatten(0, (len(segments), members))
        if slopes is not None:
            shared = table * slopes[at][:, None, expert.neurons]
        else:
            assert isinstance(rule, CompetingRule)
            present = nonzero(gates).view(len(segments), members, 1)
            prepared, live = rule.prepare(table, present, self._at_origin(at))
            shared = rule.shares(prepared, live) * self.neurons[at][:, None, expert.neurons]
            if rule.complete:
                self._assign_unclaimed(chunk, live.any(1)[:, 0], run.segments, segments, expert.neurons)
        added.index_add_(0, rows, shared.flatten(0, 1) @ down.T)

    def _read(self, chunk: Chunk) -> Float[Tensor, "row hidden"]:
        """A chunk's rows as the MLP reads them."""
        source = self.carry.rows if self.carry.mlp_input is None else self.carry.mlp_input
        return source[chunk.rows]

    def _add_constants(self, chunk: Chunk, part: slice, rows: Float[Tensor, "row hidden"]) -> None:
        """Add what biases behind the neurons add to the bias component."""
        if self.added is not None:
            bias = _within(chunk.bias, part)
            rows[bias] += self.added[chunk.row_places[part][bias]]

    def _at_origin(self, at: Tensor) -> Bool[Tensor, "segment"]:
        """Which segments are a prompt's first position."""
        return self.carry.positions.flatten()[at] == 0

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
            rows, at = chunk.fallback[run][segments][~any_present], chunk.places[run][segments][~any_present]
            output = self.neurons[at][:, neurons] @ self.mlp.down.weight[:, neurons].T
            self.carry.rows.index_add_(0, rows, output)


def nonzero(gates: Float[Tensor, "row neuron"]) -> Bool[Tensor, "row 1"]:
    """Which components are not exactly zero (and, for the bias component, have no gate bias)."""
    return gates.abs().amax(1, keepdim=True) != 0


def _within(rows: Tensor, part: slice) -> Tensor:
    """Those of the row numbers that lie in a part, counted from its start."""
    return rows[(rows >= part.start) & (rows < part.stop)] - part.start


def _parts(count: int, limit: int) -> list[slice]:
    """So many rows, in parts of at most so many."""
    return [slice(first, min(first + limit, count)) for first in range(0, count, limit)]
