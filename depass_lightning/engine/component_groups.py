"""Components before they are carried, whose states are given some at a time, so that nobody holds them all.

A neuron's state is its value times its column of the down map, one number a position: a group of neurons is
never larger than the MLP itself until it is carried. Two places are reached without carrying it:

1. right behind its own block a target reads each neuron by one product with its column;
2. attention is linear, so behind the next block's attention a neuron's state at a target's position is its
   column through each head's value map, times its values mixed by that head's probabilities.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.engine.frozen import FrozenAttention

States = Float[Tensor, "batch component position hidden"]
Positions = Int[Tensor, "batch position"]


class ComponentGroup(ABC):
    """Components that compete among themselves, where they begin."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of components."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Any tensor `[batch, ..., hidden]` with the states' precision and device."""

    @abstractmethod
    def states(self, components: slice, positions: Positions) -> States:
        """Some components' states at some of the prompts' positions."""

    @abstractmethod
    def after(self, first: Float[Tensor, "batch position hidden"]) -> "ComponentGroup":
        """The same group with one more component in front, whose state is given at all positions."""


@dataclass(frozen=True)
class DenseGroup(ComponentGroup):
    """A group whose states are all there.

    Args:
        table: the states at all positions.
    """

    table: States

    @property
    def count(self) -> int:
        return self.table.shape[1]

    @property
    def like(self) -> Tensor:
        return self.table

    def states(self, components: slice, positions: Positions) -> States:
        return _at(self.table[:, components], positions)

    def after(self, first: Tensor) -> "DenseGroup":
        return DenseGroup(torch.cat([first[:, None], self.table], 1))


@dataclass(frozen=True)
class NeuronGroup(ComponentGroup):
    """The rest of a state, and neurons that each write one direction.

    Args:
        base: the components in front, which are no neurons.
        values: the neurons' values.
        columns: what each neuron writes where its value is one; the batch may share it (size 1).
    """

    base: States
    values: Float[Tensor, "batch position neuron"]
    columns: Float[Tensor, "batch neuron hidden"]

    @property
    def count(self) -> int:
        return self.base.shape[1] + self.values.shape[2]

    @property
    def like(self) -> Tensor:
        return self.base

    def states(self, components: slice, positions: Positions) -> States:
        first, neurons = self._cut(components)
        values = _rows(self.values[:, :, neurons], positions)
        written = values.transpose(1, 2)[..., None] * self.columns[:, neurons, None]
        return torch.cat([_at(self.base[:, first], positions), written], 1)

    def after(self, first: Tensor) -> "NeuronGroup":
        return replace(self, base=torch.cat([first[:, None], self.base], 1))

    def some(self, neurons: Int[Tensor, "batch chosen"]) -> "NeuronGroup":
        """Keep some of each prompt's neurons, and leave the others out."""
        columns = self.columns.expand(len(neurons), -1, -1)
        return NeuronGroup(
            self.base,
            self.values.gather(2, neurons[:, None].expand(-1, self.values.shape[1], -1)),
            columns.gather(1, neurons[:, :, None].expand(-1, -1, columns.shape[2])),
        )

    def read(
        self, positions: Int[Tensor, "batch"], direction: Float[Tensor, "batch hidden"]
    ) -> Float[Tensor, "batch component"]:
        """Each component's state at a position, times a direction."""
        base = _at(self.base, positions[:, None])[:, :, 0] @ direction[:, :, None]
        values = _rows(self.values, positions[:, None])[:, 0]
        return torch.cat([base[..., 0], values * self.through(direction[:, None])[:, 0]], 1)

    def through(
        self, derivative: Float[Tensor, "batch position hidden"]
    ) -> Float[Tensor, "batch position neuron"]:
        """A derivative by the state, as one by each neuron's value."""
        if len(self.columns) == 1:
            return derivative @ self.columns[0].T
        return derivative @ self.columns.transpose(1, 2)

    def _cut(self, components: slice) -> tuple[slice, slice]:
        """Which of the base's components, and which of the neurons, a slice of all of them takes."""
        start, stop, _ = components.indices(self.count)
        before = self.base.shape[1]
        return slice(start, stop), slice(max(0, start - before), max(0, stop - before))


@dataclass(frozen=True)
class NeuronGroupAfterAttention(ComponentGroup):
    """A group of neurons behind the next block's attention, at a few positions.

    Args:
        group: the neurons where they begin.
        attention: the next block's attention.
        base: the group's base behind it, at the targets.
        targets: the positions.
    """

    group: NeuronGroup
    attention: FrozenAttention
    base: States
    targets: Positions

    @property
    def count(self) -> int:
        return self.group.count

    @property
    def like(self) -> Tensor:
        return self.base

    def states(self, components: slice, positions: Positions) -> States:
        """At the targets: the positions asked for are these."""
        attention, group = self.attention, self.group
        first, neurons = group._cut(components)
        heads, shared = attention.heads, attention.key_value_heads
        batch = torch.arange(len(positions), device=positions.device)[:, None]
        queries = attention.probabilities[batch, :, positions]
        values = group.values[:, :, neurons]
        scaled = values * attention.norm.scale[:, :, None]
        mixed = (queries.flatten(1, 2) @ scaled).view(*positions.shape, shared, heads // shared, -1)
        columns = group.columns[:, neurons]
        taken = attention.norm.probe.direction(columns) @ attention.value.weight.T
        taken = taken.unflatten(2, (shared, -1))
        each = torch.einsum("btsgi,bisv->btisgv", mixed, taken.expand(len(positions), -1, -1, -1))
        added = each.flatten(3) @ attention.output.weight.T
        own = _rows(values, positions)[..., None] * columns[:, None]
        return torch.cat([self.base[:, first], (own + added).transpose(1, 2)], 1)

    def after(self, first: Tensor) -> ComponentGroup:
        raise NotImplementedError("the components in front are in the base already")


def _at(table: States, positions: Positions) -> States:
    """Some positions of a table."""
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    # Indexing by two tensors around a slice moves them to the front: [batch, position, component, hidden].
    return table[batch, :, positions].transpose(1, 2)


def _rows(values: Float[Tensor, "batch any *rest"], positions: Positions) -> Tensor:
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    return values[batch, positions]
