"""Prompts as the engine takes them: ids without padding, with the text that each token stands for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder

CHARACTER_BYTES = 4  # the most that a character of UTF-8 is spread over


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
    """

    text: str
    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]] | None
    name: str
    index: int = 0

    def resolve_position(self, position: int) -> int:
        """Turn a position that may count from the end into an index.

        Raises:
            DePassError: the prompt has no such position.
        """
        count = len(self.ids)
        if not -count <= position < count:
            raise DePassError(
                f"{self.name} has {count} tokens; the target's position {position} is outside of it"
            )
        return position % count

    def text_until(self, position: int) -> str | None:
        """The text up to and with a token, or None where it is unknown."""
        if self.offsets is None:
            return self.text if self.text and position == len(self.ids) - 1 else None
        return self.text[: self.offsets[position][1]]


def prompts_of(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Sequence[str] | None,
    input_ids: Int[Tensor, "batch position"] | None,
    attention_mask: Int[Tensor, "batch position"] | None,
) -> list[Prompt]:
    """Take what a call was given: a prompt, several, or ids.

    Args:
        decoder: the model.
        tokenizer: its tokenizer; without one prompts must be ids, and are shown as ids.
        prompt: the prompts as text.
        input_ids: or as ids.
        attention_mask: of these ids.

    Raises:
        DePassError: neither or both are given, there is no tokenizer, or as for either of them.
    """
    limit = decoder.max_positions
    if prompt is None:
        if input_ids is None:
            raise DePassError("there is nothing to explain: pass a prompt, a list of prompts, or input_ids")
        return prompts_of_ids(input_ids, attention_mask, tokenizer, limit, decoder.vocabulary_size)
    if input_ids is not None:
        raise DePassError("pass either prompts or input_ids, not both")
    if tokenizer is None:
        raise DePassError(
            "prompts are text, but there is no tokenizer; use DePass(model, tokenizer) or input_ids"
        )
    return prompts_of_texts([prompt] if isinstance(prompt, str) else list(prompt), tokenizer, limit)


def read_length(decoder: Decoder, prompt: Prompt, position: int) -> int:
    """How many tokens of a prompt the model reads for a target: up to its position, since none after it can
    reach it; but all of them where the shorter prompt would get other rotary frequencies.

    Args:
        decoder: the model.
        prompt: the prompt.
        position: the target's, counted from 0.
    """
    same = decoder.regime(position + 1) == decoder.regime(len(prompt.ids))
    return position + 1 if same else len(prompt.ids)


def prompts_of_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> list[Prompt]:
    """Tokenise prompts.

    Args:
        texts: the prompts.
        tokenizer: the model's tokenizer; its special tokens are added as it adds them by itself.
        limit: the model's context in tokens, or None where unknown.

    Raises:
        DePassError: a prompt is not text, is empty, or is longer than the model's context.
    """
    if not texts:
        raise DePassError("the list of prompts is empty")
    prompts = []
    for index, text in enumerate(texts):
        name = "the prompt" if len(texts) == 1 else f"prompt {index}"
        if not isinstance(text, str):
            raise DePassError(f"{name} is a {type(text).__name__}, not a text")
        if not text.strip():
            raise DePassError(f"{name} is empty; give it at least one token")
        # Longer prompts than the context are refused below, with our own words.
        encoded = tokenizer(text, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False)
        ids = list(encoded["input_ids"])
        offsets = [tuple(pair) for pair in encoded["offset_mapping"]] if tokenizer.is_fast else None
        _check_length(name, len(ids), limit)
        prompts.append(Prompt(text, ids, _pieces(ids, text, offsets, tokenizer), offsets, name, index))
    return prompts


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
    """Pad ids on the right, where causal attention never sees the padding, so that any id serves.

    Args:
        rows: the ids of each prompt.
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])


def token_text(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of one token, with the space that it begins with.

    Args:
        token: its id.
        tokenizer: None shows the id.
    """
    if tokenizer is None:
        return str(token)
    text = str(tokenizer.decode([token])).replace("▁", " ")
    # Some tokenizers drop the space of what they take for the beginning of a text.
    begins_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
    return f" {text}" if begins_word and not text.startswith(" ") else text


def continued(prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """Put generated tokens behind a prompt, and keep their ids: read anew from the text they may differ.

    Args:
        prompt: the prompt.
        ids: what was generated.
        tokenizer: to show the tokens by; None shows ids.
    """
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    text, tokens, offsets = prompt.text, list(prompt.tokens), list(prompt.offsets or [])
    for run, written in _runs(ids, special, tokenizer):
        # As in a prompt: special tokens cover no text, and a character's later bytes none of their own.
        covers = run[0] not in special
        start, text = len(text), text + written if covers else text
        tokens += [written, *(token_text(token, tokenizer) for token in run[1:])]
        offsets += [(start, len(text)) if covers else (0, 0)] * len(run)
    return replace(
        prompt,
        text=text if prompt.text else "",
        ids=[*prompt.ids, *ids],
        tokens=tokens,
        offsets=None if prompt.offsets is None else offsets,
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
        ends = index == len(ids) - 1 or ids[index + 1] in special or len(run) == CHARACTER_BYTES
        if "\ufffd" not in written or ends:
            yield run, written
            run = []


def _check_length(name: str, count: int, limit: int | None) -> None:
    if count == 0:
        raise DePassError(f"{name} is empty; give it at least one token")
    if limit is not None and count > limit:
        raise DePassError(f"{name} has {count} tokens, more than the model's context of {limit}; shorten it")


def _pieces(
    ids: list[int], text: str, offsets: list[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The text of each token with the space before it, so that joined they read like the prompt."""
    if offsets is None:
        return [token_text(token, tokenizer) for token in ids]
    pieces, reached = [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        # Special tokens and the later bytes of one character cover no text of their own.
        covers = end > start and end > reached
        pieces.append(text[reached:end] if covers else token_text(token, tokenizer))
        reached = max(reached, end)
    return pieces
