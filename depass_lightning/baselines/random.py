"""Random scores, which every method has to beat."""

import zlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from depass_lightning.baselines.base import Baseline
from depass_lightning.baselines.forward import Batch
from depass_lightning.baselines.sites import sites_of
from depass_lightning.depass import DePass
from depass_lightning.sources import Heads, Neurons, Source, Tokens


def seed_of(ids: Sequence[int], seed: int) -> int:
    """Return a seed below 2 to the power of 32 that depends on a prompt and on another seed alone.

    Args:
        ids: the prompt's tokens.
        seed: the other seed.
    """
    return zlib.crc32(f"{seed} {list(ids)}".encode())


class Random(Baseline):
    """Scores between 0 and 1, drawn anew for every prompt: its place and its batch do not matter.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()`, `Heads()` or `Neurons()`.
        seed: of the draws.
    """

    name: ClassVar[str] = "random"
    sources: ClassVar[tuple[type[Source], ...]] = (Tokens, Heads, Neurons)

    def __init__(self, depass: DePass, source: Source | None = None, *, seed: int = 0) -> None:
        super().__init__(depass, source)
        self.seed = seed

    def score(self, batch: Batch) -> Tensor:
        source, decoder = self.source, batch.decoder
        width = batch.ids.shape[1]
        layers = 1
        if isinstance(source, Heads):
            layers, width = len(source.layers(len(decoder.blocks))), decoder.heads
        elif isinstance(source, Neurons):
            sites = sites_of(decoder, source)
            layers, width = len(sites), sites[0].count
            if source.indices is not None:
                width = len(source.indices)
        scores = torch.zeros(len(batch.rows), layers, width)
        for row, ids in zip(scores, batch.rows, strict=True):
            own = len(ids) if source.positional else width
            generator = torch.Generator().manual_seed(seed_of(ids, self.seed))
            row[:, :own] = torch.rand(layers, own, generator=generator)
        return scores
