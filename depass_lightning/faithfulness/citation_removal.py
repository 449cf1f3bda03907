"""Measures of citations: what the answer loses without the parts of the prompt that scores rank first.

Source: Cohen-Wang et al., "ContextCite: Attributing Model Generation to Context" (NeurIPS 2024, arXiv
2409.00729): the drop of the answer's log-probability when the top k sources are removed, and the linear
datamodeling score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log1p

import torch

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.ablated_prompts import AblatedPrompt, AnswerReading, answers_of
from depass_lightning.faithfulness.datamodeling import LinearDatamodeling, ablated, removable
from depass_lightning.faithfulness.evaluate import Case, Columns
from depass_lightning.methods.random_scores import seed_of


@dataclass(frozen=True)
class CitationRemoval:
    """The measures `drop_1`, `drop_3`, `drop_5` and `lds`.

    `drop_k` is how much the answer's log-probability falls, in nats, with the k components of the highest
    scores removed from the prompt; `drop_k_random` is that of k random ones. A case with fewer than k
    candidates has none. `lds` is that of `LinearDatamodeling`.

    Args:
        samples: the number of ablated prompts of the linear datamodeling score; 0 omits it.
        seed: of the ablations and of the random components.
        batch_size: the number of ablated prompts in one pass.

    Raises:
        DePassError: there is one sample, which has no correlation.
    """

    samples: int = 64
    seed: int = 0
    batch_size: int = 64

    name = "citation removal"
    needs_model = True
    counts = (1, 3, 5)

    def __post_init__(self) -> None:
        if self.samples == 1 or self.samples < 0:
            raise DePassError(f"samples must be 0 or at least 2; got {self.samples}")

    def columns(self, cases: Sequence[Case], depass: DePass) -> list[Columns]:
        """Return the measures of every case whose components stand for text and whose target is an answer."""
        columns: list[Columns] = [{} for _ in cases]
        if self.samples:
            columns = LinearDatamodeling(self.samples, self.seed, self.batch_size).columns(cases, depass)
        prompts: list[AblatedPrompt] = []
        names: list[tuple[int, str]] = []
        for index, case in enumerate(cases):
            candidates = removable(case.attribution)
            if not case.answer_ids or not candidates:
                continue
            scores = case.attribution.scores[candidates]
            generator = torch.Generator().manual_seed(seed_of(case.attribution.token_ids, self.seed))
            orders = {
                "": torch.sort(scores, descending=True, stable=True).indices,
                "_random": torch.randperm(len(candidates), generator=generator),
            }
            removed = {"whole": orders[""][:0]} | {
                f"drop_{count}{suffix}": order[:count]
                for suffix, order in orders.items()
                for count in self.counts
                if count <= len(candidates)
            }
            for name, out in removed.items():
                kept = torch.ones(len(candidates), dtype=torch.bool)
                kept[out] = False
                prompts.append(ablated(case, candidates, kept.tolist()))
                names.append((index, name))
        whole = 0.0
        for (index, name), reading in zip(
            names, answers_of(depass.model, prompts, self.batch_size), strict=True
        ):
            if name == "whole":
                whole = log_probability(reading)
            else:
                columns[index][name] = whole - log_probability(reading)
        return columns


def log_probability(reading: AnswerReading) -> float:
    """Return the logarithm of an answer's probability, exact where that is close to 0 or 1."""
    odds = reading.log_odds
    return -log1p(exp(-odds)) if odds > 0 else odds - log1p(exp(odds))
