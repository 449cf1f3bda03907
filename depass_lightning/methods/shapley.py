"""Shapley values of tokens or spans, by sampling orders in which they enter the prompt.

Source: Castro et al., "Polynomial calculation of the Shapley value based on sampling" (2009); Strumbelj &
Kononenko, "An Efficient Explanation of Individual Classifications using Game Theory" (JMLR 2010). The
sampling is captum's.
"""

from typing import ClassVar

import torch
from captum.attr import ShapleyValueSampling
from torch import Tensor
from typing_extensions import override

from depass_lightning.methods.shap import seeded
from depass_lightning.methods.token_subsets import SubsetBaseline, Values


class Shapley(SubsetBaseline):
    """What a token or span adds to the target's value, the mean over random orders of entering.

    Scores sum to the value less what it is with no text at all, whatever the number of orders. One order
    takes as many ablated prompts as there are tokens or spans.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`, whose tokens go together.
        samples: the number of orders.
        seed: of the draws.
        how: `remove` takes tokens out of the prompt, which is encoded again and read after its last token;
            `zero` sets their embeddings to zero and keeps all positions.
        rows: the number of ablated prompts in one pass.

    Raises:
        DePassError: `how` is unknown, or a number is less than one.
    """

    name: ClassVar[str] = "shapley"

    @override
    def fit(self, values: Values, count: int, seed: int) -> Tensor:
        with seeded(seed, torch.device("cpu")):
            scores = ShapleyValueSampling(lambda kept: values(kept > 0.5)).attribute(
                torch.ones(1, count, dtype=torch.float64),
                n_samples=self.samples,
                perturbations_per_eval=self.rows,
            )
        return scores[0]
