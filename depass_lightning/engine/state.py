"""Components on their way through the model, and what happens to them in attention (Hong et al., section 3).

With everything that was recorded held fixed attention is linear: norm the components, take values, mix them
with the probabilities, project out. Values are mixed before they are projected out, so nothing of size heads
x hidden is built. It reads one component at all its positions and writes into the packed rows in place; the
MLP (`engine/mlp.py`) does so with all components at one position.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from depass_lightning.engine.component_groups import ComponentGroup
from depass_lightning.engine.frozen import FrozenAttention, FrozenNorm
from depass_lightning.engine.memory import Budget, Storage
from depass_lightning.engine.packing import ComponentBlock, Layout


@dataclass
class DecomposedState:
    """The components of a batch somewhere on their way through the model.

    Args:
        layout: where each component's rows are.
        rows: `[row + 1, hidden]`; the last row is zero and stands for every component that does not live.
        positions: `[batch, position]` which of the prompt's positions the layout's positions are.
        budget: how much working memory a step may take.
        storage: what keeps the rows, where it may be a file.
        beside: the rows as they entered a block whose MLP reads these and not what attention leaves.
    """

    layout: Layout
    rows: Float[Tensor, "row hidden"]
    positions: Int[Tensor, "batch position"]
    budget: Budget
    storage: Storage | None = None
    beside: Float[Tensor, "row hidden"] | None = None

    @classmethod
    def begin(
        cls,
        group: ComponentGroup,
        real: Bool[Tensor, "batch position"],
        positions: Int[Tensor, "batch position"],
        *,
        bias: int | None,
        budget: Budget,
    ) -> "DecomposedState":
        """Begin with components that all live at every real position.

        Args:
            group: the components.
            real: which positions are no padding.
            positions: which of the prompt's positions these are.
            bias: the bias component's index, or None; the first other component is the group's base.
            budget: how much working memory a step may take.
        """
        alive = real.cpu()[:, :, None, None].expand(-1, -1, 1, group.count)
        fallback = 1 if bias == 0 else 0
        layout = Layout(alive, alive, bias, fallback, group.like.device)
        storage = Storage.of(layout.rows + 1, group.like, budget)
        carry = cls(layout, storage.rows, positions, budget, storage)
        carry._fill(group, 0)
        return carry

    def join(self, group: ComponentGroup) -> "DecomposedState":
        """Take in another group, whose components compete among themselves only.

        Args:
            group: as many components as each group has.
        """
        old = self.layout
        real = old.alive.any(3).any(2)[:, :, None, None]
        alive = torch.cat([old.alive, real.expand_as(old.alive[:, :, :1])], 2)
        competes = torch.cat([old.competes, real.expand_as(old.competes[:, :, :1])], 2)
        layout = Layout(alive, competes, old.bias, old.fallback, old.device)
        storage = Storage.of(layout.rows + 1, self.rows, self.budget)
        carry = DecomposedState(layout, storage.rows, self.positions, self.budget, storage)
        for first in range(0, old.components, self._fill_step):
            some = slice(first, min(first + self._fill_step, old.components))
            to, of = (own.index[:, :, some].to(self.rows.device) for own in (layout, old))
            carry.rows[to] = self.rows[of]
            carry.release_pages()
            self.release_pages()
        carry._fill(group, old.components)
        return carry

    @property
    def _fill_step(self) -> int:
        """How many components are filled in at once."""
        return self.budget.rows(3 * self.positions.numel() * self.rows.shape[1], self.rows.dtype)

    def _fill(self, group: ComponentGroup, offset: int) -> None:
        """Write a group's states into its rows, some components at a time."""
        for first in range(0, group.count, self._fill_step):
            some = slice(first, min(first + self._fill_step, group.count))
            index = self.layout.index[:, :, offset + some.start : offset + some.stop]
            self.rows[index.to(self.rows.device)] = group.states(some, self.positions).transpose(1, 2)
            self.release_pages()
        self.rows[-1] = 0  # padding wrote here

    def release_pages(self) -> None:
        """Let go of what the rows hold of memory, where they are kept in a file."""
        if self.storage is not None:
            self.storage.release_pages()

    def read_beside(self, before: "DecomposedState | None") -> None:
        """Let the MLP of a block read what entered it, where the last group has begun behind attention.

        Args:
            before: this carry before that group joined it, if there was one.
        """
        index, old = self.layout.index.to(self.rows.device), 0
        self.beside = torch.zeros_like(self.rows)
        if before is not None and before.beside is not None:
            old = before.layout.components
            self.beside[index[:, :, :old]] = before.beside[before.layout.index.to(self.rows.device)]
        # At the block's entry the new group was its base alone.
        base = index[:, :, old + self.layout.fallback]
        self.beside[base] = self.rows[base]
        self.beside[-1] = 0

    def dense(self) -> Float[Tensor, "batch component position hidden"]:
        """All components at all positions, zeros included."""
        return self.rows[self.layout.index.to(self.rows.device)].transpose(1, 2)

    def at_positions(self, values: Float[Tensor, "batch any *rest"]) -> Tensor:
        """Pick what was recorded at this carry's positions, prompts and positions flattened."""
        batch = torch.arange(len(self.positions), device=values.device)[:, None]
        return values[batch, self.positions].flatten(0, 1)

    # Attention

    def propagate_attention(self, attention: FrozenAttention) -> None:
        """Add each component's attention output to it, a block of components at a time."""
        hidden = self.rows.shape[1]
        value_width, output_width = attention.value.weight.shape[0], attention.output.weight.shape[1]
        rows = self.budget.rows(2 * (hidden + value_width + output_width), self.rows.dtype)
        scale = self.at_positions(attention.norm.scale)
        for block in self.layout.component_blocks(rows):
            self.rows.index_add_(0, block.rows, self._attention_of(attention, block, scale))
            self.release_pages()

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
        if attention.added is not None:
            result[block.bias] += self.at_positions(attention.added)[block.at[block.bias]]
        return result

    def propagate_attention_at(
        self, attention: FrozenAttention, positions: Int[Tensor, "batch target"]
    ) -> "DecomposedState":
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
            self.release_pages()
        # Components that do not live at a target have all written into the last row.
        kept.rows[-1] = 0
        self._add_output_constants(attention, queries, kept)
        return kept

    def at(self, positions: Int[Tensor, "batch target"]) -> "DecomposedState":
        """The same components at a few positions only.

        Args:
            positions: `[batch, target]` those of this carry's own positions that are kept.
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
        to, of = kept.index.to(self.rows.device), layout.index[batch, chosen].to(self.rows.device)

        def picked(rows: Tensor) -> Tensor:
            own = rows.new_zeros(kept.rows + 1, rows.shape[1])
            own[to] = rows[of]
            return own

        beside = None if self.beside is None else picked(self.beside)
        return DecomposedState(
            kept, picked(self.rows), self.positions.gather(1, positions), self.budget, beside=beside
        )

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

    def _add_output_constants(
        self, attention: FrozenAttention, queries: Tensor, carry: "DecomposedState"
    ) -> None:
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
        if attention.added is not None:
            total = total + carry.at_positions(attention.added).view(*carry.positions.shape, -1)
        members = carry.layout.alive.shape[3]
        rows = carry.layout.index[:, :, self.layout.bias :: members].to(self.rows.device)
        carry.rows[rows] += total[:, :, None]
        carry.rows[-1] = 0

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
