"""How well scores agree with true ablation: correlations and the overlap of the highest, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.faithfulness.true_ablation import Replacement, Target, ablation_effects, places_of
from depass_lightning.methods.random_scores import seed_of
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import prompts_of
from depass_lightning.results.comparison import average_ranks

TOP = 0.1  # fraction of the components


@dataclass(frozen=True)
class Agreement:
    """How scores agree with what ablation takes from the target's value.

    Attributes:
        pearson: the linear correlation; None where one of the two is constant.
        spearman: the rank correlation, ties averaged; None where one of the two is constant.
        top_overlap: the fraction of the highest effects that are among as many highest scores.
    """

    pearson: float | None
    spearman: float | None
    top_overlap: float


def agreement(
    scores: Float[Tensor, "component"], effects: Float[Tensor, "component"], top: float = TOP
) -> Agreement:
    """Compare scores with effects.

    Args:
        scores: a method's scores.
        effects: what the target's value loses without each component.
        top: the fraction of the components that counts as the highest; one component at least.

    Raises:
        DePassError: there are no components, not one effect a score, or the fraction is out of range.
    """
    if scores.shape != effects.shape or not len(scores):
        raise DePassError(f"{len(scores)} scores need as many effects, and one at least; got {len(effects)}")
    if not 0 < top <= 1:
        raise DePassError(f"top is a fraction of the components, above 0 and up to 1; got {top}")
    count = max(1, round(top * len(scores)))
    highest = [
        set(values.sort(descending=True, stable=True).indices[:count].tolist())
        for values in (scores, effects)
    ]
    return Agreement(
        pearson=_correlation(scores.double(), effects.double()),
        spearman=rank_correlation(scores, effects),
        top_overlap=len(highest[0] & highest[1]) / count,
    )


def rank_correlation(a: Float[Tensor, "item"], b: Float[Tensor, "item"]) -> float | None:
    """Return Spearman's rank correlation, ties averaged; None where one of the two is constant."""
    return _correlation(average_ranks(a), average_ranks(b))


def _correlation(a: Tensor, b: Tensor) -> float | None:
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@dataclass(frozen=True)
class AblationAgreement:
    """The measure of agreement with true ablation: see `ablation_effects` and `agreement`.

    Effects are kept in `cache`, so that all methods on the same prompts are held against one ablation.

    Args:
        replacement: `zero`, `mean` over the references, or `resample` from one of them: another prompt with
            as many tokens, drawn by the seed and the prompt; a prompt without one is not measured.
        references: prompts as text.
        start: the first position at which heads, neurons and modules are replaced.
        top: the fraction of the components that counts as the highest.
        seed: of the prompts to resample from.
        batch_size: the number of ablated passes that run together.
        progress: show a progress bar.

    Raises:
        DePassError: there are no references where they are needed.
    """

    replacement: Replacement = "zero"
    references: Sequence[str] = ()
    start: int = 1
    top: float = TOP
    seed: int = 0
    batch_size: int = 64
    progress: bool = False
    cache: dict[object, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    needs_model = True

    def __post_init__(self) -> None:
        if self.replacement != "zero" and not self.references:
            raise DePassError(f"{self.replacement} ablation needs reference prompts")

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"agreement with {self.replacement} ablation"

    def columns(self, cases: Sequence[Case], depass: DePass) -> list[Columns]:
        """Return the correlations and the overlap of every case whose target is a token or a contrast."""
        references = _ids_of(depass, self.references)
        indices, partners, keys = [], [], []
        targets: dict[int, list[Target]] = {}
        for index, case in enumerate(cases):
            ids = case.attribution.token_ids[: case.attribution.last + 1]
            partner = self._partner(ids, references)
            if not case.target_ids or (self.replacement == "resample" and partner is None):
                continue
            _, targets[index] = places_of(depass.decoder, case.attribution)
            keys.append((tuple(ids), tuple(case.target_ids), *(target.key for target in targets[index])))
            indices.append(index)
            partners.append(partner or ())
        self._ablate(depass.decoder, [cases[index] for index in indices], keys, partners, references)
        columns: list[Columns] = [{} for _ in cases]
        for index, key in zip(indices, keys, strict=True):
            scores = cases[index].attribution.scores[[target.index for target in targets[index]]]
            columns[index] = self._columns(scores, torch.tensor(self.cache[key]))
        return columns

    def _ablate(
        self,
        decoder: Decoder,
        cases: Sequence[Case],
        keys: Sequence[object],
        partners: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
    ) -> None:
        """Measure the effects that are not known yet."""
        missing = [i for i, key in enumerate(keys) if key not in self.cache]
        effects = ablation_effects(
            decoder,
            [cases[i].attribution for i in missing],
            self.replacement,
            references=[partners[i] for i in missing] if self.replacement == "resample" else references,
            start=self.start,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        self.cache.update(
            (keys[i], list(losses.values())) for i, losses in zip(missing, effects, strict=True)
        )

    def _columns(self, scores: Tensor, effects: Tensor) -> Columns:
        if len(scores) < 2:
            return {}
        result = agreement(scores, effects, self.top)
        numbers = {"pearson": result.pearson, "spearman": result.spearman, "top": result.top_overlap}
        prefix = f"ablation_{self.replacement}"
        return {f"{prefix}_{name}": number for name, number in numbers.items() if number is not None}

    def _partner(self, ids: Sequence[int], references: Sequence[Sequence[int]]) -> Sequence[int] | None:
        """Return another prompt with as many tokens."""
        others = [other for other in references if len(other) == len(ids) and list(other) != list(ids)]
        return others[seed_of(ids, self.seed) % len(others)] if others else None


def _ids_of(depass: DePass, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of reference prompts."""
    return [prompt.ids for prompt in prompts_of(depass.decoder, depass.tokenizer, list(texts), None, None)]
