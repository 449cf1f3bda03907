"""Fit the weights of a linear rule to true ablations, by least squares on their agreement with scores.

1. Ablate every component of some prompts for real (`ablation_effects`).
2. With the effects and a rule's scores of a prompt standardised, half their mean squared difference is one
   less their correlation. Minimise its mean over prompts, kinds of components and replacements.
3. The parameters are two a depth: the gate's weight against the up map's, and the weight of attention's
   scores against its values. Whatever they are, the rule is complete (`CalibratedRule`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import least_squares
from torch import Tensor

from depass_lightning.attribution.attribute import attribute
from depass_lightning.attribution.question import Question
from depass_lightning.attribution.settings import settings_of
from depass_lightning.depass import DePass
from depass_lightning.engine.linear_rules import CalibratedRule, HalfRule, LinearPaths
from depass_lightning.faithfulness.true_ablation import Replacement, ablation_effects
from depass_lightning.prompts import prompts_of
from depass_lightning.results.attribution import Attribution
from depass_lightning.sources import Heads, Module, Source, Tokens
from depass_lightning.targets import AnswerTarget
from depass_lightning.tasks import Example

KINDS: dict[str, Source] = {"heads": Heads(), "mlps": Module("mlp"), "tokens": Tokens()}
START = 0.5, 0.0  # the weights of `half`
PULL = 1e-4  # weight of the squared distance to the start, for what ablations do not determine
STEP = 0.05  # of the difference quotients: scores are polynomials in the weights
EVALUATIONS = 12  # of the derivative, at most


@dataclass(frozen=True)
class Ablated:
    """Prompts with the effects of their components' ablation.

    Args:
        questions: one a prompt.
        kinds: the kinds of components, keys of `KINDS`.
        indices: `[prompt][kind]` which components were ablated.
        effects: `[prompt][kind]` by replacement what the target's value loses without each of them.
    """

    questions: list[Question]
    kinds: Sequence[str]
    indices: list[list[list[int]]]
    effects: list[list[dict[str, Tensor]]]

    def agreements(self, depass: DePass, rule: LinearPaths, batch_size: int = 16) -> list[dict[str, float]]:
        """Return each prompt's correlations, by kind and replacement."""
        scores = scores_of(depass, self.questions, self.kinds, rule, batch_size)
        return [
            {
                f"{kind}_{name}": float(_standardised(effect) @ _standardised(scored.scores[index]))
                / len(index)
                for kind, index, named, scored in zip(self.kinds, indices, effects, by_kind, strict=True)
                for name, effect in named.items()
                if len(index) > 1
            }
            for indices, effects, by_kind in zip(self.indices, self.effects, scores, strict=True)
        ]

    def residuals(self, depass: DePass, rule: LinearPaths, batch_size: int = 16) -> Float[Tensor, "residual"]:
        """Return the differences whose squares sum to the mean of one less the correlation."""
        scores = scores_of(depass, self.questions, self.kinds, rule, batch_size)
        parts = [
            (_standardised(effect) - _standardised(scored.scores[index])) / (2 * len(index)) ** 0.5
            for indices, effects, by_kind in zip(self.indices, self.effects, scores, strict=True)
            for index, named, scored in zip(indices, effects, by_kind, strict=True)
            for effect in named.values()
            if len(index) > 1
        ]
        return torch.cat(parts) / len(parts) ** 0.5


def _standardised(values: Float[Tensor, "component"]) -> Float[Tensor, "component"]:
    centred = values.double() - values.double().mean()
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def scores_of(
    depass: DePass, questions: Sequence[Question], kinds: Sequence[str], rule: LinearPaths, batch_size: int
) -> list[list[Attribution]]:
    """Return each prompt's scores under a linear rule, `[prompt][kind]`, from one recorded pass."""
    sources = [KINDS[kind] for kind in kinds]
    settings = settings_of(depass.decoder, sources, rule="shap", memory_budget=depass.memory_budget)
    settings = replace(settings, rule=rule, rule_name=rule.name)
    asked = [[question] for question in questions]
    scored = attribute(depass.decoder, depass.tokenizer, asked, settings, batch_size=batch_size)
    return [[by_target[0] for by_target in by_source] for by_source in scored]


def ablate(
    depass: DePass,
    examples: Sequence[Example],
    kinds: Sequence[str],
    replacements: Sequence[Replacement],
    target: AnswerTarget,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Ablated:
    """Ablate every component of prompts, one after another.

    Args:
        depass: the model.
        examples: the prompts with their answers.
        kinds: the kinds of components, keys of `KINDS`.
        replacements: zero, or the mean over the prompts themselves.
        target: what is explained of an answer.
        batch_size: how many ablated passes run together.
        progress: show progress bars.

    Raises:
        DePassError: as for `ablation_effects`.
    """
    decoder, texts = depass.decoder, [example.prompt for example in examples]
    prompts = prompts_of(decoder, depass.tokenizer, texts, None, None)
    questions = [
        Question.of(decoder, depass.tokenizer, prompt, example.target(target))
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    scored = scores_of(depass, questions, kinds, HalfRule(), batch_size=16)
    references = [prompt.ids for prompt in prompts]
    indices: list[list[list[int]]] = [[] for _ in examples]
    effects: list[list[dict[str, Tensor]]] = [[] for _ in examples]
    for number in range(len(kinds)):
        attributions = [by_kind[number] for by_kind in scored]
        options = {"references": references, "batch_size": batch_size, "progress": progress}
        by_replacement = {
            name: ablation_effects(decoder, attributions, name, **options) for name in replacements
        }
        for row in range(len(examples)):
            losses = {name: by_prompt[row] for name, by_prompt in by_replacement.items()}
            indices[row].append(list(next(iter(losses.values()))))
            effects[row].append({name: torch.tensor(list(loss.values())) for name, loss in losses.items()})
    return Ablated(questions, kinds, indices, effects)


def depth_of(block: int, blocks: int, depths: int) -> int:
    """Return which of the equal depths a block belongs to."""
    return block * depths // blocks


def fit(depass: DePass, ablated: Ablated, depths: int, batch_size: int = 16) -> list[tuple[float, float]]:
    """Return the fitted weights of the gate and of attention's scores, of each block."""
    blocks = len(depass.decoder.blocks)
    start = np.repeat(START, depths)

    def of_blocks(parameters: np.ndarray) -> list[tuple[float, float]]:
        gates, scores = parameters.reshape(2, depths).tolist()
        places = [depth_of(block, blocks, depths) for block in range(blocks)]
        return [(gates[place], scores[place]) for place in places]

    def residuals(parameters: np.ndarray) -> np.ndarray:
        rule = CalibratedRule(blocks=tuple(CalibratedRule.weights(*pair) for pair in of_blocks(parameters)))
        pulled = PULL**0.5 * (parameters - start)
        return np.concatenate([ablated.residuals(depass, rule, batch_size).numpy(), pulled])

    # Inside the bounds, so that the first step may go either way.
    inside = np.clip(start, STEP, 1 - STEP)
    solution = least_squares(
        residuals, inside, bounds=(0, 1), diff_step=STEP, max_nfev=EVALUATIONS, xtol=1e-4
    )
    return of_blocks(solution.x)
