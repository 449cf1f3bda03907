"""Carry components through frozen blocks, one after another (Hong et al., section 3).

1. Components begin at a block's entry, between its attention and its MLP, or behind its MLP.
2. Each block carries them through its attention and its MLP (`engine/state.py`).
3. Behind the last block only the target's positions are needed, so only these go through it.
"""

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from depass_lightning.engine.attention import propagate_attention
from depass_lightning.engine.component_groups import (
    ComponentGroup,
    DenseGroup,
    NeuronGroup,
    NeuronGroupAfterAttention,
)
from depass_lightning.engine.frozen import FrozenBlock
from depass_lightning.engine.isolation import exact
from depass_lightning.engine.mlp import propagate_mlp
from depass_lightning.engine.parallel import ParallelRule
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import Rule
from depass_lightning.engine.state import DecomposedState

Place = Literal["resid_mid", "resid_post"]


class Injection(Protocol):
    """Where components come from, and what they are there."""

    @property
    def first(self) -> int:
        """The first block that is looked at."""
        ...

    def at_entry(self, recording: Recording) -> DecomposedState | None:
        """The components that begin at the entry of block `first`, if any do."""
        ...

    def inside(self, block: FrozenBlock, place: Place) -> ComponentGroup | None:
        """The group of components that begins inside a block, if one does."""
        ...

    def begin(
        self, recording: Recording, group: ComponentGroup, positions: Int[Tensor, "batch position"]
    ) -> DecomposedState:
        """A carry of the first such group."""
        ...


def propagate(
    recording: Recording,
    split: Injection,
    rule: Rule | ParallelRule,
    *,
    stop: int,
    positions: Int[Tensor, "batch target"] | None = None,
) -> Iterator[tuple[int, DecomposedState]]:
    """Carry components from where they begin to a layer, block by block.

    Args:
        recording: the recorded pass.
        split: where components begin.
        rule: how neurons are shared.
        stop: the layer that they are carried to; `recording.layers` is behind the last block.
        positions: `[batch, target]` the only positions needed at `stop`, or None for all.

    Yields:
        Each layer reached with the components that enter it, from the first where there are any. They are
        changed in place by going on.
    """
    device = recording.final_state.device
    everywhere = torch.arange(recording.input_ids.shape[1], device=device).expand(len(recording.lengths), -1)
    with exact(device):
        carry = split.at_entry(recording)
        if carry is not None and split.first == stop and positions is not None:
            carry = carry.select_positions(positions)
    if carry is not None:
        yield split.first, carry
    deferred: NeuronGroup | None = None
    for layer in range(split.first, stop):
        last = layer == stop - 1 and positions is not None
        wanted = positions if last and positions is not None else everywhere
        with exact(device):
            block = recording.block(layer)
            if carry is not None and block.parallel:
                carry.mlp_input = carry.rows.clone()
            if deferred is not None:
                carry, deferred = after_attention(recording, split, deferred, block, wanted), None
            elif carry is not None and last:
                carry = propagate_attention(carry, block.attention, wanted)
            elif carry is not None:
                propagate_attention(carry, block.attention)
            before, group = carry, split.inside(block, "resid_mid")
            carry = _take_in(recording, split, group, carry, wanted)
            if carry is not None and group is not None and block.parallel:
                carry.keep_mlp_input(before)
            if carry is not None:
                propagate_mlp(carry, block.mlp, rule)
            group = split.inside(block, "resid_post")
            ahead = positions is not None and layer == stop - 2 and not block.parallel
            if isinstance(group, NeuronGroup) and carry is None and ahead:
                deferred = group  # only the next attention's target needs it
            else:
                carry = _take_in(recording, split, group, carry, wanted)
        if carry is not None:
            yield layer + 1, carry


def after_attention(
    recording: Recording,
    split: Injection,
    group: NeuronGroup,
    block: FrozenBlock,
    positions: Int[Tensor, "batch target"],
) -> DecomposedState:
    """A group of neurons behind the next block's attention, only at the target, without carrying it there.

    Args:
        recording: the recorded pass.
        split: where the group comes from.
        group: the neurons at the block's entry.
        block: the block.
        positions: `[batch, target]` the targets.
    """
    length = recording.input_ids.shape[1]
    everywhere = torch.arange(length, device=positions.device).expand(len(positions), -1)
    base = split.begin(recording, DenseGroup(group.base), everywhere)
    base = propagate_attention(base, block.attention, positions)
    return split.begin(
        recording, NeuronGroupAfterAttention(group, block.attention, base.dense(), positions), positions
    )


def _take_in(
    recording: Recording,
    split: Injection,
    group: ComponentGroup | None,
    carry: DecomposedState | None,
    positions: Int[Tensor, "batch position"],
) -> DecomposedState | None:
    """Let the group that begins here, if one does, join those that are under way."""
    if group is None:
        return carry
    return split.begin(recording, group, positions) if carry is None else carry.join(group)
