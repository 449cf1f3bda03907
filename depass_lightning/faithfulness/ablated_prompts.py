"""The probability and logit of the answer after prompts without some of their tokens."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from depass_lightning.engine.isolation import undisturbed
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import unwrapped
from depass_lightning.models.families import families_of_class
from depass_lightning.models.rotary import regime
from depass_lightning.utils.batching import in_batches


@dataclass(frozen=True)
class AblatedPrompt:
    """A prompt without some of its tokens, and the answer after it.

    Args:
        ids: the tokens that are left.
        seen: which of them keep their embedding; that of the others is set to zero.
        answer: the ids of the answer's tokens.
    """

    ids: Sequence[int]
    seen: Sequence[bool]
    answer: Sequence[int]


class AnswerReading(NamedTuple):
    """What the model gives an answer.

    Attributes:
        probability: the answer's probability p, of all of its tokens.
        logit: its logit, summed over its tokens.
        log_odds: log p - log(1 - p).
        rank: its rank among all tokens, from 1 for the most likely; the largest of its tokens'.
    """

    probability: float
    logit: float
    log_odds: float
    rank: float


def answers_of(
    model: nn.Module, prompts: Sequence[AblatedPrompt], batch_size: int, progress: bool = False
) -> list[AnswerReading]:
    """Return what the model gives each prompt's answer, running prompts of similar length together.

    Args:
        model: the causal LM.
        prompts: the prompts to run.
        batch_size: the number of prompts in one pass.
        progress: show a progress bar.

    Raises:
        DePassError: the batch size is less than one.
    """
    inner = unwrapped(model)

    def work(batch: list[int]) -> list[AnswerReading]:
        logits = _answer_logits(inner, [prompts[i] for i in batch])
        wanted = torch.tensor([prompts[i].answer for i in batch], device=logits.device)[:, :, None]
        answers = logits.gather(2, wanted)  # [batch, token, 1]
        others = logits.scatter(2, wanted, -torch.inf).logsumexp(-1)
        odds = (answers[:, :, 0] - others).double()  # [batch, token]
        logs = -torch.nn.functional.softplus(-odds).sum(1)
        whole = odds[:, 0] if odds.shape[1] == 1 else logs - torch.log(-torch.expm1(logs))
        columns = (
            logs.exp() if odds.shape[1] > 1 else logits[:, 0].softmax(-1).gather(1, wanted[:, :, 0])[:, 0],
            answers.sum((1, 2)),
            whole,
            1 + (logits > answers).sum(-1).amax(1),
        )
        readings = zip(*(column.tolist() for column in columns), strict=True)
        return [AnswerReading(*map(float, reading)) for reading in readings]

    # Prompts without zeroed embeddings need no hook: they form batches of their kind.
    config = inner.config.get_text_config() if isinstance(inner, PreTrainedModel) else None
    kinds = []
    for prompt in prompts:
        length = len(prompt.ids) + len(prompt.answer) - 1
        kinds.append(((all(prompt.seen), len(prompt.answer), regime(config, length)), length))
    with undisturbed(model, attention=None):
        return in_batches(kinds, batch_size, work, progress, "asking")


def _answer_logits(
    model: nn.Module, prompts: Sequence[AblatedPrompt]
) -> Float[Tensor, "batch token vocabulary"]:
    """Return the logits of each of the answer's tokens after each prompt, all answers of one length.

    Padded on the left, so that only the answer's positions' logits are computed. Causality and the mask keep
    the padding from changing them.
    """
    count = len(prompts[0].answer)
    prompts = [
        AblatedPrompt(
            [*prompt.ids, *prompt.answer[:-1]], [*prompt.seen, *[True] * (count - 1)], prompt.answer
        )
        for prompt in prompts
    ]
    device = next(model.parameters()).device
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = [longest - len(prompt.ids) for prompt in prompts]
    rows = list(zip(padding, prompts, strict=True))
    # [batch, position], all three
    ids = torch.tensor([[0] * p + list(prompt.ids) for p, prompt in rows], device=device)
    mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding], device=device)
    seen = torch.tensor([[True] * p + list(prompt.seen) for p, prompt in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    families = families_of_class(model)
    if families and (spec := families[0].model) is not None:  # it takes no mask
        if not bool(seen.all()):
            raise DePassError(f"embeddings of {type(model).__name__} cannot be set to zero; leave out zeroed")
        rows = [[*prompt.ids, *[0] * p] for p, prompt in rows]
        logits = spec.logits(model, torch.tensor(rows, device=device))
        wanted = torch.tensor([range(longest - p - count, longest - p) for p in padding], device=device)
        return logits.gather(1, wanted[:, :, None].expand(-1, -1, logits.shape[2])).float()
    with ExitStack() as stack:
        if not bool(seen.all()):
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(embedding.register_forward_hook(_zeroing(seen)).remove)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=count
        ).logits
    return logits[:, -count:].float()


def _zeroing(seen: Tensor) -> Any:
    def zero(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return torch.where(seen.to(output.device)[..., None], output, output.new_zeros(()))

    return zero
