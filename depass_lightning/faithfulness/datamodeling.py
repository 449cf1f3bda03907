"""The linear datamodeling score: how well scores predict the answer under random ablations.

Each candidate token or span is kept with probability 1/2. The sum of the kept ones' scores is what scores
predict, the answer's log-odds in the ablated prompt is what the model gives, and their rank correlation over
many ablations is the score. The last token is always kept.

Source: Cohen-Wang et al., "ContextCite: Attributing Model Generation to Context" (NeurIPS 2024, arXiv
2409.00729), after Park et al., "TRAK" (ICML 2023, arXiv 2303.14186).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.ablated_prompts import AblatedPrompt, answers_of
from depass_lightning.faithfulness.ablation_agreement import rank_correlation
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.faithfulness.evidence import ablated_prompt, prompt_end, text_components, without_last
from depass_lightning.methods.random_scores import seed_of
from depass_lightning.results.attribution import Attribution


@dataclass(frozen=True)
class LinearDatamodeling:
    """The measure `lds`; a case with fewer than two candidates, or constant answers, has none.

    What the model gives the ablated prompts is kept in `cache`: all methods on the same prompts share it.

    Args:
        samples: the number of ablated prompts per prompt.
        seed: of the ablations, which depend on it and on the prompt alone.
        batch_size: the number of ablated prompts in one pass.
        progress: show a progress bar.

    Raises:
        DePassError: there are fewer than two samples.
    """

    samples: int = 64
    seed: int = 0
    batch_size: int = 64
    progress: bool = False
    cache: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    name = "linear datamodeling"
    needs_model = True

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise DePassError(f"a correlation needs two samples at least; got {self.samples}")

    def columns(self, cases: Sequence[Case], depass: DePass) -> list[Columns]:
        """Return the score of every case whose components stand for text and whose target is a token."""
        columns: list[Columns] = [{} for _ in cases]
        predictions: dict[int, Tensor] = {}
        keys: dict[int, object] = {}
        missing: dict[object, list[AblatedPrompt]] = {}
        for index, case in enumerate(cases):
            candidates = removable(case.attribution)
            if not case.answer_ids or len(candidates) < 2:
                continue
            attribution = case.attribution
            generator = torch.Generator().manual_seed(seed_of(attribution.token_ids, self.seed))
            kept = torch.rand(self.samples, len(candidates), generator=generator) < 0.5
            predictions[index] = kept.double() @ attribution.scores[candidates].double()
            spans = tuple(attribution.positions[i] for i in candidates)
            keys[index] = key = (
                tuple(attribution.token_ids),
                attribution.position,
                spans,
                tuple(case.answer_ids),
            )
            if key not in self.cache:
                missing[key] = [ablated(case, candidates, row.tolist()) for row in kept]
        if missing:
            prompts = [prompt for rows in missing.values() for prompt in rows]
            readings = answers_of(depass.model, prompts, self.batch_size, self.progress)
            log_odds = torch.tensor([reading.log_odds for reading in readings], dtype=torch.float64)
            self.cache.update(zip(missing, log_odds.split(self.samples), strict=True))
        for index, predicted in predictions.items():
            correlation = rank_correlation(predicted, self.cache[keys[index]])
            if correlation is not None:
                columns[index] = {"lds": correlation}
        return columns


def removable(attribution: Attribution) -> list[int]:
    """Return the components that stand for text and do not hold the last token."""
    return without_last(attribution, text_components(attribution))


def ablated(case: Case, candidates: Sequence[int], kept: Sequence[bool]) -> AblatedPrompt:
    """Return a case's prompt without some of its components."""
    attribution = case.attribution
    removed: set[int] = set()
    for component, keep in zip(candidates, kept, strict=True):
        if not keep:
            removed.update(range(*(attribution.positions[component] or (0, 0))))
    left = [i for i in range(prompt_end(attribution) + 1) if i not in removed]
    return ablated_prompt(attribution, left, case.answer_ids)
