"""Convert a text to the ids that a model continues, and ids back to text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError
from depass_lightning.utils.sections import SectionedText

CHARACTERS_PER_POSITION = 32  # tokenised to check a text's length, per position of the context
MAX_CHARACTERS = 10_000_000  # of a text; tokenising more takes gigabytes of memory


class Encoded(NamedTuple):
    """A tokenised text.

    Attributes:
        ids: the token ids.
        offsets: each token's character range `[start, end)` in the text, (0, 0) for special tokens before it;
            None if unknown.
        start: the number of characters of special tokens that the text itself begins with.
        doubled: whether these special tokens would have been added twice.
    """

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    start: int
    doubled: bool


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, name: str = "the prompt", *, whole: bool = False
) -> Encoded:
    """Tokenise a text that the model continues, or a complete text that it labels.

    Special tokens that the tokenizer puts before a text are added, but not a second time to a text that
    already begins with them. None are added to a formatted conversation, which has those of its template.
    Special tokens after a text (EOS, [SEP]) are omitted where the model continues it.

    Args:
        text: the text.
        tokenizer: the model's tokenizer.
        name: the name of the text in error messages.
        whole: keep the special tokens after the text.

    Raises:
        DePassError: the text has a lone surrogate, which tokenizers cannot read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DePassError(
            f"{name} has half of a surrogate pair, {text[error.start]!r}, at character {error.start}; "
            "it is not valid Unicode: remove it"
        ) from error
    # DePass itself refuses prompts longer than the context.
    options: dict[str, Any] = {"return_offsets_mapping": bool(tokenizer.is_fast), "verbose": False}
    plain = tokenizer(str(text), add_special_tokens=False, **options)
    formatted = isinstance(text, SectionedText) and text.formatted
    complete = plain if formatted else tokenizer(str(text), **options)
    ids, bare = list(complete["input_ids"]), list(plain["input_ids"])
    offsets = [tuple(pair) for pair in complete["offset_mapping"]] if tokenizer.is_fast else None
    last = len(ids) - len(bare)
    before = next((count for count in range(last + 1) if ids[count : count + len(bare)] == bare), 0)
    end, start = (before + len(bare) if bare else len(ids)), 0
    doubled = before > 0 and bare[:before] == ids[:before]
    if doubled:
        copy = slice(before, 2 * before)
        start = offsets[copy][-1][1] if offsets else len(str(tokenizer.decode(ids[copy])))
        ids, end = ids[:before] + ids[2 * before :], end - before
        offsets = offsets and offsets[:before] + offsets[2 * before :]
    elif offsets and ids[0] == tokenizer.bos_token_id:
        start, offsets[0] = offsets[0][1], (0, 0)  # written in the text: also a special token
    end = len(ids) if whole else end
    return Encoded(ids[:end], offsets and offsets[:end], start, doubled)


def check_vocabulary(
    name: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None, vocabulary: int | None
) -> None:
    """Refuse tokens that were added to a tokenizer but not to the model.

    Raises:
        DePassError: an id is not below the vocabulary's size.
    """
    if vocabulary is not None and (beyond := next((id for id in ids if id >= vocabulary), None)):
        raise DePassError(
            f"{name} has the token {token_text(beyond, tokenizer)!r} (id {beyond}), but the model has "
            f"embeddings for {vocabulary} tokens only; call model.resize_token_embeddings(len(tokenizer)) "
            "and train it, or leave the token out"
        )


def beginning_of(text: str, limit: int | None) -> str:
    """Return the beginning of a text, long enough to show whether it far exceeds the context."""
    return text[: MAX_CHARACTERS if limit is None else min(MAX_CHARACTERS, CHARACTERS_PER_POSITION * limit)]


