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
from depass_lightning.models.decoder import unwrapped
from depass_lightning.models.rotary import regime
from depass_lightning.utils.batching import in_batches


@dataclass(frozen=True)
class AblatedPrompt:
    """A prompt without some of its tokens, and the answer after it.

    Args:
        ids: the tokens that are left.
        seen: which of them keep their embedding; that of the others is set to zero.
        answer: the id of the answer's token.
    """

    ids: Sequence[int]
    seen: Sequence[bool]
    answer: int


class AnswerReading(NamedTuple):
    """What the model gives an answer.

    Attributes:
        probability: the answer's probability p.
        logit: its logit.
        log_odds: log p - log(1 - p).
        rank: its rank among all tokens, from 1 for the most likely.
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
        logits = _next_token(inner, [prompts[i] for i in batch])
        wanted = torch.tensor([prompts[i].answer for i in batch], device=logits.device)[:, None]
        answers = logits.gather(1, wanted)
        columns = (
            logits.softmax(-1).gather(1, wanted)[:, 0],
            answers[:, 0],
            answers[:, 0] - logits.scatter(1, wanted, -torch.inf).logsumexp(-1),
            1 + (logits > answers).sum(-1),
        )
        readings = zip(*(column.tolist() for column in columns), strict=True)
        return [AnswerReading(*map(float, reading)) for reading in readings]

    # Prompts without zeroed embeddings need no hook: they form batches of their kind.
    config = inner.config.get_text_config() if isinstance(inner, PreTrainedModel) else None
    kinds = [((all(prompt.seen), regime(config, len(prompt.ids))), len(prompt.ids)) for prompt in prompts]
    with undisturbed(model, eager=False):
        return in_batches(kinds, batch_size, work, progress, "asking")


def _next_token(model: nn.Module, prompts: Sequence[AblatedPrompt]) -> Float[Tensor, "batch vocabulary"]:
    """Return the logits of the token after each prompt.

    Padded on the left, so that only the last position's logits are computed. Causality and the mask keep the
    padding from changing them.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = [longest - len(prompt.ids) for prompt in prompts]
    rows = list(zip(padding, prompts, strict=True))
    # [batch, position], all three
    ids = torch.tensor([[0] * p + list(prompt.ids) for p, prompt in rows], device=device)
    mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding], device=device)
    seen = torch.tensor([[True] * p + list(prompt.seen) for p, prompt in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ExitStack() as stack:
        if not bool(seen.all()):
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(embedding.register_forward_hook(_zeroing(seen)).remove)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        ).logits
    return logits[:, -1].float()


def _zeroing(seen: Tensor) -> Any:
    def zero(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return torch.where(seen.to(output.device)[..., None], output, output.new_zeros(()))

    return zero
