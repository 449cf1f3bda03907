"""Carry components through frozen blocks (Hong et al., section 3; the steps of `docs/method.md`).

For every block, with everything that was recorded held fixed:

1. attention, which is linear: norm the components, take values, mix them with the probabilities, project out;
2. the MLP: norm the components, take their gates, share every neuron's value by the rule, project down.

Values are mixed before they are projected out, so nothing of size heads x hidden is built, and both steps
write into the packed rows in place: attention reads one component at all its positions, the MLP all
components at one position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.engine.frozen import FrozenAttention, FrozenMLP, FrozenNorm
from depass_lightning.engine.layout import Chunk, ComponentBlock, Layout
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import CompetingRule, Rule, Taylor


@dataclass
class Carry:
    """The components of a batch somewhere on their way through the model.

    Args:
        layout: where each component's rows are.
        rows: `[row + 1, hidden]`; the last row is zero and stands for every component that does not live.
        positions: `[batch, position]` which of the prompt's positions the layout's positions are.
        budget: how much working memory a step may take.
    """

    layout: Layout
    rows: Float[Tensor, "row hidden"]
    positions: Int[Tensor, "batch position"]
    budget: Budget

    def dense(self) -> Float[Tensor, "batch component position hidden"]:
        """All components at all positions, zeros included."""
        return self.rows[self.layout.index.to(self.rows.device)].transpose(1, 2)

    def at_positions(self, values: Float[Tensor, "batch any *rest"]) -> Tensor:
        """Pick what was recorded at this carry's positions, prompts and positions flattened."""
        batch = torch.arange(len(self.positions), device=values.device)[:, None]
        return values[batch, self.positions].flatten(0, 1)

    # Attention

    def attend(self, attention: FrozenAttention) -> None:
        """Add each component's attention output to it, a block of components at a time."""
        hidden = self.rows.shape[1]
        value_width, output_width = attention.value.weight.shape[0], attention.output.weight.shape[1]
        rows = self.budget.rows(2 * (hidden + value_width + output_width), self.rows.dtype)
        scale = self.at_positions(attention.norm.scale)
        for block in self.layout.component_blocks(rows):
            self.rows.index_add_(0, block.rows, self._attention_of(attention, block, scale))

    def _attention_of(self, attention: FrozenAttention, block: ComponentBlock, scale: Tensor) -> Tensor:
        """One block's attention output, row by row."""
        heads, shared, size = attention.heads, attention.key_value_heads, attention.head_size
        batch, positions, count = block.shape
        normed = attention.norm(self.rows.index_select(0, block.rows), scale[block.at])
        values = normed @ attention.value.weight.T
        constant = attention.norm.constant_through(attention.value)
        if constant is not None:
            values[block.bias] += constant
        # One table a value head, [position, component * size]: mixing is a plain product for each head.
        table = values.new_zeros(batch, shared, positions, count, size)
        prompt, position, component = block.where
        table.permute(0, 2, 3, 1, 4)[prompt, position, component] = values.view(-1, shared, size)
        seen = attention.probabilities[:, :, block.first :, block.first :]
        seen = seen.reshape(batch, shared, -1, positions)
        mixed = (seen @ table.view(batch, shared, positions, count * size)).view(
            batch, shared, heads // shared, positions, count, size
        )
        mixed = mixed.permute(0, 3, 4, 1, 2, 5)[prompt, position, component].reshape(-1, heads * size)
        result = mixed @ attention.output.weight.T
        if attention.output.bias is not None:
            result[block.bias] += attention.output.bias
        return result

    def attend_at(self, attention: FrozenAttention, positions: Int[Tensor, "batch target"]) -> "Carry":
        """Go through attention at a few positions only, and keep nothing but these.

        The normed states are mixed before values are taken, which for few queries is far cheaper.

        Args:
            attention: the frozen attention.
            positions: `[batch, target]` the positions that are kept.
        """
        batch = torch.arange(len(positions), device=positions.device)[:, None]
        queries = attention.probabilities[batch, :, positions]
        kept = self.at(positions)
        hidden = self.rows.shape[1]
        width = len(positions) * hidden * (2 * self.layout.positions + positions.shape[1] * attention.heads)
        step = self.budget.rows(width, self.rows.dtype)
        for first in range(0, self.layout.components, step):
            components = slice(first, first + step)
            states = self._mixed_states(attention, queries, self.layout.index[:, :, components])
            kept.rows[kept.layout.index[:, :, components].to(self.rows.device)] += states
        # Components that do not live at a target have all written into the last row.
        kept.rows[-1] = 0
        self._add_output_constants(attention, queries, kept)
        return kept

    def at(self, positions: Int[Tensor, "batch target"]) -> "Carry":
        """The same components at a few positions only.

        Args:
            positions: `[batch, target]` the positions that are kept.
        """
        layout, chosen = self.layout, positions.cpu()
        batch = torch.arange(len(chosen))[:, None]
        kept = Layout(
            layout.alive[batch, chosen],
            layout.competes[batch, chosen],
            layout.bias,
            layout.fallback,
            layout.device,
        )
        rows = self.rows.new_zeros(kept.rows + 1, self.rows.shape[1])
        to = self.rows.device
        rows[kept.index.to(to)] = self.rows[layout.index[batch, chosen].to(to)]
        return Carry(kept, rows, positions, self.budget)

    def _mixed_states(self, attention: FrozenAttention, queries: Tensor, source: Tensor) -> Tensor:
        """The attention output `[batch, target, component, hidden]` of some components, without constants."""
        heads, shared, size = attention.heads, attention.key_value_heads, attention.head_size
        batch, positions, count = source.shape
        hidden = self.rows.shape[1]
        targets = queries.shape[1]
        scale = self.at_positions(attention.norm.scale)
        normed = attention.norm(
            self.rows[source.flatten().to(self.rows.device)], scale.repeat_interleave(count)
        ).view(batch, positions, count * hidden)
        mixed = (queries.reshape(batch, targets * heads, positions) @ normed).view(
            batch, targets, shared, heads // shared, count, hidden
        )
        value = attention.value.weight.view(shared, 1, size, hidden)
        output = attention.output.weight.view(hidden, shared, heads // shared, size)
        values = torch.einsum("btsgch,sgih->btcsgi", mixed, value.expand(-1, heads // shared, -1, -1))
        return torch.einsum("btcsgi,hsgi->btch", values, output)

    def _add_output_constants(self, attention: FrozenAttention, queries: Tensor, carry: "Carry") -> None:
        """What value and output biases give to the bias component at the targets."""
        if self.layout.bias is None:
            return
        total = torch.zeros_like(queries[..., 0, :1]).expand(-1, -1, self.rows.shape[1])
        constant = attention.norm.constant_through(attention.value)
        if constant is not None:
            groups = attention.heads // attention.key_value_heads
            heads = constant.view(attention.key_value_heads, 1, -1).expand(-1, groups, -1).flatten(0, 1)
            # Rows of probabilities need not sum to one (attention sinks), so the constant is mixed as well.
            mixed = queries.sum(-1)[..., None] * heads
            total = total + mixed.flatten(2) @ attention.output.weight.T
        if attention.output.bias is not None:
            total = total + attention.output.bias
        members = carry.layout.alive.shape[3]
        rows = carry.layout.index[:, :, self.layout.bias :: members].to(self.rows.device)
        carry.rows[rows] += total[:, :, None]
        carry.rows[-1] = 0

    # MLP

    def share_neurons(self, mlp: FrozenMLP, rule: Rule) -> None:
        """Add each component's share of the MLP's output to it, a chunk of positions at a time."""
        hidden, neurons = mlp.down.weight.shape
        limit = self.budget.rows(hidden + 3 * neurons, self.rows.dtype)
        frozen = _MLPAtPositions(
            mlp,
            rule,
            self.at_positions(mlp.norm.scale),
            self.at_positions(mlp.neurons),
            self.at_positions(mlp.pre_activations) if isinstance(rule, Taylor) else None,
        )
        for chunk in self.layout.chunks(limit):
            if isinstance(rule, Taylor):
                self._linear_shares(frozen, chunk)
            else:
                self._competing_shares(frozen, rule, chunk, limit)

    def _gates(self, frozen: "_MLPAtPositions", chunk: Chunk, part: slice) -> Tensor:
        """The components' parts of the pre-activation, for some of a chunk's rows."""
        start = chunk.rows.start
        rows = self.rows[start + part.start : start + part.stop]
        gates = frozen.mlp.norm(rows, frozen.scale[chunk.row_at[part]]) @ frozen.mlp.gate.weight.T
        constant = frozen.mlp.norm.constant_through(frozen.mlp.gate)
        if constant is not None:
            gates[_within(chunk.bias, part)] += constant
        return gates

    def _add_down(self, frozen: "_MLPAtPositions", chunk: Chunk, part: slice, shared: Tensor) -> None:
        """Project shared neurons down into the rows."""
        rows = self.rows[chunk.rows.start + part.start : chunk.rows.start + part.stop]
        rows.addmm_(shared, frozen.mlp.down.weight.T)
        if frozen.mlp.down.bias is not None:
            rows[_within(chunk.bias, part)] += frozen.mlp.down.bias

    def _linear_shares(self, frozen: "_MLPAtPositions", chunk: Chunk) -> None:
        assert isinstance(frozen.rule, Taylor)
        assert frozen.pre_activations is not None
        whole = slice(0, len(chunk.row_at))
        slopes = frozen.rule.slopes(frozen.pre_activations[chunk.at], frozen.neurons[chunk.at])
        segment = torch.div(chunk.cells, chunk.shape[1], rounding_mode="floor")
        self._add_down(frozen, chunk, whole, self._gates(frozen, chunk, whole).mul_(slopes[segment]))

    def _competing_shares(
        self, frozen: "_MLPAtPositions", rule: CompetingRule, chunk: Chunk, limit: int
    ) -> None:
        neurons = frozen.neurons[chunk.at]
        count = len(chunk.row_at)
        if count <= limit or chunk.shape[0] > 1:
            parts = [slice(0, count)]
        else:  # one position alone is too large: its components are cut as well
            parts = [slice(first, min(first + limit, count)) for first in range(0, count, limit)]
        summary = None
        gates = present = None
        for part in parts:
            gates, present = self._table(frozen, rule, chunk, part)
            own = rule.summarise(gates, present, part.start)
            summary = own if summary is None else rule.merge(summary, own)
        assert summary is not None
        assert gates is not None
        assert present is not None
        anybody = present.any(1) if len(parts) == 1 else None
        for part in parts:
            if len(parts) > 1:  # gates were not kept
                gates, present = self._table(frozen, rule, chunk, part)
                anybody = present.any(1) if anybody is None else anybody | present.any(1)
            shares = rule.share(gates, present, summary, part.start).mul_(neurons[:, None])
            rows = shares.flatten(0, 1)
            self._add_down(frozen, chunk, part, rows if chunk.dense else rows[chunk.cells])
        assert anybody is not None
        if rule.complete and not bool(anybody.all()):
            left = (~anybody[:, 0]).nonzero()[:, 0]
            rows = self.layout.fallback_rows(chunk.at[left])
            self.rows.index_add_(0, rows, neurons[left] @ frozen.mlp.down.weight.T)

    def _table(
        self, frozen: "_MLPAtPositions", rule: CompetingRule, chunk: Chunk, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Gates `[segment, component, neuron]`, and which components take part: those not exactly zero."""
        gates = self._gates(frozen, chunk, part)
        lives = (gates != 0).any(1, keepdim=True)
        shape = (1, len(gates)) if chunk.shape[0] == 1 else chunk.shape
        if not chunk.dense:
            gates = gates.new_zeros(shape[0] * shape[1], gates.shape[1]).index_copy_(0, chunk.cells, gates)
            lives = lives.new_zeros(shape[0] * shape[1], 1).index_copy_(0, chunk.cells, lives)
        at_origin = (self.positions.flatten()[chunk.at] == 0) & (part.start == 0)
        return rule.prepare(gates.view(*shape, -1), lives.view(*shape, 1), at_origin)

    # Read

    def read(self, norm: FrozenNorm) -> Float[Tensor, "batch component position hidden"]:
        """All components behind a frozen norm, its bias included."""
        index = self.layout.index.to(self.rows.device)
        batch, positions, count = index.shape
        scale = self.at_positions(norm.scale).repeat_interleave(count)
        states = norm(self.rows[index.flatten()], scale).view(batch, positions, count, -1)
        if norm.probe.bias is not None and self.layout.bias is not None:
            members = self.layout.alive.shape[3]
            lives = (index < self.layout.rows)[:, :, self.layout.bias :: members, None]
            states[:, :, self.layout.bias :: members] += norm.probe.bias * lives
        return states.transpose(1, 2)


@dataclass(frozen=True)
class _MLPAtPositions:
    """A frozen MLP and what of it stands at a carry's positions, flattened."""

    mlp: FrozenMLP
    rule: Rule
    scale: Tensor
    neurons: Tensor
    pre_activations: Tensor | None


def _within(rows: Tensor, part: slice) -> Tensor:
    """Those of the row numbers that lie in a part, counted from its start."""
    return rows[(rows >= part.start) & (rows < part.stop)] - part.start


def propagate(
    recording: Recording,
    carry: Carry,
    rule: Rule,
    *,
    first: int,
    stop: int,
    positions: Int[Tensor, "batch target"] | None = None,
) -> Iterator[tuple[int, Carry]]:
    """Carry components from one layer to another, block by block.

    Args:
        recording: the recorded pass.
        carry: the components at the entry of block `first`; changed in place.
        rule: how neurons are shared.
        first: the first block that they go through.
        stop: the layer that they stop at; `recording.layers` is behind the last block.
        positions: `[batch, target]` the only positions needed behind block `stop - 1`, or None for all.

    Yields:
        Each layer reached, with the components that enter it.
    """
    if first == stop and positions is not None:
        carry = carry.at(positions)
    yield first, carry
    for layer in range(first, stop):
        with torch.no_grad():
            block = recording.block(layer)
            if layer == stop - 1 and positions is not None:
                carry = carry.attend_at(block.attention, positions)
            else:
                carry.attend(block.attention)
            carry.share_neurons(block.mlp, rule)
        yield layer + 1, carry
