"""Gradient SHAP: gradients at random points between random prompts and the prompt, times the difference.

Source: Lundberg & Lee, "A Unified Approach to Interpreting Model Predictions" (NeurIPS 2017, arXiv
1705.07874); Erion et al., "Improving performance of deep learning models with axiomatic attribution priors"
(2021, arXiv 1906.10670), equation 3, the expected gradients that captum computes under this name.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from captum.attr import GradientShap as Captum
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.gradients import embeddings_of
from depass_lightning.methods.integrated import values_from_embeddings
from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.random_scores import seed_of
from depass_lightning.methods.token_method import TokenBaseline
from depass_lightning.sources import Source


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


class GradientShap(TokenBaseline):
    """Gradient SHAP with prompts of as many tokens, drawn from the vocabulary, as the background.

    The draws depend on the seed and the prompt alone. Captum draws for all rows at once, so prompts run
    one by one.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`.
        samples: the number of points, each between the prompt and a random prompt.
        seed: the seed of the draws.

    Raises:
        DePassError: there are no samples.
    """

    name: ClassVar[str] = "gradient_shap"

    def __init__(
        self, depass: DePass, source: Source | None = None, *, samples: int = 32, seed: int = 0
    ) -> None:
        super().__init__(depass, source)
        if samples < 1:
            raise DePassError(f"{self.name}: samples must be at least 1; got {samples}")
        self.samples = samples
        self.seed = seed

    @override
    def score(self, batch: Batch) -> Tensor:
        scores = torch.zeros(batch.ids.shape, dtype=batch.decoder.dtype, device=batch.ids.device)
        wanted, weights = batch.wanted()
        embeddings = embeddings_of(batch).detach()
        embed = batch.decoder.token_embedding
        for row, ids in enumerate(batch.rows):
            seed, length, rows = seed_of(ids, self.seed), len(ids), slice(row, row + 1)
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(batch.decoder.embedding), (self.samples, length), generator=generator)
            with torch.enable_grad(), seeded(seed, batch.ids.device):
                attributed = Captum(values_from_embeddings).attribute(
                    embeddings[rows, :length].clone().requires_grad_(),
                    baselines=embed(drawn.to(batch.ids.device)).detach(),
                    n_samples=self.samples,
                    additional_forward_args=(
                        batch,
                        batch.ids[rows, :length],
                        batch.positions[rows],
                        wanted[rows],
                        weights[rows],
                    ),
                )
            assert isinstance(attributed, Tensor)
            scores[row, :length] = attributed[0].detach().to(scores).sum(-1)
        return self.summed(batch, scores)
