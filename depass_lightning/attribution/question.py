"""What is asked of the model, resolved and checked once, before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.encoder_targets import embedding_of, only_mask
from depass_lightning.attribution.logit_sum import target_ids
from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, continued
from depass_lightning.sources import Source, resolve_layer
from depass_lightning.sources.base import is_whole
from depass_lightning.targets import (
    Continuation,
    Direction,
    HeadTarget,
    Label,
    LogitTarget,
    LogOdds,
    LogProb,
    Masked,
    Preference,
    ProbeLogit,
    Reward,
    Similarity,
    Target,
    Token,
    token_target,
)
from depass_lightning.utils.tokenization import check_vocabulary, continuation, continuation_ids


@dataclass(frozen=True, eq=False)
class Read:
    """One position at which a target is read.

    Args:
        position: the index of the token.
        target: what is read there.
        ids: the token whose logit is explained, and those that it is compared with; None for the model's own
            next token, which only the pass shows, and for a vector.
        weight: how much it counts in the target.
        before: the text before the explained token, which a token's text is tokenised after; None if unknown.
    """

    position: int
    target: LogitTarget | Direction | ProbeLogit | Similarity
    ids: list[int] | None = None
    weight: float = 1.0
    before: str | None = None


@dataclass(frozen=True, eq=False)
class Question:
    """One target of one prompt.

    Args:
        prompt: the prompt, with the answer where one is explained.
        target: the target as it was passed.
        reads: where it is read: at one position, or before each token of an answer.
        layer: the block whose input is read; the number of blocks for the last block's output.
        vector: `[hidden]` what the state is multiplied with, for a target inside the model.
        constant: what is added to that product.
        other: `[hidden]` the other text's embedding, of length 1, for a similarity.
    """

    prompt: Prompt
    target: Target
    reads: tuple[Read, ...]
    layer: int
    vector: Float[Tensor, "hidden"] | None = None
    constant: float = 0.0
    other: Float[Tensor, "hidden"] | None = None

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Prompt,
        target: Target,
        last_source_layer: int = 0,
    ) -> "Question":
        """Resolve a target.

        Args:
            decoder: the model.
            tokenizer: its tokenizer, if there is one.
            prompt: the prompt; for a `Continuation` with its answer, see `with_answer`.
            target: its target.
            last_source_layer: the last block at or in which components begin; the target is read after it.

        Raises:
            DePassError: the prompt has no such position, the target is not one token, or it is read at a
                layer that does not exist or that components do not reach.
        """
        layers = len(decoder.blocks)
        if isinstance(target, Continuation):
            return cls(prompt, target, _reads_of_answer(prompt, target), layers)
        if isinstance(target, Preference):
            raise DePassError("a Preference takes two passes of its own; explain it alone, not in a list")
        if isinstance(target, LogitTarget | HeadTarget):
            logit_target = _of_logits(decoder, target)
            position = _position(decoder, tokenizer, prompt, target)
            text = prompt.text_until(position, inclusive=decoder.head.kind != "masked")
            ids = target_ids(logit_target, text, OutputNames.of(decoder, tokenizer))
            return cls(prompt, target, (Read(position, logit_target, ids, before=text),), layers)
        if isinstance(target, Similarity):
            other = embedding_of(decoder, tokenizer, target)
            return cls(
                prompt,
                target,
                _pooled(prompt, target, 0 if target.pooling == "cls" else "mean"),
                layers,
                other=other,
            )
        name = type(target).__name__
        vector, constant = inner_reading(target, decoder.hidden_size)
        layer = layers
        if target.layer is not None and target.layer != layers:
            layer = resolve_layer(target.layer, layers, name)
        if layer <= last_source_layer:
            raise DePassError(
                f"{name} is read at layer {layer}, but the source begins at layer {last_source_layer}; read "
                "it at a later layer"
            )
        return cls(prompt, target, _pooled(prompt, target, target.position), layer, vector, constant)

    @property
    def position(self) -> int:
        """The last position that the target is read at: what follows it cannot contribute."""
        return self.reads[-1].position

    @property
    def place(self) -> tuple[int, bool]:
        """The layer, and whether the state is read after the final norm: what targets read together share."""
        return self.layer, self.vector is None


def _pooled(
    prompt: Prompt, target: Direction | ProbeLogit | Similarity, where: int | Literal["mean"]
) -> tuple[Read, ...]:
    """Return the reads of a target of states: at one position, or with equal weights at all."""
    if where == "mean":
        count = len(prompt.ids) if prompt.answer_start is None else prompt.answer_start
        return tuple(Read(place, target, weight=1 / count) for place in range(count))
    return (Read(prompt.resolve_position(where), target),)


def _of_logits(decoder: Decoder, target: LogitTarget | HeadTarget) -> LogitTarget:
    """Return a target of the model's head as one of logits; refuse those that its outputs do not have."""
    labels, name, model = decoder.head.labels, type(target).__name__, type(decoder.model).__name__
    if decoder.head.kind == "embedding":
        raise DePassError(
            f"{model} has no head that predicts tokens or labels; explain Similarity(text) or "
            "Direction(...), or load the model with its head"
        )
    if isinstance(target, HeadTarget):
        if isinstance(target, Masked) and decoder.head.kind != "masked":
            raise DePassError(f"{model} predicts no masked tokens; explain Token(...) or Label(...)")
        if isinstance(target, Label | Reward) and not labels:
            raise DePassError(f"{model} predicts tokens and has no labels; explain Token(...), not {name}")
        if isinstance(target, Reward) and len(labels) > 1:
            raise DePassError(f"{model} has {len(labels)} labels, not one reward; explain Label(...)")
        target = target.logit_target
    shared = isinstance(target, LogOdds | LogProb) or (isinstance(target, Token) and target.centred)
    if labels and shared and decoder.head.independent:
        raise DePassError(
            f"the labels of {model} do not exclude each other, so that {type(target).__name__} has no "
            "distribution to compare with; explain the label's logit, which is its log-odds"
        )
    return target


