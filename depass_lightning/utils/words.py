"""Split a text into words, in any script, without a language model or a word list."""

import unicodedata

import regex

# Scripts without spaces: every letter is a word, since a run of letters is a sentence.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
JOINERS = "'’-‐"
DECIMALS = ".,"


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the character span of every word and punctuation mark in `text`, in order, without white space.

    Consecutive letters and digits are one word, and so are words joined by an apostrophe or a hyphen
    ("don't", "well-known") and digits joined by a point or a comma ("3.14"). Every other mark is a separate
    word; a repeated mark ("...") is one. In scripts without spaces every letter is a word.
    """
    # Grapheme clusters: a letter with its accents, a flag, an emoji of several code points.
    seen = [match.span() for match in regex.finditer(r"\X", text)]
    characters = [text[start:end] for start, end in seen]
    kinds = [_kind(character[0]) for character in characters]
    for i in range(1, len(characters) - 1):
        around = characters[i - 1], characters[i + 1]
        joins = characters[i] in JOINERS and kinds[i - 1] == kinds[i + 1] == "word"
        if joins or (characters[i] in DECIMALS and all(character.isdecimal() for character in around)):
            kinds[i] = "word"
    spans: list[tuple[int, int]] = []
    for i, (start, end) in enumerate(seen):
        if kinds[i] == "space":
            continue
        if spans and spans[-1][1] == start and _continues(characters, kinds, i):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _kind(character: str) -> str:
    """Return the role of a character in a word; a mark extends the character before it."""
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    if category[0] == "M" or category == "Cf":
        return "mark"
    if category[0] in "LN" or category == "Pc":
        point = ord(character)
        return "letter" if any(low <= point <= high for low, high in UNSPACED) else "word"
    return "sign"


def _continues(characters: list[str], kinds: list[str], i: int) -> bool:
    """Return whether a character belongs to the word of the character before it."""
    if kinds[i] == "mark":
        return True
    before = i - 1
    while before > 0 and kinds[before] == "mark":
        before -= 1
    if kinds[i] == "sign":
        return characters[before] == characters[i]
    return kinds[i] == "word" and kinds[before] in ("word", "mark")


def word_tokens(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Return the word number of every token; the tokens of a word are consecutive.

    Words that a token spans are merged, and tokens that split the bytes of a character belong to one word. A
    single space belongs to the word after it; other white space, and a token without text (a special token),
    is a separate word.

    Args:
        text: the text that was tokenised.
        offsets: the character span of each token in `text`.
    """
    word_of = [-1] * len(text)
    for number, (start, end) in enumerate(word_spans(text)):
        word_of[start:end] = [number] * (end - start)
    groups: list[int] = []
    last, waiting = -1, False  # the last word so far, and whether a space waits for the next word
    reached = 0  # the end of the previous token
    for start, end in offsets:
        words = [word for word in word_of[start:end] if word >= 0]
        group = groups[-1] if groups else -1
        later, reached = start < end <= reached, end  # the later bytes of a character
        if later and not words:
            groups.append(group)
            continue
        if not words:
            groups.append(group + 1)
            waiting, last = text[start:end] == " ", -1
            continue
        same = waiting or (last >= 0 and words[0] <= last)
        groups.append(group if same and groups else group + 1)
        waiting, last = False, max(last, words[-1])
    return groups


def word_tokens_by_space(tokens: list[str]) -> list[int]:
    """Return the word number of every token if only the tokens' texts are known.

    A token that begins with white space, or that follows a token of white space, begins a word. Bracketed
    special tokens ("<s>", "[CLS]", "<|end|>") are separate words.
    """
    groups: list[int] = []
    alone = True
    for token in tokens:
        special = len(token) > 2 and token[0] + token[-1] in ("<>", "[]")
        begins = alone or special or token[:1].isspace()
        group = groups[-1] if groups else -1
        groups.append(group + 1 if begins else group)
        alone = special or (token.isspace() and token != " ")
    return groups
