"""LIME: a sparse linear model of the target's value near the whole prompt.

Source: Ribeiro et al., "Why Should I Trust You? Explaining the Predictions of Any Classifier" (KDD 2016,
arXiv 1602.04938), algorithm 1. Perturbations, weights and the LASSO are captum's: each token or span is kept
with probability 1/2, and an ablated prompt weighs the more the more of the prompt it keeps.
"""

from typing import ClassVar

import torch
from captum._utils.models.linear_model import SkLearnLasso
from captum.attr import Lime as Captum
from torch import Tensor
from typing_extensions import override

from depass_lightning.methods.shap import seeded
from depass_lightning.methods.token_subsets import ITERATIONS, SurrogateBaseline, Values


class Lime(SurrogateBaseline):
    """The weights of a LASSO from which tokens or spans are kept to the target's value.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`, whose tokens go together.
        samples: the number of ablated prompts.
        alpha: the weight of the L1 penalty.
        seed: of the draws.
        how: `remove` takes tokens out of the prompt, which is encoded again and read after its last token;
            `zero` sets their embeddings to zero and keeps all positions.
        rows: the number of ablated prompts in one pass.

    Raises:
        DePassError: `how` is unknown, a number is less than one, or alpha is not positive.
    """

    name: ClassVar[str] = "lime"

    @override
    def fit(self, values: Values, count: int, seed: int) -> Tensor:
        with seeded(seed, torch.device("cpu")):
            lasso = SkLearnLasso(alpha=self.alpha, max_iter=ITERATIONS)
            scores = Captum(lambda kept: values(kept > 0.5), interpretable_model=lasso).attribute(
                torch.ones(1, count, dtype=torch.float64),
                n_samples=self.samples,
                perturbations_per_eval=self.rows,
            )
        return scores[0]