def _position(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    target: LogitTarget | HeadTarget,
) -> int:
    """Return where a target is read."""
    position = -1 if isinstance(target, Reward) else target.position
    default = position == (None if isinstance(target, Masked) else -1)
    if decoder.head.kind == "masked" and default:
        return only_mask(tokenizer, prompt)
    if decoder.head.kind != "sequence":
        return prompt.resolve_position(position)
    if not default:
        raise DePassError(
            f"{type(decoder.model).__name__} labels a whole text, not its tokens; leave position= out"
        )
    return decoder.head.position_of(prompt.ids)


def _reads_of_answer(prompt: Prompt, target: Continuation) -> tuple[Read, ...]:
    """Return where each explained token of a prompt's answer is read: at the position before it."""
    assert prompt.answer_start is not None
    ids = prompt.ids[prompt.answer_start :]
    explained = range(len(ids))[slice(None) if target.tokens is None else target.tokens]
    if not explained:
        raise DePassError(
            f"Continuation: tokens={target.tokens} selects none of the answer's {len(ids)} tokens; select at "
            "least one"
        )
    weight = 1 / len(explained) if target.reduce == "mean" else 1.0
    first = prompt.answer_start - 1
    return tuple(
        Read(first + index, token_target(ids[index], target.of, first + index), [ids[index]], weight)
        for index in sorted(explained)
    )


def inner_reading(target: Direction | ProbeLogit, hidden: int) -> tuple[Float[Tensor, "hidden"], float]:
    """Return the vector and the constant that read a target inside the model from a state.

    Returns:
        The vector, `[hidden]`, and the constant added to its dot product with the state.

    Raises:
        DePassError: the vector has another size or is not finite, or the probe is not a binary linear one.
    """
    constant = 0.0
    if isinstance(target, Direction):
        what = "Direction"
        try:
            vector = torch.as_tensor(target.vector)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DePassError(f"{what}: vector is a {type(target.vector).__name__}, not numbers") from error
    else:
        what = f"ProbeLogit({type(target.probe).__name__})"
        if not hasattr(target.probe, "coef_"):
            raise DePassError(f"{what}: it has no coef_; fit a linear probe first")
        vector = torch.as_tensor(target.probe.coef_)
        if vector.ndim == 2 and len(vector) == 1:
            vector = vector[0]
        constant = float(torch.as_tensor(getattr(target.probe, "intercept_", 0.0)).flatten()[0])
    if vector.shape != (hidden,):
        raise DePassError(
            f"{what}: its shape is {tuple(vector.shape)}, but the model's states have {hidden} numbers; "
            "give one direction"
        )
    if not bool(torch.isfinite(vector).all()):
        raise DePassError(f"{what}: the direction is not finite")
    return vector.detach(), constant


