"""Prompts as the engine takes them: ids without padding, with the text that each token stands for."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError, DePassWarning
from depass_lightning.models.decoder import Decoder
from depass_lightning.utils.chat_templates import formatted
from depass_lightning.utils.sections import Section, sections_of
from depass_lightning.utils.tokenization import (
    check_beginning,
    check_vocabulary,
    encode,
    token_pieces,
    token_text,
    unknown_words,
)

LISTED = 10  # unknown words in a warning
IdsLike = Int[Tensor, "batch position"] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text: the text, or "" where only ids were given.
        ids: the token ids.
        tokens: the text that each token stands for; joined they read like the prompt.
        offsets: each token's character range in the text; (0, 0) for special tokens; None where unknown.
        name: what it is called in an error.
        index: its place in the call.
        unknown: the words that the tokenizer does not know, each once; the model reads `<unk>` instead.
        sections: the turns of a conversation and the documents in the text, and their characters.
        answer_start: the position of the first token after the prompt, in a text that was generated or that
            ends in a given answer; None for a prompt alone.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]] | None
    name: str
    index: int = 0
    unknown: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    answer_start: int | None = None

    def resolve_position(self, position: object) -> int:
        """Turn a position that may count from the end into an index.

        Raises:
            DePassError: it is not a whole number, or the prompt has no such position.
        """
        if not isinstance(position, int) or isinstance(position, bool):
            raise DePassError(f"the target's position is {position!r}; it must be a whole number")
        count = len(self.ids)
        if not -count <= position < count:
            raise DePassError(
                f"{self.name} has {count} tokens; the target's position {position} is outside of it"
            )
        return position % count

    def notes(self) -> dict[str, Any]:
        """The prompt's part of an attribution's metadata: the words that the tokenizer does not know."""
        return {"unknown_words": list(self.unknown)} if self.unknown else {}

    def text_until(self, position: int, *, inclusive: bool = True) -> str | None:
        """The text up to a token, or None where it is unknown.

        Args:
            position: the token.
            inclusive: with the token itself.
        """
        if self.offsets is None:
            whole = self.text and inclusive and position == len(self.ids) - 1
            return self.text if whole else None
        return self.text[: self.offsets[position][int(inclusive)]]


def prompts_of(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Sequence[str] | None,
    input_ids: IdsLike | None,
    attention_mask: IdsLike | None,
) -> list[Prompt]:
    """Take what a call was given: a prompt, several, or ids.

    Args:
        decoder: the model.
        tokenizer: its tokenizer; without one prompts must be ids, and are shown as ids.
        prompt: the prompts as text.
        input_ids: or as ids, `[batch, position]`; one list of ids is one prompt, and lists may
            differ in length.
        attention_mask: of these ids.

    Raises:
        DePassError: neither or both are given, there is no tokenizer, or as for either of them.
    """
    limit, vocabulary = decoder.max_positions, decoder.vocabulary_size
    if prompt is None:
        if input_ids is None:
            raise DePassError(
                "there is nothing to explain: pass a prompt, a list of prompts, messages, or input_ids"
            )
        ids, mask = _tables(input_ids, attention_mask)
        return prompts_of_ids(ids, mask, tokenizer, limit, vocabulary)
    if input_ids is not None:
        raise DePassError("pass either prompts or input_ids, not both")
    if tokenizer is None:
        raise DePassError(
            "prompts are text, but there is no tokenizer; use DePass(model, tokenizer) or input_ids"
        )
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    whole = decoder.head.kind != "causal"
    return prompts_of_texts(texts, tokenizer, limit, vocabulary, whole=whole)


def read_length(decoder: Decoder, prompt: Prompt, position: int) -> int:
    """Return how many tokens of a prompt the model has to read for a target.

    Tokens after the target's position cannot reach it and are cut off, except where the shorter prompt would
    get other rotary frequencies.
    """
    same = decoder.regime(position + 1) == decoder.regime(len(prompt.ids))
    return position + 1 if same else len(prompt.ids)


def prompts_of_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    vocabulary: int | None = None,
    *,
    whole: bool = False,
) -> list[Prompt]:
    """Tokenise prompts, and warn of a doubled BOS token and of unknown words.

    Args:
        texts: the prompts.
        tokenizer: the model's tokenizer; the special tokens that it puts before a text are added once, those
            that it puts after one are not where the model continues the text.
        limit: the model's context in tokens, or None where unknown.
        vocabulary: the number of tokens that the model has embeddings for, or None where unknown.
        whole: whether the model reads whole texts, with the special tokens after them.

    Raises:
        DePassError: a prompt is not text, is empty, is longer than the model's context, or has a token that
            the model has no embedding for.
    """
    if not texts:
        raise DePassError("the list of prompts is empty")
    prompts, doubled = [], []
    for index, text in enumerate(texts):
        name = "the prompt" if len(texts) == 1 else f"prompt {index}"
        if not isinstance(text, str):
            raise DePassError(f"{name} is a {type(text).__name__}, not a text")
        if not text.strip():
            raise DePassError(f"{name} is empty; give it at least one token")
        text = formatted(text, tokenizer, name)
        check_beginning(name, text, tokenizer, limit)
        ids, offsets, start, twice = encode(text, tokenizer, name, whole=whole)
        doubled += [str(tokenizer.decode(ids[:1]))] if twice else []
        _check_length(name, len(ids), limit, _beyond(sections_of(text), offsets, limit))
        check_vocabulary(name, ids, tokenizer, vocabulary)
        tokens = token_pieces(ids, text, offsets, tokenizer, start)
        unknown = unknown_words(ids, text, offsets, tokenizer)
        prompts.append(Prompt(str(text), ids, tokens, offsets, name, index, unknown, sections_of(text)))
    _warn(prompts, doubled, tokenizer)
    return prompts


def _tables(ids: IdsLike, mask: IdsLike | None) -> tuple[Tensor, Tensor | None]:
    """Take ids and their mask as tensors or as lists; lists of several lengths are padded."""
    rows: Any = [ids] if _whole_numbers(ids) else ids
    if isinstance(rows, list | tuple) and rows and all(_whole_numbers(row) for row in rows):
        lengths = [len(row) for row in rows]
        if mask is None and len(set(lengths)) > 1:
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            rows = pad([list(row) for row in rows])
    return _table("input_ids", rows), None if mask is None else _table("attention_mask", mask)


def _whole_numbers(row: Any) -> bool:
    """Return whether something is a list of ids; a truth value is not one."""
    return isinstance(row, list | tuple) and bool(row) and all(type(entry) is int for entry in row)


def _table(name: str, values: Any) -> Tensor:
    try:
        table = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DePassError(f"{name} is not a table of whole numbers: {error}") from error
    table = table[None] if table.ndim == 1 and not isinstance(values, Tensor) else table
    if name == "input_ids" and (table.is_floating_point() or table.dtype == torch.bool):
        raise DePassError(f"{name} has {table.dtype} numbers; token ids are whole numbers")
    return table


def prompts_of_ids(
    input_ids: Int[Tensor, "batch position"],
    attention_mask: Int[Tensor, "batch position"] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None,
    vocabulary: int,
) -> list[Prompt]:
    """Take prompts as ids, and drop their padding.

    Args:
        input_ids: `[batch, position]`, padded on either side.
        attention_mask: the same shape, 1 at real positions; None where nothing is padded.
        tokenizer: to show the tokens by; None shows ids.
        limit: the model's context in tokens, or None where unknown.
        vocabulary: the number of tokens.

    Raises:
        DePassError: shapes differ, an id is out of range, a row is empty or too long, or its mask has a hole.
    """
    if input_ids.ndim != 2:
        raise DePassError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, position]")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise DePassError(
            f"attention_mask has shape {tuple(mask.shape)}, but input_ids {tuple(input_ids.shape)}"
        )
    prompts = []
    for index, (row, real) in enumerate(zip(input_ids.cpu(), mask.cpu().bool(), strict=True)):
        name = f"row {index} of input_ids"
        places = real.nonzero()[:, 0]
        if len(places) == 0:
            raise DePassError(f"{name} is empty: its attention mask is zero throughout")
        if int(places[-1] - places[0]) + 1 != len(places):
            raise DePassError(f"{name}: the attention mask has a hole; padding may only stand on either side")
        ids = row[real].tolist()
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise DePassError(f"{name} has an id outside the vocabulary of {vocabulary} tokens")
        _check_length(name, len(ids), limit)
        tokens = [token_text(token, tokenizer) for token in ids]
        prompts.append(Prompt("", ids, tokens, None, name, index))
    return prompts


def pad(rows: list[list[int]]) -> Int[Tensor, "batch position"]:
    """Pad ids on the right, where causal attention never sees the padding, so that any id serves."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])


