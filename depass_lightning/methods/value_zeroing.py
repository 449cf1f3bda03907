"""Value zeroing: how much a token's value vector matters to each block's output, block after block.

Source: Mohebbi et al., "Quantifying Context Mixing in Transformers" (EACL 2023, arXiv 2301.12971). `C[i, j]`
is the cosine distance between a block's output at position i and the same output with the value vector of
position j set to zero in all heads, the block's input unchanged. Rows are made to sum to one, and blocks are
multiplied as in attention rollout; a block's output holds its residual, so that no identity is added.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.attention_weights import rolled_out
from depass_lightning.methods.base import TokenBaseline
from depass_lightning.methods.model_runs import Batch, run
from depass_lightning.models.affine import Projection
from depass_lightning.sources import Source


class ValueZeroing(TokenBaseline):
    """The rollout of how far each block's output moves without a token's value vector.

    One plain pass costs as much as one token: row r of it has the values of token r zeroed in every block,
    and every block's output is put back to the unchanged one before the next block reads it.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
        rows: the number of tokens that are zeroed in one pass.

    Raises:
        DePassError: there are no rows.
    """

    name: ClassVar[str] = "value_zeroing"

    def __init__(self, depass: DePass, source: Source | None = None, *, rows: int = 32) -> None:
        super().__init__(depass, source)
        if rows < 1:
            raise DePassError(f"{self.name}: rows must be at least 1; got {rows}")
        self.rows = rows

    @override
    def score(self, batch: Batch) -> Tensor:
        batch.values()
        scores = torch.zeros(batch.ids.shape, dtype=batch.decoder.dtype, device=batch.ids.device)
        for row, ids in enumerate(batch.rows):
            target, length = int(batch.positions[row]), len(ids)
            layers = torch.cat(
                [self._distances(batch, row, start) for start in range(0, length, self.rows)], -1
            )  # [layer, query, key]
            mixing = layers / layers.sum(-1, keepdim=True).clamp_min(torch.finfo(layers.dtype).tiny)
            scores[row, :length] = rolled_out(list(mixing))[target]
        return self.summed(batch, scores)

    def _distances(self, batch: Batch, row: int, start: int) -> Float[Tensor, "layer query key"]:
        """Return the distances of one prompt, for the keys from `start` on that fit into one pass."""
        batch.decoder.check_attention(self.name)
        decoder, length = batch.decoder, len(batch.rows[row])
        keys = torch.arange(start, min(start + self.rows, length), device=batch.ids.device)
        ids = batch.ids[row, :length].expand(1 + len(keys), -1)  # row 0 stays as it is
        distances: list[Tensor] = []

        def compare(_module: nn.Module, _arguments: object, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            unchanged = states[:1].to(decoder.dtype)
            cosine = nn.functional.cosine_similarity(states[1:].to(decoder.dtype), unchanged, dim=-1)
            distances.append((1 - cosine).clamp_min(0).T.to(batch.ids.device))  # [query, key]
            restored = states[:1].expand_as(states).clone()
            return (restored, *output[1:]) if isinstance(output, tuple) else restored

        with ExitStack() as stack:
            for block in decoder.blocks:
                value = block.attention.value
                stack.callback(value.module.register_forward_hook(_zeroing(value, keys)).remove)
                stack.callback(block.module.register_forward_hook(compare).remove)
            run(decoder, ids, batch.positions[row].repeat(len(ids)))
        return torch.stack(distances)


def _zeroing(value: Projection, keys: Tensor) -> Callable[..., Tensor]:
    """Return a hook that sets the value vector of key k to zero in row k + 1."""

    def zero(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        changed = output.clone()
        table = changed.view(len(keys) + 1, -1, output.shape[-1])  # some models put all positions in one row
        rows = torch.arange(1, len(keys) + 1, device=output.device)
        columns = slice(None) if value.rows is None else value.rows
        vectors = table[rows, keys.to(output.device)]
        vectors[:, columns] = 0
        table[rows, keys.to(output.device)] = vectors
        return changed

    return zero