def check_continues(decoder: Decoder) -> None:
    """Refuse a model that does not generate text.

    Raises:
        DePassError: it is a classifier or a masked language model.
    """
    if decoder.head.kind != "causal":
        instead = {"masked": "Masked(...)", "embedding": "Similarity(...)"}.get(
            decoder.head.kind, "Label(...) or Reward()"
        )
        raise DePassError(
            f"{type(decoder.model).__name__} continues no text, so there is no answer to explain; take "
            f"{instead}"
        )


def answer_ids(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    answer: str | Sequence[int],
) -> list[int]:
    """Return the token ids of a given answer, which are appended to a prompt's.

    Raises:
        DePassError: the model does not generate text; or the answer has no tokens, text that the model does
            not know or ids that do not exist, or is too long for the model's context.
    """
    check_continues(decoder)
    name = f"the answer {answer!r:.80}"
    if not isinstance(answer, str):
        ids = list(answer)
        if wrong := [id for id in ids if not is_whole(id) or not 0 <= id < decoder.vocabulary_size]:
            raise DePassError(
                f"{name} has {wrong[0]!r}, which is no id of the vocabulary of {decoder.vocabulary_size} "
                "tokens"
            )
    elif tokenizer is None:
        raise DePassError(f"{name} is text, but there is no tokenizer; pass token ids, or a tokenizer")
    else:
        ids = continuation_ids(answer, prompt.text or None, tokenizer)
        check_vocabulary(name, ids, tokenizer, decoder.vocabulary_size)
        if tokenizer.unk_token_id in ids and str(tokenizer.unk_token) not in answer:
            first = ids.index(tokenizer.unk_token_id)
            known = continuation([*prompt.ids, *ids[:first]], len(prompt.ids), tokenizer)
            what = f"what follows {known!r}" if known else "its beginning"
            raise DePassError(f"{name}: {what} is not in the model's vocabulary; reword it")
    if not ids:
        raise DePassError(f"{name} has no tokens; give at least one")
    count, limit = len(prompt.ids), decoder.max_positions
    if limit is not None and count + len(ids) > limit:
        raise DePassError(
            f"{prompt.name} has {count} tokens and its answer {len(ids)}, more than the model's context of "
            f"{limit} takes; shorten one of them"
        )
    return ids


def with_answer(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, targets: list[Target]
) -> tuple[Prompt, list[Target]]:
    """Append the answer that some of a prompt's targets explain.

    Returns:
        The prompt with its answer, and the targets with positions that still refer to the prompt alone.

    Raises:
        DePassError: two targets have different answers, or `answer_ids` refuses one.
    """
    answers = {
        tuple(answer_ids(decoder, tokenizer, prompt, target.answer))
        for target in targets
        if isinstance(target, Continuation)
    }
    if not answers:
        return prompt, targets
    if len(answers) > 1:
        raise DePassError(
            f"the targets of {prompt.name} have {len(answers)} different answers, which need a pass each; "
            "pass the prompt once for each answer: attribute([prompt, prompt], [answer, other])"
        )
    placed = [
        replace(target, position=prompt.resolve_position(target.position))
        if isinstance(target, LogitTarget | Direction | ProbeLogit) and target.position != "mean"
        else target
        for target in targets
    ]
    return continued(prompt, list(*answers), tokenizer), placed


def questions_of(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    targets: Sequence[Target | list[Target]],
    sources: Sequence[Source],
) -> list[list[Question]]:
    """Resolve every prompt's targets, and check that the sources can split the prompts.

    Raises:
        DePassError: a target cannot be explained, or a prompt cannot be split.
    """
    last_source_layer = max(source.layers(len(decoder.blocks))[-1] for source in sources)
    questions = []
    for prompt, asked in zip(prompts, targets, strict=True):
        several = asked if isinstance(asked, list) else [asked]
        whole, placed = with_answer(decoder, tokenizer, prompt, several)
        questions.append(
            [Question.of(decoder, tokenizer, whole, target, last_source_layer) for target in placed]
        )
        for source in sources:
            source.describe(whole, decoder)
    return questions
