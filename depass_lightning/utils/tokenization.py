"""Between a text and the ids that a model continues it from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError

FAR = 32  # characters for each position of the context
MOST = 10_000_000  # characters of a text; tokenising more takes gigabytes


class Encoded(NamedTuple):
    """A text's ids; each token's character range in the text, (0, 0) for special tokens before it, or None
    where unknown; how many characters the text's own copy of these takes; and whether it was left out."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    start: int
    doubled: bool


def encode(text: str, tokenizer: PreTrainedTokenizerBase, name: str = "the prompt") -> Encoded:
    """Tokenise a text that the model continues.

    Special tokens that the tokenizer puts before a text are added, but not a second time to a text that
    begins with them, as a chat that a template wrote does. Those that it puts after a text (EOS, [SEP]) are
    left out: the model would continue from them.

    Args:
        text: the text.
        tokenizer: the model's tokenizer.
        name: what the text is called in an error.

    Raises:
        DePassError: the text has a lone surrogate, which no tokenizer can read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DePassError(
            f"{name} has half of a surrogate pair, {text[error.start]!r}, at character {error.start}; "
            "it is not valid Unicode: remove it"
        ) from error
    # Prompts longer than the context are refused by DePass, so the tokenizer need not warn of them.
    options: dict[str, Any] = {"return_offsets_mapping": bool(tokenizer.is_fast), "verbose": False}
    whole = tokenizer(text, **options)
    plain = tokenizer(text, add_special_tokens=False, **options)
    ids, bare = list(whole["input_ids"]), list(plain["input_ids"])
    offsets = [tuple(pair) for pair in whole["offset_mapping"]] if tokenizer.is_fast else None
    last = len(ids) - len(bare)
    before = next((count for count in range(last + 1) if ids[count : count + len(bare)] == bare), 0)
    end, start = (before + len(bare) if bare else len(ids)), 0
    doubled = before > 0 and bare[:before] == ids[:before]
    if doubled:
        own = slice(before, 2 * before)
        start = offsets[own][-1][1] if offsets else len(str(tokenizer.decode(ids[own])))
        ids, end = ids[:before] + ids[2 * before :], end - before
        offsets = offsets and offsets[:before] + offsets[2 * before :]
    elif offsets and ids[0] == tokenizer.bos_token_id:
        start, offsets[0] = offsets[0][1], (0, 0)  # in the text alone: a special token as well
    return Encoded(ids[:end], offsets and offsets[:end], start, doubled)


def check_vocabulary(
    name: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None, vocabulary: int | None
) -> None:
    """Refuse tokens that were added to a tokenizer and not to the model.

    Args:
        name: what holds the ids, for the error.
        ids: token ids.
        tokenizer: to show the token by.
        vocabulary: the number of tokens that the model has embeddings for, or None where unknown.

    Raises:
        DePassError: an id is not below the vocabulary's size.
    """
    if vocabulary is not None and (beyond := next((own for own in ids if own >= vocabulary), None)):
        raise DePassError(
            f"{name} has the token {token_text(beyond, tokenizer)!r} (id {beyond}), but the model has "
            f"embeddings for {vocabulary} tokens only; call model.resize_token_embeddings(len(tokenizer)) "
            "and train it, or leave the token out"
        )


def beginning_of(text: str, limit: int | None) -> str:
    """The part of a text that tells whether it is far beyond the context: all of a shorter one.

    Args:
        text: the text.
        limit: the model's context in tokens, or None where unknown.
    """
    return text[: MOST if limit is None else min(MOST, FAR * limit)]


def check_beginning(name: str, text: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
    """Refuse a text that is far too long before all of it is tokenised: the process may run out of memory.

    Args:
        name: what the text is called in the error.
        text: the text.
        tokenizer: the model's tokenizer.
        limit: the model's context in tokens, or None where unknown.

    Raises:
        DePassError: the text has over ten million characters, or far more tokens than the context.
    """
    if len(text) > MOST:
        raise DePassError(f"{name} has {len(text):,} characters, more than {MOST:,}; shorten it")
    beginning = beginning_of(text, limit)
    if limit is None or len(beginning) == len(text):
        return
    count = len(encode(beginning, tokenizer, name).ids)
    # Twice: the beginning's last tokens may be others in the whole text.
    if count > 2 * limit:
        raise DePassError(
            f"{name} has {len(text):,} characters; its first {len(beginning):,} have {count:,} tokens, more "
            f"than the model's context of {limit}; shorten it"
        )


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


def continuation(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of generated tokens, decoded together: a character may be spread over several of them.

    Args:
        ids: the whole text's ids.
        start: the first generated position.
        tokenizer: the model's tokenizer.
    """
    before, text = (str(tokenizer.decode(ids[start - 1 : end])) for end in (start, len(ids)))
    # Some tokenizers drop the space of what they take for the beginning of a text.
    return text[len(before) :] if text.startswith(before) else str(tokenizer.decode(ids[start:]))


def token_pieces(
    ids: list[int],
    text: str,
    offsets: list[tuple[int, int]] | None,
    tokenizer: PreTrainedTokenizerBase,
    start: int,
) -> list[str]:
    """The text of each token with the space before it, so that joined they read like the prompt.

    Args:
        ids: the prompt's ids.
        text: its text.
        offsets: each token's character range in the text, or None where unknown.
        tokenizer: the model's tokenizer.
        start: how many characters of the text the special tokens before it cover.
    """
    if offsets is None:
        return [token_text(token, tokenizer) for token in ids]
    pieces, reached = [], start
    for token, (start, end) in zip(ids, offsets, strict=True):
        # Special tokens and the later bytes of one character cover no text of their own.
        covers = end > start and end > reached
        pieces.append(text[reached:end] if covers else token_text(token, tokenizer))
        reached = max(reached, end)
    return pieces


def unknown_words(
    ids: list[int], text: str, offsets: list[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """The words in whose place the model reads the token for unknown ones, each once.

    Args:
        ids: the prompt's ids.
        text: its text.
        offsets: each token's character range in the text, or None where unknown.
        tokenizer: the model's tokenizer.
    """
    if offsets is None or tokenizer.unk_token_id is None:
        return ()
    pairs = zip(ids, offsets, strict=True)
    words = [text[slice(*own)].strip() for token, own in pairs if token == tokenizer.unk_token_id]
    return tuple(dict.fromkeys(word for word in words if word not in ("", tokenizer.unk_token)))
