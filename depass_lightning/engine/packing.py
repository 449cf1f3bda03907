"""Packed rows: the place of each component's state at each position, without causal zeros.

A token's component is zero before the token itself, so half of `[component, position]` is neither stored nor
multiplied. The rows of present components are packed position by position. A *segment*, the components of one
position that compete for its neurons, is then one contiguous run, and the MLP works on contiguous chunks of
rows. Rows of components that take no share at their position are stored last, after all segments.

Components may come in groups that compete among themselves only (the heads of all layers in one sweep). A
segment is then one position of one group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Adjacent segments of equal size, whose rows form a dense table `[segment, component]`.

    Args:
        rows: their rows, counted from the chunk's start.
        segments: the segments, counted from the chunk's first.
    """

    rows: slice
    segments: slice


@dataclass(frozen=True)
class Chunk:
    """Some whole segments, which the MLP processes together.

    Args:
        rows: the chunk's rows.
        runs: the chunk's segments, grouped by size.
        places: `[segment]` the flat `batch * position` index of each segment.
        row_places: `[row]` the flat `batch * position` index of each row.
        bias: rows of the bias component, counted from the chunk's start.
        fallback: `[segment]` the row that receives neurons for which no component of the segment competes.
    """

    rows: slice
    runs: list[Run]
    places: Int[Tensor, "segment"]
    row_places: Int[Tensor, "row"]
    bias: Int[Tensor, "row"]
    fallback: Int[Tensor, "segment"]


@dataclass(frozen=True)
class ComponentBlock:
    """Some components at all positions where any of them is present, which attention processes together.

    Args:
        rows: `[row]` their rows.
        places: `[row]` the flat `batch * position` index of each row.
        where: the rows' indices in a dense `[batch, position, component]` table, one index tensor an axis.
        first: the first position that the table covers.
        shape: the table's shape.
        bias: the entries of `rows` that belong to the bias component.
    """

    rows: Int[Tensor, "row"]
    places: Int[Tensor, "row"]
    where: tuple[Tensor, Tensor, Tensor]
    first: int
    shape: tuple[int, int, int]
    bias: Int[Tensor, "row"]


