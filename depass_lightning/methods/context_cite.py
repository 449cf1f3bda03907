"""ContextCite: a sparse linear surrogate of the answer's log-odds, fitted to random ablations.

Source: Cohen-Wang et al., "ContextCite: Attributing Model Generation to Context" (NeurIPS 2024, arXiv
2409.00729), section 3. Each token or span is kept with probability 1/2, independently; a LASSO with the
standardised indicators as inputs predicts what the ablated prompts give, and its weights, taken back to the
indicators' own scale, are the scores.
"""

from typing import ClassVar

import torch
from sklearn.linear_model import Lasso
from torch import Tensor
from typing_extensions import override

from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.token_subsets import ITERATIONS, SurrogateBaseline, Values


class ContextCite(SurrogateBaseline):
    """The weights of a LASSO from which tokens or spans are kept to the log-odds of the target.

    For a token these are its logit less the logarithm of the summed exponentials of all other logits; for a
    contrast the difference of the two logits.

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

    name: ClassVar[str] = "context_cite"

    @override
    def read(self, batch: Batch, logits: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
        values = super().read(batch, logits, wanted, weights)
        others = logits.to(values.dtype).scatter(1, wanted[:, :1], -torch.inf).logsumexp(1)
        return torch.where(weights[:, 1] == 0, values - others, values)

    @override
    def fit(self, values: Values, count: int, seed: int) -> Tensor:
        kept = torch.rand(self.samples, count, generator=torch.Generator().manual_seed(seed)) < 0.5
        outputs = values(kept).double().cpu()
        indicators = kept.double()
        scale = indicators.std(0, correction=0)
        varies = scale > 0  # a candidate that is kept in every draw, or in none, has no weight
        weights = torch.zeros(count, dtype=torch.float64)
        if varies.any():
            inputs = (indicators - indicators.mean(0))[:, varies] / scale[varies]
            lasso = Lasso(alpha=self.alpha, max_iter=ITERATIONS).fit(inputs.numpy(), outputs.numpy())
            weights[varies] = torch.from_numpy(lasso.coef_).double() / scale[varies]
        return weights
