"""The probability and logit of the answer after prompts without some of their tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from depass_lightning.engine.isolation import undisturbed
from depass_lightning.errors import DePassError
from depass_lightning.models.families import families_of_class
from depass_lightning.models.output_heads import OutputHead
from depass_lightning.models.rotary import regime
from depass_lightning.models.unwrapping import unwrapped
from depass_lightning.utils.batching import in_batches


@dataclass(frozen=True)
class AblatedPrompt:
    """A prompt without some of its tokens, and the answer after it.

    Args:
        ids: the tokens that are left.
        seen: which of them keep their embedding; that of the others is set to zero.
        answer: the ids of the answer's tokens.
        position: which of the tokens the answer is read at; None for where the model's head reads a text.
    """

    ids: Sequence[int]
    seen: Sequence[bool]
    answer: Sequence[int]
    position: int | None = None


class AnswerReading(NamedTuple):
    """What the model gives an answer.

    Attributes:
        probability: the answer's probability p, of all of its tokens.
        logit: its logit, summed over its tokens.
        log_odds: log p - log(1 - p).
        rank: its rank among all tokens or labels, from 1 for the most likely; of an answer with several
            tokens, the largest of theirs.
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
        model: the causal LM or classifier.
        prompts: the prompts to run.
        batch_size: the number of prompts in one pass.
        progress: show a progress bar.

    Raises:
        DePassError: the batch size is less than one.
    """
    inner: Any = unwrapped(model)
    known = isinstance(inner, PreTrainedModel) and not families_of_class(inner)
    head = OutputHead.of(inner, causal=False) if known else OutputHead("causal", inner)
    if head.kind == "embedding":
        raise DePassError(
            f"{type(inner).__name__} has no head, so that no answer's probability can be measured; load it "
            "with its head, such as AutoModelForCausalLM; a Similarity cannot be measured by removal"
        )

    def work(batch: list[int]) -> list[AnswerReading]:
        asked = [prompts[i] for i in batch]
        logits = _answer_logits(inner, asked) if head.kind == "causal" else _head_logits(inner, head, asked)
        wanted = torch.tensor([prompt.answer for prompt in asked], device=logits.device)[:, :, None]
        answers = logits.gather(2, wanted)  # [batch, token, 1]
        odds = head.log_odds(logits, wanted).double()  # [batch, token]
        logs = -torch.nn.functional.softplus(-odds).sum(1)
        whole = odds[:, 0] if odds.shape[1] == 1 else logs - torch.log(-torch.expm1(logs))
        single = head.probabilities(logits[:, 0]).gather(1, wanted[:, 0])[:, 0]
        columns = (
            logs.exp() if odds.shape[1] > 1 else single,
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
        # Texts of an encoder or with labels are not padded.
        alike = regime(config, length) if head.kind == "causal" else (length,)
        kinds.append(((all(prompt.seen), len(prompt.answer), alike), length))
    with undisturbed(model, attention=None):
        return in_batches(kinds, batch_size, work, progress, "asking")


def _answer_logits(
    model: PreTrainedModel, prompts: Sequence[AblatedPrompt]
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
    if families and (spec := families[0].model) is not None:  # such a model takes no mask
        if not bool(seen.all()):
            raise DePassError(f"embeddings of {type(model).__name__} cannot be set to zero; leave out zeroed")
        rows = [[*prompt.ids, *[0] * p] for p, prompt in rows]
        logits = spec.logits(model, torch.tensor(rows, device=device))
        wanted = torch.tensor([range(longest - p - count, longest - p) for p in padding], device=device)
        return logits.gather(1, wanted[:, :, None].expand(-1, -1, logits.shape[2])).float()
    with _zeroed(model, seen):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=count
        ).logits
    return logits[:, -count:].float()


def _head_logits(
    model: PreTrainedModel, head: OutputHead, prompts: Sequence[AblatedPrompt]
) -> Float[Tensor, "batch 1 output"]:
    """Return a classifier's or masked language model's logits of prompts of one length."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt.ids) for prompt in prompts], device=device)
    with _zeroed(model, torch.tensor([list(prompt.seen) for prompt in prompts], device=device)):
        if head.labels:
            logits = head.label_logits(model, ids, torch.arange(ids.shape[1], device=device))
        else:
            logits = model(input_ids=ids).logits
    places = [
        head.position_of(prompt.ids) if prompt.position is None else prompt.position for prompt in prompts
    ]
    ends = torch.tensor(places, device=logits.device)
    return logits[torch.arange(len(prompts)), ends][:, None].float()


@contextmanager
def _zeroed(model: PreTrainedModel, seen: Bool[Tensor, "batch position"]) -> Iterator[None]:
    """Set the embeddings of all tokens that are not seen to zero."""

    def zero(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return torch.where(seen.to(output.device)[..., None], output, output.new_zeros(()))

    handle = None if bool(seen.all()) else model.get_input_embeddings().register_forward_hook(zero)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
