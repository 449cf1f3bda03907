"""Information flow routes: how close each head's part of a state is to the state that it is added into.

Source: Ferrando & Voita, "Information Flow Routes: Automatically Interpreting Language Models at Scale"
(EMNLP 2024, arXiv 2403.00824), with the proximity of Ferrando et al., "Measuring the Mixing of Contextual
Information in the Transformer" (EMNLP 2022, arXiv 2203.04212).
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.frozen import FrozenBlock
from depass_lightning.engine.norms import past
from depass_lightning.engine.record import record
from depass_lightning.errors import DePassError
from depass_lightning.methods.attention_weights import rolled_out
from depass_lightning.methods.base import TokenBaseline
from depass_lightning.methods.model_runs import Batch


class InformationFlow(TokenBaseline):
    """The flow from each token to the target's position along all routes.

    After a block's attention, the state at position i is a sum of what stood there before and of what each
    head brings from each position j. A part's weight is `max(0, |whole| - |whole - part|)` in L1 norms, and
    the weights of a position are made to sum to one. The flow is their product over all blocks; an MLP
    moves nothing between positions. All routes count: the paper's threshold, which cuts routes for a
    picture, is zero here. The target plays no part.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
    """

    name: ClassVar[str] = "information_flow"

    @override
    def score(self, batch: Batch) -> Tensor:
        batch.values()
        lengths = torch.tensor([len(ids) for ids in batch.rows], device=batch.ids.device)
        recording = record(batch.decoder, batch.ids, lengths, batch.positions[:, None])
        batch.decoder.check_attention(self.name)
        layers = [_routes(recording.block(layer)) for layer in range(recording.layers)]
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        return self.summed(batch, rolled_out(layers)[rows, batch.positions])


def _routes(block: FrozenBlock) -> Float[Tensor, "batch query key"]:
    """Return what part of each position's state after attention comes from each position."""
    if block.attention.gates is not None:
        raise DePassError(
            f"information_flow: attention of block {block.index} has gates, so its heads do not write "
            "mixtures of values; choose another method"
        )
    attention, state = block.attention, past(block.attention.skip, block.resid_pre)
    batch, positions, _ = state.shape
    normed = attention.norm(block.resid_pre.flatten(0, 1), attention.norm.scale.flatten())
    values = normed @ attention.value.weight.T
    constant = attention.norm.constant_through(attention.value)
    if constant is not None:
        values = values + constant
    values = attention.convolved(values.view(batch, positions, -1))
    values = values.unflatten(2, (attention.key_value_heads, -1))  # [batch, position, value head, size]
    values = values.repeat_interleave(attention.heads // attention.key_value_heads, 2)
    written = attention.head_outputs(values)  # [batch, head, key, hidden]
    whole = block.resid_mid
    routes = state.new_zeros(batch, positions, positions)
    for query in range(positions):  # a table of all queries would hold heads x tokens^2 x hidden numbers
        probabilities = attention.probabilities[:, :, query, : query + 1, None]
        parts = probabilities * written[:, :, : query + 1]  # [batch, head, key, hidden]
        size = whole[:, query].abs().sum(-1)
        heads = _proximity(parts, whole[:, query, None, None], size[:, None, None]).sum(1)
        routes[:, query, : query + 1] = heads
        routes[:, query, query] += _proximity(state[:, query], whole[:, query], size)
    return routes / routes.sum(-1, keepdim=True).clamp_min(torch.finfo(routes.dtype).tiny)


def _proximity(part: Tensor, whole: Tensor, size: Tensor) -> Tensor:
    return (size - (whole - part).abs().sum(-1)).clamp_min(0)
