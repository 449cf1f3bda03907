"""Where each component's state at each position is stored: packed rows without causal zeros.

A token's component is zero before the token itself, so half of `[component, position]` need never be
stored nor multiplied. The rows that live are packed position by position, so that a *segment*, the
components of one position that compete for its neurons, is one contiguous run, and the MLP works on
contiguous chunks of rows. Rows that carry a component which takes no share at its position are stored
last, behind all segments.

Components may come in groups that compete among themselves only (all layers' heads in one sweep): a
segment then is one position of one group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Segments of equal size that stand together, so that their rows are a dense table.

    Args:
        rows: their rows, counted from the chunk's start.
        segments: the segments, counted from the chunk's first.
    """

    rows: slice
    segments: slice


@dataclass(frozen=True)
class Chunk:
    """A run of whole segments, as the MLP takes them.

    Args:
        rows: the rows.
        runs: the chunk's segments by their size.
        places: `[segment]` the flat `batch * position` index of each segment.
        row_places: `[row]` the same for each row.
        bias: rows of the bias component, counted from the chunk's start.
        fallback: `[segment]` the row that takes what no component of a segment competes for.
    """

    rows: slice
    runs: list[Run]
    places: Int[Tensor, "segment"]
    row_places: Int[Tensor, "row"]
    bias: Int[Tensor, "row"]
    fallback: Int[Tensor, "segment"]


@dataclass(frozen=True)
class ComponentBlock:
    """Some components at all positions where any of them lives, as attention takes them.

    Args:
        rows: `[row]` their rows.
        places: `[row]` the flat `batch * position` index of each row.
        where: the rows' places in a dense `[batch, position, component]` table, one index tensor an axis.
        first: the first position that the table covers.
        shape: the table's shape.
        bias: which of `rows` belong to the bias component.
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
        present: `[batch, position, group, component]` which components live where.
        competes: the same shape; which of the living take part in sharing neurons.
        bias: the bias component's index inside each group, or None.
        fallback: the component, inside each group, that takes a neuron for which no component competes.
        device: where the indices are needed.
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
        # Segments of equal size stand together: a chunk of them is a dense table and needs no gathering.
        competing = self.competes.transpose(2, 1).reshape(batch * groups * positions, members)
        counts = competing.sum(1)
        order = counts.sort(stable=True).indices
        order = order[counts[order] > 0]
        segment, component = competing[order].nonzero(as_tuple=True)
        prompt, group, position = self._place(order[segment])
        quiet = (self.present & ~self.competes).nonzero(as_tuple=True)
        prompt, position, group, component = (
            torch.cat([loud, silent])
            for loud, silent in zip((prompt, position, group, component), quiet, strict=True)
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
        """Cut the segments into runs of about so many rows; a segment is never cut here.

        Args:
            rows: how many rows a run may have; a single larger segment is a run of its own.
        """
        if rows not in self._chunks:
            self._chunks[rows] = [self._chunk(*run) for run in _runs(self._counts, rows)]
        return self._chunks[rows]

    def _place(self, segment: Int[Tensor, "segment"]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt, the group and the position of segments, counted through in this order."""
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
        """Cut the components into runs of about so many rows.

        Args:
            rows: how many rows a run may have; a single component's may be more.
        """
        if rows not in self._blocks:
            lives = self.index < self.rows
            self._blocks[rows] = [
                self._component_block(components, lives[:, :, components])
                for components, own in _runs(lives.sum((0, 1)), rows)
                if own.stop > own.start
            ]
        return self._blocks[rows]

    def _component_block(self, components: slice, lives: Tensor) -> ComponentBlock:
        prompt, position, component = lives.nonzero(as_tuple=True)
        first = int(position.min())
        rows = self.index[prompt, position, component + components.start]
        members = self.present.shape[3]
        is_bias = (component + components.start) % members == (-1 if self.bias is None else self.bias)
        batch, positions, count = lives.shape
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
    """Cut parts into runs of at most so many rows, or one part: which parts, and which of all their rows."""
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
    """Lay out components that begin at a position and live from there on.

    Args:
        births: the position where each component begins; a padding component begins behind the last position.
        lengths: real positions of each prompt.
        positions: the number of positions, padding included.
        bias: the bias component's index, or None.
        first: the index of the first position's component.
        exclude_first: that component takes no share of any neuron behind its own position.
        device: where the indices are needed.
    """
    start_positions, lengths = start_positions.cpu(), lengths.cpu()
    position = torch.arange(positions)
    started = position[None, :, None] >= start_positions[:, None, :]
    present = started & (position[None, :] < lengths[:, None])[:, :, None]  # [batch, position, component]
    competes = present.clone()
    if exclude_first:
        competes[:, 1:, first] = False
    return Layout(present[:, :, None], competes[:, :, None], bias, first, device)
