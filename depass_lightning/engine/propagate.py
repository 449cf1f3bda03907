"""Propagate components through frozen blocks, one after another (Hong et al., section 3).

1. Components start at a block's entry, between its attention and its MLP, or after its MLP.
2. Each block propagates them through its attention (`engine/attention.py`) and its MLP (`engine/mlp.py`).
3. Only the target's positions are needed after the last block, so only these go through it.
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
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.mlp import propagate_mlp
from depass_lightning.engine.parallel import ParallelRule
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import Rule
from depass_lightning.engine.state import DecomposedState

Place = Literal["resid_mid", "resid_post"]


class Injection(Protocol):
    """Where the components of a source enter the residual stream, and their states there."""

    @property
    def first(self) -> int:
        """The first block at which components may start."""
        ...

    def at_entry(self, recording: Recording) -> DecomposedState | None:
        """The components that start at the entry of block `first`, if any do."""
        ...

    def inside(self, block: FrozenBlock, place: Place) -> ComponentGroup | None:
        """The group of components that starts inside a block, if one does."""
        ...

    def begin(
        self, recording: Recording, group: ComponentGroup, positions: Int[Tensor, "batch position"]
    ) -> DecomposedState:
        """Start a state with the first such group."""
        ...


def propagate(
    recording: Recording,
    injection: Injection,
    rule: Rule | ParallelRule,
    *,
    stop: int,
    positions: Int[Tensor, "batch target"] | None = None,
) -> Iterator[tuple[int, DecomposedState]]:
    """Propagate components from where they start to a layer, block by block.

    Args:
        recording: the recorded pass.
        injection: where components start.
        rule: how neurons are shared.
        stop: the layer to reach; `recording.layers` is after the last block.
        positions: `[batch, target]` the only positions that are needed at `stop`; None for all.

    Yields:
        Each layer that is reached, and the components that enter it. They are changed in place when the
        iteration continues.
    """
    device = recording.final_state.device
    everywhere = torch.arange(recording.input_ids.shape[1], device=device).expand(len(recording.lengths), -1)
    with exact(device):
        state = injection.at_entry(recording)
        if state is not None and injection.first == stop and positions is not None:
            state = state.select_positions(positions)
    if state is not None:
        yield injection.first, state
    deferred: NeuronGroup | None = None
    for layer in range(injection.first, stop):
        targets = positions if layer == stop - 1 else None
        kept = everywhere if targets is None else targets
        with exact(device):
            block = recording.block(layer)
            if state is not None and block.parallel:
                state.mlp_input = state.rows.clone()
            if deferred is not None:
                state, deferred = after_attention(recording, injection, deferred, block, kept), None
            elif state is not None:
                state = propagate_attention(state, block.attention, targets)
            earlier, group = state, injection.inside(block, "resid_mid")
            state = _join(recording, injection, group, state, kept)
            if state is not None and group is not None and block.parallel:
                state.keep_mlp_input(earlier)
            if state is not None:
                local = rule.for_block(layer) if isinstance(rule, LinearPaths) else rule
                propagate_mlp(state, block.mlp, local)
            group = injection.inside(block, "resid_post")
            next_is_last = positions is not None and layer == stop - 2
            direct = next_is_last and recording.decoder.blocks[layer + 1].attention.has_plain_values
            if isinstance(group, NeuronGroup) and state is None and direct and not block.parallel:
                deferred = group  # the next block's attention reads it at the targets only
            else:
                state = _join(recording, injection, group, state, kept)
            del block, group  # releases gathered weights before the next block's are gathered
        if state is not None:
            yield layer + 1, state


def after_attention(
    recording: Recording,
    injection: Injection,
    group: NeuronGroup,
    block: FrozenBlock,
    positions: Int[Tensor, "batch target"],
) -> DecomposedState:
    """Return a group of neurons after the next block's attention, at the targets, without propagating it."""
    length = recording.input_ids.shape[1]
    everywhere = torch.arange(length, device=positions.device).expand(len(positions), -1)
    base = injection.begin(recording, DenseGroup(group.base), everywhere)
    base = propagate_attention(base, block.attention, positions)
    return injection.begin(
        recording, NeuronGroupAfterAttention(group, block.attention, base.dense(), positions), positions
    )


def _join(
    recording: Recording,
    injection: Injection,
    group: ComponentGroup | None,
    state: DecomposedState | None,
    positions: Int[Tensor, "batch position"],
) -> DecomposedState | None:
    """Add a group that starts here, if one does, to the components that are propagated already."""
    if group is None:
        return state
    return injection.begin(recording, group, positions) if state is None else state.join(group)
