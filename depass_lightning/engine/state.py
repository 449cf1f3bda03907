"""DecomposedState: the components of a batch between two sublayers (Hong et al., section 3).

The sublayers read it and write into its packed rows in place: attention (`engine/attention.py`) reads one
component at all its positions, the MLP (`engine/mlp.py`) all components at one position.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from depass_lightning.engine.component_groups import ComponentGroup
from depass_lightning.engine.frozen import FrozenMLP
from depass_lightning.engine.memory import Budget, Storage
from depass_lightning.engine.norms import FrozenNorm
from depass_lightning.engine.packing import Layout


@dataclass
class DecomposedState:
    """The residual stream of a batch, split into components.

    Args:
        layout: the row of each component at each position.
        rows: `[row + 1, hidden]`; the last row is zero and represents every component that is not present.
        positions: `[batch, position]` the layout's positions, as indices into the prompts.
        budget: the working memory of one step.
        storage: owner of the rows, which may be a file.
        mlp_input: the rows that the MLP reads, where it adds its output to others: those that entered a
            parallel block, or those before a norm on the residual stream; None in other blocks.
    """

    layout: Layout
    rows: Float[Tensor, "row hidden"]
    positions: Int[Tensor, "batch position"]
    budget: Budget
    storage: Storage | None = None
    mlp_input: Float[Tensor, "row hidden"] | None = None

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
        """Start with one group, whose components are present at every real position.

        Args:
            group: the components.
            real: True at positions that are not padding.
            positions: the same positions as indices into the prompts.
            bias: the bias component's index, or None; the first other component is the group's base.
            budget: the working memory of one step.
        """
        present = real.cpu()[:, :, None, None].expand(-1, -1, 1, group.count)
        fallback = 1 if bias == 0 else 0
        layout = Layout(present, present, bias, fallback, group.like.device)
        storage = Storage.of(layout.rows + 1, group.like, budget)
        state = cls(layout, storage.rows, positions, budget, storage)
        state._fill(group, 0)
        return state

    def join(self, group: ComponentGroup) -> "DecomposedState":
        """Return a state with another group added, whose components compete among themselves only."""
        old = self.layout
        real = old.present.any(3).any(2)[:, :, None, None]
        present = torch.cat([old.present, real.expand_as(old.present[:, :, :1])], 2)
        competes = torch.cat([old.competes, real.expand_as(old.competes[:, :, :1])], 2)
        layout = Layout(present, competes, old.bias, old.fallback, old.device)
        storage = Storage.of(layout.rows + 1, self.rows, self.budget)
        state = DecomposedState(layout, storage.rows, self.positions, self.budget, storage)
        for first in range(0, old.components, self._fill_step):
            components = slice(first, min(first + self._fill_step, old.components))
            target = layout.index[:, :, components].to(self.rows.device)
            source = old.index[:, :, components].to(self.rows.device)
            state.rows[target] = self.rows[source]
            state.release_pages()
            self.release_pages()
        state._fill(group, old.components)
        return state

    @property
    def _fill_step(self) -> int:
        """The number of components that are written at once."""
        return self.budget.rows(3 * self.positions.numel() * self.rows.shape[1], self.rows.dtype)

    def _fill(self, group: ComponentGroup, offset: int) -> None:
        """Write a group's states into its rows, some components at a time."""
        for first in range(0, group.count, self._fill_step):
            components = slice(first, min(first + self._fill_step, group.count))
            index = self.layout.index[:, :, offset + components.start : offset + components.stop]
            # [batch, component, position, hidden] -> [batch, position, component, hidden]
            self.rows[index.to(self.rows.device)] = group.states(components, self.positions).transpose(1, 2)
            self.release_pages()
        self.rows[-1] = 0  # padding was written here

    def release_pages(self) -> None:
        """Return the pages of rows that are kept in a file to the system."""
        if self.storage is not None:
            self.storage.release_pages()

    def keep_mlp_input(self, earlier: "DecomposedState | None") -> None:
        """Set `mlp_input` after a group has joined the earlier state, if any, inside a parallel block."""
        index, old = self.layout.index.to(self.rows.device), 0
        self.mlp_input = torch.zeros_like(self.rows)
        if earlier is not None and earlier.mlp_input is not None:
            old = earlier.layout.components
            self.mlp_input[index[:, :, :old]] = earlier.mlp_input[earlier.layout.index.to(self.rows.device)]
        # At the block's entry the new group was its base alone.
        base = index[:, :, old + self.layout.fallback]
        self.mlp_input[base] = self.rows[base]
        self.mlp_input[-1] = 0

    def skip_mlp(self, mlp: FrozenMLP) -> None:
        """Take the residual stream past an MLP, which still reads it as it was."""
        if mlp.skip is not None:
            if self.mlp_input is None:
                self.mlp_input = self.rows.clone()
            self.norm_rows(mlp.skip)

    def norm_rows(self, norm: FrozenNorm) -> None:
        """Norm all rows in place."""
        scale, count = self.at_positions(norm.scale), self.layout.components
        for first in range(0, count, self._fill_step):
            index = self.layout.index[:, :, first : first + self._fill_step].to(self.rows.device)
            index = index.flatten(0, 1)  # [batch * position, component]
            rows = norm(self.rows[index.flatten()], scale.repeat_interleave(index.shape[1]))
            self.rows[index.flatten()] = rows
            self.release_pages()

    def dense(self) -> Float[Tensor, "batch component position hidden"]:
        """All components at all positions, zeros included."""
        return self.rows[self.layout.index.to(self.rows.device)].transpose(1, 2)

    def at_positions(self, values: Float[Tensor, "batch any *rest"]) -> Tensor:
        """Select recorded values at this state's positions: `[batch * position, *rest]`."""
        batch = torch.arange(len(self.positions), device=values.device)[:, None]
        return values[batch, self.positions].flatten(0, 1)

    def select_positions(self, positions: Int[Tensor, "batch target"]) -> "DecomposedState":
        """Return the same components at a few positions only, as indices into this state's positions."""
        layout, kept = self.layout, positions.cpu()
        batch = torch.arange(len(kept))[:, None]
        smaller = Layout(
            layout.present[batch, kept],
            layout.competes[batch, kept],
            layout.bias,
            layout.fallback,
            layout.device,
        )
        target, source = (index.to(self.rows.device) for index in (smaller.index, layout.index[batch, kept]))

        def selected(rows: Tensor) -> Tensor:
            result = rows.new_zeros(smaller.rows + 1, rows.shape[1])
            result[target] = rows[source]
            return result

        return DecomposedState(
            smaller,
            selected(self.rows),
            self.positions.gather(1, positions),
            self.budget,
            mlp_input=None if self.mlp_input is None else selected(self.mlp_input),
        )

    def read(self, norm: FrozenNorm) -> Float[Tensor, "batch component position hidden"]:
        """All components after a frozen norm, whose bias is the bias component's."""
        index = self.layout.index.to(self.rows.device)
        batch, positions, count = index.shape
        scale = self.at_positions(norm.scale).repeat_interleave(count)
        states = norm(self.rows[index.flatten()], scale).view(batch, positions, count, -1)
        if norm.probe.bias is not None and self.layout.bias is not None:
            members = self.layout.present.shape[3]
            present = (index < self.layout.rows)[:, :, self.layout.bias :: members, None]
            states[:, :, self.layout.bias :: members] += norm.probe.bias * present
        return states.transpose(1, 2)