def check_beginning(name: str, text: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
    """Refuse a text that is far too long before it is tokenised, which may exhaust memory.

    Raises:
        DePassError: the text has over ten million characters, or far more tokens than the context.
    """
    if len(text) > MAX_CHARACTERS:
        raise DePassError(f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}; shorten it")
    beginning = beginning_of(text, limit)
    if limit is None or len(beginning) == len(text):
        return
    count = len(encode(beginning, tokenizer, name).ids)
    # Factor 2: the beginning's last tokens may differ in the whole text.
    if count > 2 * limit:
        raise DePassError(
            f"{name} has {len(text):,} characters; its first {len(beginning):,} have {count:,} tokens, more "
            f"than the model's context of {limit}; shorten it"
        )


def token_text(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of a token, with its leading space; its id without a tokenizer."""
    if tokenizer is None:
        return str(token)
    text = str(tokenizer.decode([token])).replace("▁", " ")
    # Some tokenizers drop the leading space of a decoded text.
    begins_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
    return f" {text}" if begins_word and not text.startswith(" ") else text


def continuation(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of generated tokens, decoded together: a character may span several tokens."""
    before, text = (str(tokenizer.decode(ids[start - 1 : end])) for end in (start, len(ids)))
    # Some tokenizers drop the leading space of a decoded text.
    return text[len(before) :] if text.startswith(before) else str(tokenizer.decode(ids[start:]))


def token_pieces(
    ids: list[int],
    text: str,
    offsets: list[tuple[int, int]] | None,
    tokenizer: PreTrainedTokenizerBase,
    start: int,
) -> list[str]:
    """Return the text of each token with the space before it; joined, the texts are the prompt.

    Args:
        ids: the prompt's ids.
        text: the prompt.
        offsets: each token's character range in the text, or None if unknown.
        tokenizer: the model's tokenizer.
        start: the number of characters of special tokens that the text begins with.
    """
    if offsets is None:
        return [token_text(token, tokenizer) for token in ids]
    pieces, reached = [], start
    for token, (start, end) in zip(ids, offsets, strict=True):
        # Special tokens and the later bytes of a character cover no further text.
        covers = end > start and end > reached
        pieces.append(text[reached:end] if covers else token_text(token, tokenizer))
        reached = max(reached, end)
    return pieces


def unknown_words(
    ids: list[int], text: str, offsets: list[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Return the distinct words that the tokenizer replaces by its unknown token."""
    if offsets is None or tokenizer.unk_token_id is None:
        return ()
    pairs = zip(ids, offsets, strict=True)
    words = [text[start:end].strip() for token, (start, end) in pairs if token == tokenizer.unk_token_id]
    return tuple(dict.fromkeys(word for word in words if word not in ("", tokenizer.unk_token)))


def token_id(
    token: str | int,
    prompt: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    *,
    first: bool = False,
) -> int:
    """Return the id of a token.

    A text is tokenised as the prompt's continuation, since the tokens of a word depend on the text before it.

    Args:
        token: the token's text or id.
        prompt: the prompt that it continues; None if it was passed as ids.
        tokenizer: the model's tokenizer; required for text.
        vocabulary: the number of tokens.
        first: use the first token of a text of several tokens.

    Raises:
        DePassError: the text is several tokens or none (the error shows the split), there is no tokenizer,
            the id is out of range, or the token has no embedding.
    """
    if isinstance(token, bool) or not isinstance(token, (str, int)):
        raise DePassError(f"target {token!r} is a {type(token).__name__}; pass a token's text or id")
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise DePassError(f"target id {token} is outside the vocabulary of {vocabulary} tokens")
        return token
    if tokenizer is None:
        raise DePassError(
            f"target {token!r} is text, but there is no tokenizer; pass a token id, or a tokenizer"
        )
    ids = continuation_ids(token, prompt, tokenizer)
    if len(ids) != 1 and not (first and ids):
        split = " + ".join(repr(token_text(part, tokenizer)) for part in ids) or "nothing"
        hint = "" if token.startswith(" ") else f", or try {' ' + token!r} with a leading space"
        raise DePassError(
            f"target {token!r} must be one token, but the tokenizer splits it into {len(ids)}: {split}; "
            f"explain the first of them by Token(..., first=True){hint}"
        )
    if ids[0] == tokenizer.unk_token_id and token != tokenizer.unk_token:
        raise DePassError(f"target {token!r} is not in the model's vocabulary")
    check_vocabulary(f"target {token!r}", ids[:1], tokenizer, vocabulary)
    return ids[0]


def continuation_ids(text: str, prompt: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a text adds to a prompt, or its ids alone if a token spans the boundary."""
    alone = tokenizer.encode(text, add_special_tokens=False)
    if prompt:
        before = tokenizer.encode(prompt, add_special_tokens=False)
        joined = tokenizer.encode(prompt + text, add_special_tokens=False)
        if joined[: len(before)] == before:
            return joined[len(before) :]
    return alone
