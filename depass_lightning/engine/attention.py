"""One attention sublayer: a decomposed state in, a decomposed state out (Hong et al., section 3).

With its probabilities and its norm's scale held fixed, attention is linear:

1. norm each component,
2. take values,
3. mix them with the probabilities,
4. project them out and add the result to the component, which a norm on the residual stream scales first.

Values are mixed before they are projected out, so that nothing of size heads x hidden is built.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.engine.frozen import FrozenAttention
from depass_lightning.engine.packing import ComponentBlock
from depass_lightning.engine.state import DecomposedState


def propagate_attention(
    state: DecomposedState, attention: FrozenAttention, positions: Int[Tensor, "batch target"] | None = None
) -> DecomposedState:
    """Add each component's attention output to it.

    Args:
        state: the components; changed in place where all positions are kept.
        attention: the frozen attention.
        positions: the only positions that are needed afterwards, as indices into the state's; None for all.
    """
    if positions is not None and attention.convolution is None:
        return _at_targets(state, attention, positions)
    hidden = state.rows.shape[1]
    value_width, output_width = attention.value.weight.shape[0], attention.output.weight.shape[1]
    limit = state.budget.rows(2 * (hidden + value_width + output_width), state.rows.dtype)
    scale = state.at_positions(attention.norm.scale)
    for block in state.layout.component_blocks(limit):
        outputs = _outputs(state, attention, block, scale)
        if attention.skip is not None:
            past = state.at_positions(attention.skip.scale)[block.places]
            state.rows[block.rows] = attention.skip(state.rows[block.rows], past)
        state.rows.index_add_(0, block.rows, outputs)
        state.release_pages()
    return state if positions is None else state.select_positions(positions)


def _outputs(
    state: DecomposedState, attention: FrozenAttention, block: ComponentBlock, scale: Tensor
) -> Float[Tensor, "row hidden"]:
    """The attention output of a block of components."""
    heads, value_heads, size = attention.heads, attention.key_value_heads, attention.head_size
    batch, positions, count = block.shape
    normed = attention.norm(state.rows.index_select(0, block.rows), scale[block.places])
    values = normed @ attention.value.weight.T  # [row, value head * size]
    constant = attention.norm.constant_through(attention.value)
    if constant is not None:
        values[block.bias] += constant
    # [value head, position, component * size]: mixing is one plain product for each head.
    table = values.new_zeros(batch, value_heads, positions, count, size)
    prompt, position, component = block.where
    table.permute(0, 2, 3, 1, 4)[prompt, position, component] = values.view(-1, value_heads, size)
    if attention.convolution is not None:
        # [batch, position, component, value head * size] and back
        convolved = attention.convolution(table.permute(0, 2, 3, 1, 4).flatten(3), block.first)
        table = convolved.unflatten(3, (value_heads, size)).permute(0, 3, 1, 2, 4).contiguous()
    # Heads that share their values are stacked: [batch, value head, heads of the group * query, key]
    probabilities = attention.probabilities[:, :, block.first :, block.first :]
    probabilities = probabilities.reshape(batch, value_heads, -1, positions)
    mixed = (probabilities @ table.view(batch, value_heads, positions, count * size)).view(
        batch, value_heads, heads // value_heads, positions, count, size
    )
    # Back to rows: [row, head * size]
    mixed = mixed.permute(0, 3, 4, 1, 2, 5)[prompt, position, component].reshape(-1, heads * size)
    if attention.gates is not None:
        mixed = mixed * state.at_positions(attention.gates)[block.places]
    outputs = mixed @ attention.output.weight.T
    if attention.bias_terms is not None:
        outputs[block.bias] += state.at_positions(attention.bias_terms)[block.places[block.bias]]
    return outputs


def _at_targets(
    state: DecomposedState, attention: FrozenAttention, positions: Int[Tensor, "batch target"]
) -> DecomposedState:
    """Compute attention at a few positions only.

    The normed states are mixed before values are taken, which is far cheaper for few queries.
    """
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    queries = attention.probabilities[batch, :, positions]  # [batch, target, head, key]
    kept = state.select_positions(positions)
    gates = None if attention.gates is None else kept.at_positions(attention.gates)
    if attention.skip is not None:
        kept.norm_rows(attention.skip)
    hidden = state.rows.shape[1]
    width = len(positions) * hidden * (2 * state.layout.positions + positions.shape[1] * attention.heads)
    step = state.budget.rows(width, state.rows.dtype)
    for first in range(0, state.layout.components, step):
        components = slice(first, first + step)
        outputs = _target_outputs(state, attention, queries, gates, state.layout.index[:, :, components])
        kept.rows[kept.layout.index[:, :, components].to(state.rows.device)] += outputs
        state.release_pages()
    # Components that are not present at a target have all written into the last row.
    kept.rows[-1] = 0
    _add_constants(kept, attention, queries)
    return kept


def _target_outputs(
    state: DecomposedState,
    attention: FrozenAttention,
    queries: Float[Tensor, "batch target head key"],
    gates: Float[Tensor, "place channel"] | None,
    index: Int[Tensor, "batch position component"],
) -> Float[Tensor, "batch target component hidden"]:
    """The attention output of some components at the targets, without constants."""
    heads, value_heads, size = attention.heads, attention.key_value_heads, attention.head_size
    batch, positions, count = index.shape
    hidden, targets = state.rows.shape[1], queries.shape[1]
    scale = state.at_positions(attention.norm.scale)
    normed = attention.norm(
        state.rows[index.flatten().to(state.rows.device)], scale.repeat_interleave(count)
    ).view(batch, positions, count * hidden)
    # [batch, target * head, component * hidden] -> [batch, target, value head, group, component, hidden]
    mixed = (queries.reshape(batch, targets * heads, positions) @ normed).view(
        batch, targets, value_heads, heads // value_heads, count, hidden
    )
    value = attention.value.weight.view(value_heads, 1, size, hidden)
    output = attention.output.weight.view(hidden, value_heads, heads // value_heads, size)
    values = torch.einsum("btsgch,sgih->btcsgi", mixed, value.expand(-1, heads // value_heads, -1, -1))
    if gates is not None:
        values = values * gates.view(batch, targets, 1, value_heads, -1, size)
    return torch.einsum("btcsgi,hsgi->btch", values, output)


def _add_constants(
    kept: DecomposedState, attention: FrozenAttention, queries: Float[Tensor, "batch target head key"]
) -> None:
    """Add what value and output biases contribute at the targets to the bias component."""
    bias = kept.layout.bias
    if bias is None:
        return
    total = torch.zeros_like(queries[..., 0, :1]).expand(-1, -1, kept.rows.shape[1])
    constant = attention.norm.constant_through(attention.value)
    if constant is not None:
        groups = attention.heads // attention.key_value_heads
        by_head = constant.view(attention.key_value_heads, 1, -1).expand(-1, groups, -1).flatten(0, 1)
        # Rows of probabilities need not sum to one (attention sinks), so the constant is mixed as well.
        mixed = queries.sum(-1)[..., None] * by_head  # [batch, target, head, size]
        if attention.gates is not None:
            mixed = mixed * kept.at_positions(attention.gates).view(mixed.shape)
        total = total + mixed.flatten(2) @ attention.output.weight.T
    if attention.bias_terms is not None:
        total = total + kept.at_positions(attention.bias_terms).view(*kept.positions.shape, -1)
    members = kept.layout.present.shape[3]
    rows = kept.layout.index[:, :, bias::members].to(kept.rows.device)
    kept.rows[rows] += total[:, :, None]
    kept.rows[-1] = 0