@dataclass
class Layout:
    """Maps `(prompt, position, component)` to a row.

    Args:
        present: `[batch, position, group, component]` whether a component is present at a position.
        competes: `[batch, position, group, component]` whether it also competes for neurons there.
        bias: the bias component's index inside each group, or None.
        fallback: the component inside each group that receives a neuron for which no component competes.
        device: the device of the indices.
    """

    present: Bool[Tensor, "batch position group component"]
    competes: Bool[Tensor, "batch position group component"]
    bias: int | None
    fallback: int
    device: torch.device
    rows: int = field(init=False)
    index: Int[Tensor, "batch position component"] = field(init=False)
    _counts: Tensor = field(init=False, repr=False)
    _segments: Tensor = field(init=False, repr=False)
    _row_segment: Tensor = field(init=False, repr=False)
    _row_component: Tensor = field(init=False, repr=False)
    _chunks: dict[int, list[Chunk]] = field(init=False, repr=False, default_factory=dict)
    _blocks: dict[int, list[ComponentBlock]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        batch, positions, groups, members = self.present.shape
        # Segments of equal size are adjacent: a chunk of them is a dense table and needs no gathering.
        competing = self.competes.transpose(2, 1).reshape(batch * groups * positions, members)
        counts = competing.sum(1)
        order = counts.sort(stable=True).indices
        order = order[counts[order] > 0]
        segment, component = competing[order].nonzero(as_tuple=True)
        prompt, group, position = self._place(order[segment])
        non_competing = (self.present & ~self.competes).nonzero(as_tuple=True)
        prompt, position, group, component = (
            torch.cat(pair) for pair in zip((prompt, position, group, component), non_competing, strict=True)
        )
        self.rows = len(prompt)
        index = torch.full((batch, positions, groups, members), self.rows)
        index[prompt, position, group, component] = torch.arange(self.rows)
        self.index = index.flatten(2)
        self._counts, self._segments = counts[order], order
        self._row_segment, self._row_component = segment, component[: len(segment)]

    @property
    def groups(self) -> int:
        """The number of groups that compete among themselves only."""
        return self.present.shape[2]

    @property
    def components(self) -> int:
        """The number of components, over all groups."""
        return self.index.shape[2]

    @property
    def positions(self) -> int:
        """The number of positions that the layout covers."""
        return self.index.shape[1]

    def chunks(self, rows: int) -> list[Chunk]:
        """Divide the segments into chunks; a segment is never divided."""
        if rows not in self._chunks:
            self._chunks[rows] = [self._chunk(*run) for run in _runs(self._counts, rows)]
        return self._chunks[rows]

    def _place(self, segment: Int[Tensor, "segment"]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt, group and position of segments, which are numbered in this order."""
        _, positions, groups, _ = self.present.shape
        prompt, rest = segment // (groups * positions), segment % (groups * positions)
        return prompt, rest // positions, rest % positions

    def _chunk(self, segments: slice, rows: slice) -> Chunk:
        _, positions, _, members = self.present.shape
        prompt, group, position = self._place(self._segments[segments])
        places = prompt * positions + position
        bias = (self._row_component[rows] == (-1 if self.bias is None else self.bias)).nonzero()[:, 0]
        runs, row, segment = [], 0, 0
        sizes, repeats = self._counts[segments].unique_consecutive(return_counts=True)
        for size, count in zip(sizes.tolist(), repeats.tolist(), strict=True):
            runs.append(Run(slice(row, row + size * count), slice(segment, segment + count)))
            row, segment = row + size * count, segment + count
        return Chunk(
            rows=rows,
            runs=runs,
            places=places.to(self.device),
            row_places=places[self._row_segment[rows] - segments.start].to(self.device),
            bias=bias.to(self.device),
            fallback=self.index[prompt, position, group * members + self.fallback].to(self.device),
        )

    def component_blocks(self, rows: int) -> list[ComponentBlock]:
        """Divide the components into blocks."""
        if rows not in self._blocks:
            present = self.index < self.rows
            self._blocks[rows] = [
                self._component_block(components, present[:, :, components])
                for components, block_rows in _runs(present.sum((0, 1)), rows)
                if block_rows.stop > block_rows.start
            ]
        return self._blocks[rows]

    def _component_block(self, components: slice, present: Tensor) -> ComponentBlock:
        prompt, position, component = present.nonzero(as_tuple=True)
        first = int(position.min())
        rows = self.index[prompt, position, component + components.start]
        members = self.present.shape[3]
        is_bias = (component + components.start) % members == (-1 if self.bias is None else self.bias)
        batch, positions, count = present.shape
        to = self.device
        return ComponentBlock(
            rows=rows.to(to),
            places=(prompt * positions + position).to(to),
            where=(prompt.to(to), (position - first).to(to), component.to(to)),
            first=first,
            shape=(batch, positions - first, count),
            bias=is_bias.nonzero()[:, 0].to(to),
        )


def _runs(counts: Int[Tensor, "part"], rows: int) -> Iterator[tuple[slice, slice]]:
    """Group parts into runs of at most `rows` rows, or of one larger part: the run's parts and its rows."""
    ends = counts.cumsum(0).tolist()
    first = 0
    while first < len(ends):
        start = ends[first - 1] if first else 0
        last = first + 1
        while last < len(ends) and ends[last] - start <= rows:
            last += 1
        yield slice(first, last), slice(start, ends[last - 1])
        first = last


def token_layout(
    start_positions: Int[Tensor, "batch component"],
    lengths: Int[Tensor, "batch"],
    positions: int,
    *,
    bias: int | None,
    first: int,
    exclude_first: bool,
    device: torch.device,
) -> Layout:
    """Lay out components that start at a position and are present from there on.

    Args:
        start_positions: the position where each component starts; past the last position for padding.
        lengths: the number of real positions of each prompt.
        positions: the number of positions, padding included.
        bias: the bias component's index, or None.
        first: the index of the first position's component.
        exclude_first: let that component compete at its own position only, as the published code does.
        device: the device of the indices.
    """
    start_positions, lengths = start_positions.cpu(), lengths.cpu()
    position = torch.arange(positions)
    started = position[None, :, None] >= start_positions[:, None, :]
    present = started & (position[None, :] < lengths[:, None])[:, :, None]  # [batch, position, component]
    competes = present.clone()
    if exclude_first:
        competes[:, 1:, first] = False
    return Layout(present[:, :, None], competes[:, :, None], bias, first, device)
