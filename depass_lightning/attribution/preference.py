"""A `Preference`: two answers to one prompt as two questions, and their results as one."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.question import answer_ids
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.results.component import Component
from depass_lightning.sources import Source, Tokens
from depass_lightning.targets import Preference, Target

SIDES = ("chosen", "rejected")


def with_both_answers(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    targets: Sequence[Target | list[Target]],
    sources: Sequence[Source],
) -> tuple[list[Prompt], list[Target | list[Target]]]:
    """Replace each preference by its two answers, the chosen one first.

    Args:
        decoder: the model.
        tokenizer: its tokenizer, if there is one.
        prompts: the prompts.
        targets: for each prompt one target or several.
        sources: the components of both, which must be the same.

    Returns:
        The prompts and targets, of a preference both twice.

    Raises:
        DePassError: both answers have the same tokens, `answer_ids` refuses one, or the components would
            depend on the answer.
    """
    asked: list[Prompt] = []
    expanded: list[Target | list[Target]] = []
    for prompt, target in zip(prompts, targets, strict=True):
        if not isinstance(target, Preference):
            asked.append(prompt)
            expanded.append(target)
            continue
        if any(isinstance(source, Tokens) and source.refine is not None for source in sources):
            raise DePassError("Tokens(refine=) joins other tokens for each answer; leave refine out")
        chosen, rejected = (
            answer_ids(decoder, tokenizer, prompt, answer) for answer in (target.chosen, target.rejected)
        )
        if chosen == rejected:
            raise DePassError(
                f"Preference: the chosen and the rejected answer to {prompt.name} are the same, "
                f"{target.chosen!r:.80}; give two that differ"
            )
        asked += [prompt, prompt]
        expanded += target.answers
    return asked, expanded


def results_of(
    targets: Sequence[Target | list[Target]],
    prompts: Sequence[Prompt],
    results: Sequence[list[list[Attribution]]],
) -> list[list[Attribution | Attributions]]:
    """Return each prompt's result for each source, of a preference the difference of its answers.

    Args:
        targets: each prompt's target or targets.
        prompts: the prompts.
        results: `[prompt][source][target]`, as many as `with_both_answers` returns prompts.

    Returns:
        `[prompt][source]`.
    """
    remaining = iter(results)
    merged: list[list[Attribution | Attributions]] = []
    for target, prompt in zip(targets, prompts, strict=True):
        by_source = next(remaining)
        if isinstance(target, Preference):
            pairs = zip(by_source, next(remaining), strict=True)
            merged.append([difference(prompt, chosen, rejected) for (chosen,), (rejected,) in pairs])
        else:
            several = isinstance(target, list)
            merged.append([Attributions(scored) if several else scored[0] for scored in by_source])
    return merged


def difference(prompt: Prompt, chosen: Attribution, rejected: Attribution) -> Attribution:
    """Return the scores of one answer less those of another.

    Returns:
        An attribution to the prompt's components, then to the tokens of either answer, then to constants. Its
        prediction is the more likely answer, its probability the chosen one's among the two.
    """
    if any(map(chosen.in_answer, chosen.components)):
        components, scores = _side_by_side(chosen, rejected)
    else:
        components, scores = chosen.components, chosen.scores - rejected.scores
    log_probabilities = [side.metadata.get("log_probability", math.nan) for side in (chosen, rejected)]
    margin = log_probabilities[0] - log_probabilities[1]
    preferred = chosen if margin > 0 else rejected
    remainders = [side.remainder for side in (chosen, rejected) if side.remainder is not None]
    metadata = {key: value for key, value in chosen.metadata.items() if key != "log_probability"}
    metadata |= {
        f"{side}_log_probability": value for side, value in zip(SIDES, log_probabilities, strict=True)
    }
    return replace(
        chosen,
        scores=scores,
        components=components,
        value=chosen.value - rejected.value,
        target=f"{chosen.target} − {rejected.target}",
        text=prompt.text,
        tokens=prompt.tokens,
        token_ids=prompt.ids,
        offsets=prompt.offsets,
        position=len(prompt.ids) - 1,
        prediction="".join(preferred.tokens[preferred.answer_start :]),
        probability=float(torch.tensor(margin, dtype=torch.float64).sigmoid()),
        rank=1 if margin > 0 else 2,
        remainder=remainders[0] - remainders[1] if len(remainders) == 2 else None,
        answer_start=None,
        sections=list(prompt.sections),
        metadata=metadata,
    )


def _side_by_side(
    chosen: Attribution, rejected: Attribution
) -> tuple[list[Component], Float[Tensor, " component"]]:
    """Join the components of two texts that begin with the same prompt."""
    parts: list[dict[str, list[int]]] = []
    for side in (chosen, rejected):
        part: dict[str, list[int]] = {"prompt": [], "answer": [], "constants": []}
        for i, component in enumerate(side.components):
            constant = component.kind in ("bias", "rounding")
            name = "constants" if constant else "answer" if side.in_answer(component) else "prompt"
            part[name].append(i)
        parts.append(part)
    one, other = parts
    components = [chosen.components[i] for i in one["prompt"]]
    scores = [chosen.scores[one["prompt"]] - rejected.scores[other["prompt"]]]
    for name, side, part, sign in zip(SIDES, (chosen, rejected), parts, (1, -1), strict=True):
        tokens = [side.components[i].label for i in part["answer"]]
        components += [Component(name, text, index=index) for index, text in enumerate(tokens)]
        scores.append(sign * side.scores[part["answer"]])
    components += [chosen.components[i] for i in one["constants"]]
    scores.append(chosen.scores[one["constants"]] - rejected.scores[other["constants"]])
    return components, torch.cat(scores)
