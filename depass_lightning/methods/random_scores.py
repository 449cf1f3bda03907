"""Random scores, which every method has to beat."""

import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.methods.base import Baseline
from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.places import places_in
from depass_lightning.sources import Heads, Module, Neurons, Source, Spans, Tokens
from depass_lightning.sources.tokens import Positional


def seed_of(ids: Sequence[int], seed: int) -> int:
    """Return a seed below 2 to the power of 32 that depends on a prompt and on another seed alone."""
    return zlib.crc32(f"{seed} {list(ids)}".encode())


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed inside, and restore the random states afterwards.

    Args:
        seed: below 2 to the power of 32.
        device: the device, other than the CPU, that numbers are drawn on.
    """
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # captum uses NumPy's generator
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


class Random(Baseline):
    """Scores between 0 and 1 that depend on the prompt and the seed alone, not on the batch.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()`, `Spans(...)`, `Heads()`, `Neurons()` or `Module(...)`.
        seed: the seed of the draws.
    """

    name: ClassVar[str] = "random"
    sources: ClassVar[tuple[type[Source], ...]] = (Tokens, Spans, Heads, Neurons, Module)

    def __init__(self, depass: DePass, source: Source | None = None, *, seed: int = 0) -> None:
        super().__init__(depass, source)
        self.seed = seed

    @override
    def score(self, batch: Batch) -> Tensor:
        layers, components = self._components(batch)
        scores = torch.zeros(len(batch.rows), layers, 1 + max(map(max, components)))
        for row, present, ids in zip(scores, components, batch.rows, strict=True):
            generator = torch.Generator().manual_seed(seed_of(ids, self.seed))
            row[:, present] = torch.rand(layers, len(present), generator=generator)
        return scores

    def _components(self, batch: Batch) -> tuple[int, list[list[int]]]:
        """Return the number of layers, and the components of each prompt."""
        source, decoder = self.source, batch.decoder
        if isinstance(source, Positional):
            both = zip(batch.prompts, batch.rows, strict=True)
            return 1, [sorted(set(source.owners(prompt)[: len(ids)])) for prompt, ids in both]
        places = places_in(decoder, source)
        count = len(source.chosen(torch.arange(places[0].count)))
        return len(places), [list(range(count))] * len(batch.rows)


class RandomLastFirst(Random):
    """Random scores with the last token, after which the target is read, always first.

    The control of deletion and insertion curves: what it gains over `Random` is gained by ranking the last
    token first, not by evidence.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
        seed: the seed of the draws.
    """

    name: ClassVar[str] = "random_last_first"
    sources: ClassVar[tuple[type[Source], ...]] = (Tokens, Spans)

    @override
    def score(self, batch: Batch) -> Tensor:
        scores = super().score(batch)
        assert isinstance(self.source, Positional)
        for row, prompt, position in zip(scores, batch.prompts, batch.positions.tolist(), strict=True):
            row[:, self.source.owners(prompt)[position]] += 1
        return scores
