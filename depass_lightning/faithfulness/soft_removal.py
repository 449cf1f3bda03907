"""Soft removal: embeddings dropped out in proportion to scores, the expected retention held equal.

Every dimension of a token's embedding is kept with a probability r of that token, else set to zero. For
sufficiency r rises with the token's score; for comprehensiveness it falls. A method whose normalised scores
are larger on average would keep more of every prompt, and so look better than it is: here the mean of r over
tokens is the same for every method.

With p the answer's probability in the prompt, p' its mean over soft prompts, p0 the one with all candidates'
embeddings at zero, and lost = max(0, p - p0):

    soft_sufficiency = 1 - max(0, p - p') / lost      soft_comprehensiveness = max(0, p - p') / lost

Both are better higher.

Source: Zhao & Aletras, "Incorporating Attribution Importance for Improving Faithfulness Metrics" (ACL 2023,
arXiv 2305.10496), Soft-NS and Soft-NC; Huang & Chan, "Faithfulness Evaluation for Decoder-only LLM
Attributions with Controlled Retained Information" (2026, arXiv 2601.03089), for the equal expected retention.
How scores become probabilities is ours: shifted and scaled to 0 to 1 per prompt, then multiplied by one
factor that makes the mean exact; where that would exceed 1, the complements are multiplied instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.datamodeling import removable
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.methods.model_runs import as_depass_runs
from depass_lightning.methods.places import Place, replaced
from depass_lightning.methods.random_scores import seed_of
from depass_lightning.models.decoder import Decoder


def retentions(scores: Float[Tensor, "token"], mean: float) -> Float[Tensor, "token"]:
    """Return probabilities of being kept that rise with scores and have a given mean.

    Args:
        scores: one per token.
        mean: the expected fraction that is kept, between 0 and 1.

    Raises:
        DePassError: the mean is out of range.
    """
    if not 0 < mean < 1:
        raise DePassError(f"the expected retention must be between 0 and 1; got {mean}")
    scores = scores.double()
    spread = scores.max() - scores.min()
    if spread == 0:
        return torch.full_like(scores, mean)
    normalised = (scores - scores.min()) / spread
    average = normalised.mean()
    if mean <= average:
        return normalised * (mean / average)
    return 1 - (1 - normalised) * ((1 - mean) / (1 - average))


@dataclass(frozen=True)
class SoftRemoval:
    """The measures `soft_sufficiency` and `soft_comprehensiveness`.

    A case has none where zeroed embeddings do not take any of the answer's probability.

    Args:
        retention: the expected fraction of the embeddings that is kept.
        samples: the number of soft prompts per prompt and measure.
        seed: of what is dropped, which depends on it and on the prompt alone.

    Raises:
        DePassError: the retention is not between 0 and 1, or there are no samples.
    """

    retention: float = 0.5
    samples: int = 32
    seed: int = 0

    name = "soft removal"
    needs_model = True

    def __post_init__(self) -> None:
        if not 0 < self.retention < 1:
            raise DePassError(f"the expected retention must be between 0 and 1; got {self.retention}")
        if self.samples < 1:
            raise DePassError(f"soft removal needs one sample at least; got {self.samples}")

    def columns(self, cases: Sequence[Case], depass: DePass) -> list[Columns]:
        """Return both measures of every case whose components stand for text and whose target is a token."""
        return [
            self._case(case, depass.decoder) if case.target_ids and removable(case.attribution) else {}
            for case in cases
        ]

    def _case(self, case: Case, decoder: Decoder) -> Columns:
        attribution, candidates = case.attribution, removable(case.attribution)
        scores = attribution.scores[candidates].double()
        generator = torch.Generator().manual_seed(seed_of(attribution.token_ids, self.seed))
        dropped = []
        for values in (scores, -scores):
            kept = torch.ones(attribution.last + 1, dtype=torch.float64)
            for component, probability in zip(candidates, retentions(values, self.retention), strict=True):
                kept[slice(*(attribution.positions[component] or (0, 0)))] = probability
            shape = self.samples, len(kept), decoder.hidden_size
            dropped.append(torch.rand(shape, generator=generator, dtype=torch.float64) >= kept[:, None])
        empty = torch.zeros(1, attribution.last + 1, decoder.hidden_size, dtype=torch.bool)
        for component in candidates:
            empty[:, slice(*(attribution.positions[component] or (0, 0)))] = True
        nothing = torch.zeros_like(empty)
        probabilities = self._probabilities(case, decoder, torch.cat([*dropped, empty, nothing]))
        sufficient, comprehensive, (none, whole) = probabilities.split([self.samples, self.samples, 2])
        lost = max(0.0, float(whole - none))
        if not lost:
            return {}
        missing, taken = (max(0.0, float(whole - soft.mean())) for soft in (sufficient, comprehensive))
        return {"soft_sufficiency": (lost - missing) / lost, "soft_comprehensiveness": taken / lost}

    def _probabilities(self, case: Case, decoder: Decoder, dropped: Tensor) -> Tensor:
        """Return the answer's probability with dimensions of embeddings dropped, a row each."""
        embedding = decoder.token_embedding
        place = Place(embedding, decoder.hidden_size)  # each dimension by itself
        position = case.attribution.position
        ids = torch.tensor([case.attribution.token_ids[: case.attribution.last + 1]], device=decoder.device)
        with as_depass_runs(decoder), replaced({"embedding": place}, {"embedding": dropped}, {}):
            logits, _, _ = decoder.logits(
                ids.expand(len(dropped), -1), torch.tensor([position], device=ids.device)
            )
        return logits[:, 0].double().softmax(-1)[:, case.target_ids[0]].cpu()
