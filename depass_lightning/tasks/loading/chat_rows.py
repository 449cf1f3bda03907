"""Rows as they are written for fine-tuning: conversations, completions, preferences, and documents.

| row | the prompt | the answer | the foil |
|---|---|---|---|
| `{messages}` | all messages but the last | the last, of the assistant | |
| `{messages}` | all messages | none: the last is not of the assistant | |
| `{prompt, completion}` | `prompt`, text or messages | `completion`, text or one message | |
| `{prompt, chosen, rejected}` | `prompt` | `chosen` | `rejected` |
| `{chosen, rejected}` | the messages that both begin with | the last of `chosen` | the last of `rejected` |
| `{documents, question, answer}` | the documents and the question | `answer` | |

Every row may have an `id`, `tools`, and `evidence`: strings of the prompt, or `[start, end]` ranges of it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.loading.rows import Row, check_text
from depass_lightning.utils.sections import Conversation, Documents


def is_chat_row(row: Row) -> bool:
    """Return whether a row has one of the layouts above."""
    return any(row.get(key) is not None for key in ("messages", "completion", "chosen", "documents"))


def chat_fields(row: Row, *, user: bool = False) -> tuple[str, str | None, str | None]:
    """Return a row's prompt, answer and foil.

    Args:
        row: the row, in one of the layouts above.
        user: whether a prompt that is text is a turn of the user.

    Raises:
        DePassError: a field is missing, or is neither text nor messages.
    """
    if row.get("documents") is not None:
        question, answer = _text(row, "question"), _text(row, "answer" if "answer" in row else "target")
        return Documents(_listed(row["documents"]), question), answer, None
    if row.get("messages") is not None:
        messages = _messages(row, "messages")
        if messages[-1].get("role") != "assistant":
            return _conversation(messages, row), None, None
        answer = _said(messages[-1:], "the last of the messages")
        return _conversation(messages[:-1], row), answer, None
    replies = ["completion"] if row.get("completion") is not None else ["chosen", "rejected"]
    whole = [_listed(row.get(key)) for key in replies]
    prompt = _listed(row.get("prompt"))
    if prompt is None:
        if not all(isinstance(reply, list) for reply in whole) or len(whole) < 2:
            raise DePassError("the field 'prompt' is missing; only messages in both replies can repeat it")
        prompt = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*whole, strict=False))]
        whole = [reply[len(prompt) :] for reply in whole]
    texts = [_said(reply, f"the field {key!r}") for reply, key in zip(whole, replies, strict=True)]
    if len(texts) == 2 and texts[0] == texts[1]:
        raise DePassError(f"chosen and rejected are the same: {texts[0]!r:.60}")
    if isinstance(prompt, str) and user:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        written: str = _text(row, "prompt")
    else:
        written = _conversation(prompt, row)
    return written, texts[0], texts[1] if len(texts) == 2 else None


def _listed(value: Any) -> Any:
    """Return messages or documents that a table holds as JSON text as what they are."""
    if isinstance(value, str) and value.lstrip().startswith(("[{", '["')):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _messages(row: Row, key: str) -> list[Mapping[str, Any]]:
    messages = _listed(row[key])
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        raise DePassError(f"the field {key!r} must be a list of messages, each with a role and a content")
    return messages


def _conversation(messages: Any, row: Row) -> Conversation:
    """Return messages as a conversation, without the empty fields that tables give to every row."""
    if not isinstance(messages, Sequence) or not messages:
        raise DePassError(f"the prompt is {messages!r:.80}; it must be text or messages")
    kept = [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]
    return Conversation(kept, _listed(row.get("tools")), "the prompt")


def _said(reply: Any, name: str) -> str:
    """Return a reply that is text, or one message of the assistant."""
    if isinstance(reply, list) and len(reply) == 1 and isinstance(reply[0], Mapping):
        if reply[0].get("role") != "assistant":
            raise DePassError(f"{name} is of the {reply[0].get('role')}; the answer is the assistant's")
        reply = reply[0].get("content")
    if not isinstance(reply, str) or not reply.strip():
        raise DePassError(f"{name} is {reply!r:.80}; it must be text, or one message with text")
    return check_text(name, reply)


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DePassError(f"the field {key!r} must be non-empty text, not {value!r:.80}")
    return check_text(f"the field {key!r}", value)
