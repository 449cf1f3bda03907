"""Groups of components where they start, whose states are built a few at a time to bound memory.

A neuron's state is its value at each position times its column of the down map, so a group of neurons needs
no more memory than the MLP until it is propagated. Two places are reached without propagating it:

1. directly after its block, a target reads each neuron by one product with its column;
2. attention is linear, so after the next block's attention a neuron's state at a target's position is its
   column through each head's value map, times its values mixed by that head's probabilities.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.frozen import FrozenAttention

States = Float[Tensor, "batch component position hidden"]
Positions = Int[Tensor, "batch position"]


class ComponentGroup(ABC):
    """Components that compete among themselves only, where they start."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of components."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Any tensor `[batch, ..., hidden]` of the states' precision and device."""

    @abstractmethod
    def states(self, components: slice, positions: Positions) -> States:
        """Build the states of some components at some positions.

        Args:
            components: the components.
            positions: `[batch, position]` the positions, as indices into the prompts.
        """

    @abstractmethod
    def prepend(self, state: Float[Tensor, "batch position hidden"]) -> "ComponentGroup":
        """Return the same group with one more component in front."""


@dataclass(frozen=True)
class DenseGroup(ComponentGroup):
    """A group whose states are all in memory."""

    table: States

    @property
    @override
    def count(self) -> int:
        return self.table.shape[1]

    @property
    @override
    def like(self) -> Tensor:
        return self.table

    @override
    def states(self, components: slice, positions: Positions) -> States:
        return _select_states(self.table[:, components], positions)

    @override
    def prepend(self, state: Tensor) -> "DenseGroup":
        return DenseGroup(torch.cat([state[:, None], self.table], 1))


@dataclass(frozen=True)
class NeuronGroup(ComponentGroup):
    """Neurons, each of which writes one direction, and the rest of the state.

    Args:
        base: the components in front, which are not neurons.
        values: the neurons' values.
        columns: the direction that each neuron writes; of batch size 1 where all prompts share it.
    """

    base: States
    values: Float[Tensor, "batch position neuron"]
    columns: Float[Tensor, "batch neuron hidden"]

    @property
    @override
    def count(self) -> int:
        return self.base.shape[1] + self.values.shape[2]

    @property
    @override
    def like(self) -> Tensor:
        return self.base

    @override
    def states(self, components: slice, positions: Positions) -> States:
        first, neurons = self._cut(components)
        values = _select_rows(self.values[:, :, neurons], positions)  # [batch, position, neuron]
        written = values.transpose(1, 2)[..., None] * self.columns[:, neurons, None]
        return torch.cat([_select_states(self.base[:, first], positions), written], 1)

    @override
    def prepend(self, state: Tensor) -> "NeuronGroup":
        return replace(self, base=torch.cat([state[:, None], self.base], 1))

    def select(self, neurons: Int[Tensor, "batch selected"]) -> "NeuronGroup":
        """Return the group with only some of each prompt's neurons."""
        columns = self.columns.expand(len(neurons), -1, -1)
        return NeuronGroup(
            self.base,
            self.values.gather(2, neurons[:, None].expand(-1, self.values.shape[1], -1)),
            columns.gather(1, neurons[:, :, None].expand(-1, -1, columns.shape[2])),
        )

    def read(
        self, positions: Int[Tensor, "batch read"], directions: Float[Tensor, "batch read hidden"]
    ) -> Float[Tensor, "batch component"]:
        """Return the products of each component's states with directions, summed over positions.

        Args:
            positions: the positions of each prompt; may repeat.
            directions: the direction at each of them.
        """
        base = torch.einsum("bmrd,brd->bm", _select_states(self.base, positions), directions)
        values = _select_rows(self.values, positions)  # [batch, read, neuron]
        return torch.cat([base, (values * self.gradient_of_values(directions)).sum(1)], 1)

    def gradient_of_values(
        self, gradient: Float[Tensor, "batch position hidden"]
    ) -> Float[Tensor, "batch position neuron"]:
        """Return the gradient with respect to each neuron's value, from that with respect to the state."""
        if len(self.columns) == 1:
            return gradient @ self.columns[0].T
        return gradient @ self.columns.transpose(1, 2)

    def _cut(self, components: slice) -> tuple[slice, slice]:
        """Split a slice of components into one of the base's components and one of the neurons."""
        start, stop, _ = components.indices(self.count)
        offset = self.base.shape[1]
        return slice(start, stop), slice(max(0, start - offset), max(0, stop - offset))


@dataclass(frozen=True)
class NeuronGroupAfterAttention(ComponentGroup):
    """A group of neurons after the next block's attention, at the targets' positions only.

    Args:
        group: the neurons where they start.
        attention: the next block's attention.
        base: the group's base after that attention, at the targets.
        targets: the targets' positions.
    """

    group: NeuronGroup
    attention: FrozenAttention
    base: States
    targets: Positions

    @property
    @override
    def count(self) -> int:
        return self.group.count

    @property
    @override
    def like(self) -> Tensor:
        return self.base

    @override
    def states(self, components: slice, positions: Positions) -> States:
        # Only the targets' positions are ever asked for.
        attention, group = self.attention, self.group
        first, neurons = group._cut(components)
        heads, value_heads = attention.heads, attention.key_value_heads
        batch = torch.arange(len(positions), device=positions.device)[:, None]
        queries = attention.probabilities[batch, :, positions]  # [batch, target, head, key]
        values = group.values[:, :, neurons]
        scaled = values * attention.norm.scale[:, :, None]
        mixed = (queries.flatten(1, 2) @ scaled).view(*positions.shape, value_heads, heads // value_heads, -1)
        columns = group.columns[:, neurons]
        head_columns = attention.norm.probe.direction(columns) @ attention.value.weight.T
        head_columns = head_columns.unflatten(2, (value_heads, -1))  # [batch, neuron, value head, size]
        head_columns = head_columns.expand(len(positions), -1, -1, -1)
        # [batch, target, neuron, value head, group, size]
        head_outputs = torch.einsum("btsgi,bisv->btisgv", mixed, head_columns)
        if attention.gates is not None:
            gates = _select_rows(attention.gates, positions)  # [batch, target, head * size]
            head_outputs = head_outputs * gates.view(*positions.shape, 1, *head_outputs.shape[3:])
        attended = head_outputs.flatten(3) @ attention.output.weight.T
        written = (
            _select_rows(values, positions)[..., None] * columns[:, None]
        )  # [batch, target, neuron, hidden]
        if attention.skip is not None:
            past = _select_rows(attention.skip.scale, positions)[..., None, None]
            written = attention.skip.probe.direction(written) * past
        return torch.cat([self.base[:, first], (written + attended).transpose(1, 2)], 1)

    @override
    def prepend(self, state: Tensor) -> ComponentGroup:
        raise NotImplementedError("the base already includes the components in front")


def _select_states(table: States, positions: Positions) -> States:
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    # Indexing by two tensors around a slice moves them to the front: [batch, position, component, hidden].
    return table[batch, :, positions].transpose(1, 2)


def _select_rows(values: Float[Tensor, "batch any *rest"], positions: Positions) -> Tensor:
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    return values[batch, positions]
