"""Write a conversation by the tokenizer's own chat template, and locate its turns in the text.

The template is rendered twice: with the messages, and with a mark in place of every text of theirs. What is
between the marks is the template's, so the turns are located even if messages contain the name of a role or
a special token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError
from depass_lightning.utils.sections import (
    Conversation,
    Documents,
    Message,
    Section,
    SectionedText,
    sections_of,
)

_MARK = re.compile("\ue000([0-9]+)\ue001")  # of a private-use area, which no text has
_TEXTS = ("content", "text", "reasoning_content", "thinking", "name", "arguments")


def conversations_of(messages: Any) -> Conversation | list[Conversation]:
    """Return one conversation, or several.

    Args:
        messages: the messages of one, `[{"role", "content"}, ...]`, or a list of such lists.

    Raises:
        DePassError: they are neither.
    """
    if isinstance(messages, Conversation):
        return messages
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DePassError(
            f"messages is {messages!r:.80}; it must be a list of {{'role': ..., 'content': ...}}, or of such "
            "lists"
        )
    if not all(isinstance(entry, Sequence) and not isinstance(entry, str) for entry in messages):
        return Conversation(messages)
    return [Conversation(entry, name=f"conversation {index}") for index, entry in enumerate(messages)]


def formatted(text: str, tokenizer: PreTrainedTokenizerBase, name: str = "the prompt") -> str:
    """Return a text as the model reads it: a conversation as its chat template writes it.

    Documents are a turn of the user where the tokenizer has a chat template. Other texts are returned
    unchanged.

    Raises:
        DePassError: there is no chat template, or it refuses the conversation.
    """
    if isinstance(text, Documents) and tokenizer.chat_template:
        text = Conversation([{"role": "user", "content": text}])
    if not isinstance(text, Conversation):
        return text
    written = _rendered(text, text.messages, tokenizer, name)
    texts: list[str] = []
    owners: list[int] = []
    marked = []
    for index, message in enumerate(text.messages):
        # who speaks stays as it is: templates compare it
        kept = {key: message[key] for key in ("role", "name") if key in message}
        marked.append({key: _marked(value, texts, key) for key, value in message.items()} | kept)
        owners += [index] * (len(texts) - len(owners))
    skeleton = _MARK.split(_rendered(text, marked, tokenizer, name))
    places = _located(written, skeleton, texts, name)
    return SectionedText(written, _sections(text.messages, texts, owners, places, written), formatted=True)


def _rendered(
    conversation: Conversation,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> str:
    """Return what the chat template writes, up to the beginning of the assistant's answer."""
    if not tokenizer.chat_template:
        raise DePassError(
            f"{name} is a conversation, but the tokenizer has no chat template; pass a text, or set "
            "tokenizer.chat_template"
        )

    def render(count: int, generation: bool) -> str:
        plain: list[Any] = [dict(message) for message in messages[:count]]
        tools: Any = conversation.tools
        return str(
            tokenizer.apply_chat_template(
                plain, tools=tools, tokenize=False, add_generation_prompt=generation
            )
        )

    try:
        return render(len(messages), True)
    except Exception as error:  # a template raises what it likes
        reason = error
    refused = len(messages) - 1
    for count in range(1, len(messages)):
        try:
            render(count, False)
        except Exception as error:
            refused, reason = count - 1, error
            break
    raise DePassError(
        f"the model's chat template refuses message {refused} of {name}, of the role "
        f"{messages[refused]['role']!r}: {reason}"
    ) from reason


def _marked(value: Any, texts: list[str], key: str = "") -> Any:
    """Return a part of a message with marks in place of its texts, which are added to a list."""
    if isinstance(value, str):
        if key not in _TEXTS or not value.strip():
            return value
        texts.append(value)
        return f"\ue000{len(texts) - 1}\ue001"
    if isinstance(value, Mapping):
        inside = "arguments" if key == "arguments" else ""
        return {name: _marked(entry, texts, inside or name) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(entry, texts, key) for entry in value]
    return value


def _located(
    written: str, skeleton: Sequence[str], texts: Sequence[str], name: str
) -> list[tuple[int, int, int]]:
    """Return the number, the start and the end of each text where the template wrote it."""
    places, start = [], len(skeleton[0]) if written.startswith(skeleton[0]) else 0
    for number, literal in zip(map(int, skeleton[1::2]), skeleton[2::2], strict=True):
        text = texts[number]
        forms = [text, text.strip(), text.lstrip(), text.rstrip(), json.dumps(text, ensure_ascii=False)[1:-1]]
        ends = [start + len(form) for form in forms if written.startswith(form + literal, start)]
        end = ends[0] if ends else written.find(literal, start) if literal else start
        if end < start:
            raise DePassError(
                f"the chat template changes {text!r:.60} of {name}, so that its turn cannot be located; pass "
                "the text that the template writes as the prompt"
            )
        places.append((number, start, end))
        start = end + len(literal)
    return places


def _sections(
    messages: Sequence[Message],
    texts: Sequence[str],
    owners: Sequence[int],
    places: Sequence[tuple[int, int, int]],
    written: str,
) -> list[Section]:
    """Return a section for every turn, from its first text to its last, and the sections of its content."""
    turns: dict[int, Section] = {}
    nested: list[Section] = []
    for number, start, end in places:
        owner, text = owners[number], texts[number]
        turn = turns.get(owner, Section("turn", str(messages[owner]["role"]), start, end))
        turns[owner] = turn._replace(end=max(turn.end, end))
        if written[start:end].strip() == text.strip():  # the template may have cut white space off
            shift = start + _indent(written[start:end]) - _indent(text)
            nested += [section.moved(shift) for section in sections_of(text)]
    return [*(turn for turn in turns.values() if turn.end > turn.start), *nested]


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())