def continued(prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """Append an answer's tokens to a prompt by their ids, which tokenising the text again may not give."""
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    text, tokens, offsets = prompt.text, list(prompt.tokens), list(prompt.offsets or [])
    for run, written in _runs(ids, special, tokenizer):
        # As in a prompt: special tokens cover no text, and a character's later bytes none of their own.
        covers = run[0] not in special
        start, text = len(text), text + written if covers else text
        tokens += [written, *(token_text(token, tokenizer) for token in run[1:])]
        offsets += [(start, len(text)) if covers else (0, 0)] * len(run)
    answer = Section("answer", "answer", len(prompt.text), len(text))
    return replace(
        prompt,
        text=text if prompt.text else "",
        sections=(*prompt.sections, answer) if prompt.sections and ids else prompt.sections,
        ids=[*prompt.ids, *ids],
        tokens=tokens,
        offsets=None if prompt.offsets is None else offsets,
        answer_start=len(prompt.ids),
    )


def _runs(
    ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[list[int], str]]:
    """Tokens with their text: one by one, and together where they are the bytes of one character."""
    run: list[int] = []
    for index, token in enumerate(ids):
        run.append(token)
        if tokenizer is None or len(run) == 1:
            written = token_text(token, tokenizer)
        else:
            written = str(tokenizer.decode(run))
        last = index == len(ids) - 1 or ids[index + 1] in special
        # Until a character is complete it is decoded as this sign; a token may end one and begin the next.
        if last or not written.endswith("\ufffd"):
            yield run, written
            run = []


def _check_length(name: str, count: int, limit: int | None, hint: str = "shorten it") -> None:
    if count == 0:
        raise DePassError(f"{name} is empty; give it at least one token")
    if limit is not None and count > limit:
        raise DePassError(f"{name} has {count} tokens, more than the model's context of {limit}; {hint}")


def _beyond(sections: Sequence[Section], offsets: Sequence[tuple[int, int]] | None, limit: int | None) -> str:
    """Return what to leave out of a prompt that is too long."""
    if limit is None or offsets is None or len(offsets) <= limit:
        return "shorten it"
    reached = offsets[limit][0]
    beyond = [part.name for part in sections if part.kind == "document" and part.end > reached]
    return f"shorten or leave out documents; {beyond[0]!r} reaches beyond it" if beyond else "shorten it"


def _warn(prompts: list[Prompt], doubled: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    if doubled:
        count = "the prompt begins" if len(prompts) == 1 else f"{len(doubled)} of the prompts begin"
        warnings.warn(
            f"{count} with {doubled[0]!r}, which the tokenizer adds too; it is read once",
            DePassWarning,
            stacklevel=2,
        )
    words = list(dict.fromkeys(word for prompt in prompts for word in prompt.unknown))
    if words:
        listed = ", ".join(map(repr, words[:LISTED])) + (", ..." if len(words) > LISTED else "")
        warnings.warn(
            f"the model's tokenizer does not know {listed}; the model reads {tokenizer.unk_token!r} instead",
            DePassWarning,
            stacklevel=2,
        )
