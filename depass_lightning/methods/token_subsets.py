"""Methods that are fitted to the target's value on subsets of a prompt's tokens or spans.

Sources: Castro et al., "Polynomial calculation of the Shapley value based on sampling" (2009), and Strumbelj
& Kononenko, "An Efficient Explanation of Individual Classifications using Game Theory" (JMLR 2010), for
Shapley values; Ribeiro et al., "Why Should I Trust You? Explaining the Predictions of Any Classifier" (KDD
2016, arXiv 1602.04938), algorithm 1, for LIME; Cohen-Wang et al., "ContextCite: Attributing Model Generation
to Context" (NeurIPS 2024, arXiv 2409.00729), section 3. Shapley values and LIME are captum's.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnLasso
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import Lasso
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.occlusion import AblationBaseline
from depass_lightning.methods.random_scores import seed_of, seeded
from depass_lightning.sources import Source
from depass_lightning.utils.sections import ablatable

ITERATIONS = 100_000  # of a LASSO; fewer draws than candidates converge slowly

Values = Callable[[Bool[Tensor, "subset candidate"]], Float[Tensor, "subset *reading"]]
"""The target's value, or what a method reads in its place, with only the candidates kept that are true."""


class SubsetBaseline(AblationBaseline):
    """A method that is fitted to the target's value on subsets of a prompt's tokens or spans.

    Special tokens and a template, which stand for no text, and an encoder's token at which the target is
    read are never removed and score zero; with documents, only these are removed. What is drawn depends on
    the seed and the prompt alone.

    Raises:
        DePassError: `how` is unknown, or a number is less than one.
    """

    def __init__(
        self,
        depass: DePass,
        source: Source | None = None,
        *,
        samples: int = 32,
        seed: int = 0,
        how: Literal["remove", "zero"] = "remove",
        rows: int = 64,
    ) -> None:
        super().__init__(depass, source, how=how, rows=rows)
        if samples < 1:
            raise DePassError(f"{self.name}: samples must be at least 1; got {samples}")
        self.samples = samples
        self.seed = seed

    @override
    def score(self, batch: Batch) -> Tensor:
        whole, owners = batch.values(), self.owners(batch)
        scores = whole.new_zeros(len(whole), int(owners.max()) + 1)
        for row, ids in enumerate(batch.rows):
            candidates = self._candidates(batch, row, owners[row])
            if len(candidates):
                values = self._values(batch, row, owners[row], candidates)
                fitted = self.fit(values, len(candidates), seed_of(ids, self.seed))
                scores[row, candidates] = fitted.to(scores)
        return scores[:, None, 1:]

    @abstractmethod
    def fit(self, values: Values, count: int, seed: int) -> Float[Tensor, "candidate"]:
        """Return the scores of one prompt's candidates."""

    def _candidates(self, batch: Batch, row: int, owners: Tensor) -> Tensor:
        """Return the numbers of the components of one prompt that stand for text."""
        prompt, count = batch.prompts[row], len(batch.rows[row])
        text = ablatable(prompt.text, prompt.sections, prompt.offsets, count)
        # An encoder keeps the token at which the target is read.
        read = None if batch.decoder.causal else int(batch.positions[row])
        return owners[[i for i in text if i < count and i != read]].unique()

    def _values(self, batch: Batch, row: int, owners: Tensor, candidates: Tensor) -> Values:
        def values(kept: Tensor) -> Tensor:
            removed = removed_positions(kept, owners, candidates)
            return self.values(batch, torch.full((len(kept),), row, device=owners.device), removed)

        return values


def removed_positions(
    kept: Bool[Tensor, "subset candidate"],
    owners: Int[Tensor, "position"],
    candidates: Int[Tensor, "candidate"],
) -> Bool[Tensor, "subset position"]:
    """Return the positions of the candidates that are not kept."""
    members = owners[:, None] == candidates  # [position, candidate]
    return (~kept.to(members.device)).double() @ members.T.double() > 0


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
            scores = captum.attr.ShapleyValueSampling(lambda kept: values(kept > 0.5)).attribute(
                torch.ones(1, count, dtype=torch.float64),
                n_samples=self.samples,
                perturbations_per_eval=self.rows,
            )
        return scores[0]


class SurrogateBaseline(SubsetBaseline):
    """A linear surrogate with an L1 penalty, from which tokens or spans are kept to the target's value.

    Raises:
        DePassError: `how` is unknown, a number is less than one, or alpha is not positive.
    """

    def __init__(
        self,
        depass: DePass,
        source: Source | None = None,
        *,
        samples: int = 32,
        alpha: float = 0.01,
        seed: int = 0,
        how: Literal["remove", "zero"] = "remove",
        rows: int = 64,
    ) -> None:
        super().__init__(depass, source, samples=samples, seed=seed, how=how, rows=rows)
        if not alpha > 0:
            raise DePassError(f"{self.name}: alpha must be positive; got {alpha}")
        self.alpha = alpha


class Lime(SurrogateBaseline):
    """The weights of a LASSO from which tokens or spans are kept to the target's value.

    Each is kept with probability 1/2, and an ablated prompt weighs the more the more of the prompt it keeps.

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
            scores = captum.attr.Lime(lambda kept: values(kept > 0.5), interpretable_model=lasso).attribute(
                torch.ones(1, count, dtype=torch.float64),
                n_samples=self.samples,
                perturbations_per_eval=self.rows,
            )
        return scores[0]


class ContextCite(SurrogateBaseline):
    """The weights of a LASSO from which tokens or spans are kept to the log-odds of the target.

    Each is kept with probability 1/2, independently. The LASSO's inputs are standardised indicators, whose
    weights are taken back to the indicators' scale. For a token the log-odds are its logit less the logarithm
    of the summed exponentials of all other logits; for a contrast the difference of the two logits.

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
            # Without a random state it draws from NumPy's global generator, which a training shares.
            lasso = Lasso(alpha=self.alpha, max_iter=ITERATIONS, random_state=0).fit(
                inputs.numpy(), outputs.numpy()
            )
            weights[varies] = torch.from_numpy(lasso.coef_).double() / scale[varies]
        return weights
