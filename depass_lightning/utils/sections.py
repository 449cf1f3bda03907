"""Texts with named sections: the turns of a conversation, and documents with a question about them.

`Conversation` and `Documents` are texts, so that they can be passed wherever a prompt is a text.
`chat_templates.formatted` writes them as the model reads them.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

from typing_extensions import override

from depass_lightning.errors import DePassError

SectionUnit = Literal["sentence", "paragraph", "turn", "document"]
Message = Mapping[str, Any]

ENDS = {
    # A sentence ends after its closing marks; Chinese, Japanese and Hindi have other marks.
    "sentence": re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？।]+|\n+"),
    "paragraph": re.compile(r"\n\s*\n"),
}


class Section(NamedTuple):
    """A named part of a text.

    Attributes:
        kind: `turn`, `document`, `question` (about the documents) or `answer` (the continued text).
        name: the turn's role or the document's name.
        start: its first character.
        end: the character after it.
    """

    kind: str
    name: str
    start: int
    end: int

    def moved(self, shift: int) -> "Section":
        """Return the section of a text that begins `shift` characters later."""
        return self._replace(start=self.start + shift, end=self.end + shift)


class SectionedText(str):
    """A text with named sections; what is between them belongs to a template.

    Args:
        text: the text.
        sections: its sections, which may be nested: a document inside a turn.
        formatted: whether the text has the special tokens that the model expects, so that none are added.
    """

    sections: tuple[Section, ...]
    formatted: bool

    def __new__(cls, text: str, sections: Iterable[Section] = (), formatted: bool = False) -> Self:
        """Create the text, see the class."""
        made = super().__new__(cls, text)
        made.sections, made.formatted = tuple(sections), formatted
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        kind = Documents if isinstance(self, Documents) else SectionedText
        return _restored, (kind, str(self), self.sections, self.formatted)

    def marked(self, marks: Iterable[Section]) -> "SectionedText":
        """Return the text with further sections.

        Args:
            marks: the sections; those of a conversation are in its transcript.
        """
        kind = Documents if isinstance(self, Documents) else SectionedText
        return _restored(kind, str(self), (*self.sections, *marks), self.formatted)


class Documents(SectionedText):
    """Documents and a question about them, as one prompt.

    For a model with a chat template they are a turn of the user.

    Args:
        documents: their texts, or mappings with `text` and `title`, or a mapping from names to texts.
        question: what is asked after them.
        header: what precedes each document; `{name}` is its name.
        separator: what is between two documents, and before the question.
        ask: how the question is written; `{question}` is its text.

    Raises:
        DePassError: there are no documents, or a document has no text.
    """

    def __new__(
        cls,
        documents: Sequence[str | Mapping[str, str]] | Mapping[str, str],
        question: str,
        *,
        header: str = "{name}:\n",
        separator: str = "\n\n",
        ask: str = "{question}",
    ) -> Self:
        """Write the documents and the question, see the class."""
        text, sections = "", []
        for name, written in _named_documents(documents):
            text += header.replace("{name}", name)
            sections.append(Section("document", name, len(text), len(text) + len(written)))
            text += written + separator
        if not isinstance(question, str) or not question.strip():
            raise DePassError(f"the question about the documents is {question!r}; it must be text")
        before, _, after = ask.partition("{question}")
        start = len(text + before)
        sections.append(Section("question", "question", start, start + len(question)))
        return super().__new__(cls, text + before + question + after, sections)


def _named_documents(documents: Any) -> Iterator[tuple[str, str]]:
    """Yield each document's name and text."""
    entries = list(documents.items() if isinstance(documents, Mapping) else enumerate(documents, start=1))
    if isinstance(documents, str) or not entries:
        raise DePassError("there are no documents; give a list of texts")
    names = set()
    for key, entry in entries:
        name = key if isinstance(key, str) else f"Document {key}"
        if isinstance(entry, Mapping):
            name, entry = str(entry.get("title") or entry.get("name") or name), entry.get("text")
        if not isinstance(entry, str) or not entry.strip():
            raise DePassError(f"{name} is {entry!r:.80}; a document must be text, or have a field 'text'")
        if name in names:
            raise DePassError(f"two documents are called {name!r}; their names must differ")
        names.add(name)
        yield name, entry.strip()


class Conversation(SectionedText):
    """A conversation, whose text is a plain transcript until the model's chat template writes it.

    Args:
        messages: `{"role", "content"}` each, and `tool_calls` of an assistant; `Documents` may be a content.
        tools: the tools that the chat template describes to the model, as JSON schemas.
        name: what error messages call it.

    Raises:
        DePassError: there are no messages, or one has no role or no content.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] | None

    def __new__(
        cls,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str = "the conversation",
    ) -> Self:
        """Write the transcript, see the class."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise DePassError(f"{name} is {messages!r:.80}; it must be a list of messages")
        text, sections = "", []
        for index, message in enumerate(messages):
            content = _content(message, f"message {index} of {name}")
            text += f"{message['role']}: "
            sections.append(Section("turn", message["role"], len(text), len(text) + len(content)))
            sections += [section.moved(len(text)) for section in sections_of(content)]
            text += f"{content}\n"
        made = super().__new__(cls, text, sections)
        made.messages, made.tools = tuple(messages), tools
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Conversation, (self.messages, self.tools)

    @override
    def marked(self, marks: Iterable[Section]) -> "Conversation":
        marks, messages = list(marks), []
        turns = [section for section in self.sections if section.kind == "turn"]
        for message, turn in zip(self.messages, turns, strict=True):
            content = message.get("content")
            if isinstance(content, str):
                inside = [mark for mark in marks if turn.start <= mark.start and mark.end <= turn.end]
                nested = (*sections_of(content), *(mark.moved(-turn.start) for mark in inside))
                message = {**message, "content": SectionedText(content, nested)}
            messages.append(message)
        return Conversation(messages, self.tools)


def _content(message: Any, name: str) -> str:
    """Return a message's content: its text, or its tool calls as JSON."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DePassError(f"{name} is {message!r:.80}; a message has a 'role' and a 'content'")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if content is None and calls:
        return json.dumps(calls, ensure_ascii=False)
    if not isinstance(content, str) or not (content.strip() or calls):
        raise DePassError(f"{name}, of the {message['role']}, has no text: its content is {content!r:.80}")
    return content


def sections_of(text: str) -> tuple[Section, ...]:
    """Return a text's sections; none for a text without."""
    return text.sections if isinstance(text, SectionedText) else ()


def leaves(sections: Sequence[Section]) -> list[Section]:
    """Return the sections that contain no other."""
    return [
        section
        for section in sections
        if not any(
            other != section and section.start <= other.start and other.end <= section.end
            for other in sections
        )
    ]


def parts(text: str, sections: Sequence[Section], by: SectionUnit) -> list[Section]:
    """Split a text's sections into the parts that are units.

    Args:
        text: the text.
        sections: its sections; without any, the whole text is one.
        by: `turn`, the turns; `document`, the documents and what contains none; `sentence` or `paragraph` of
            these. No unit crosses the border of a section.

    Returns:
        The parts in the order of the text, each with the kind and the name of its section.
    """
    if by == "turn":
        turns = (part for part in sections if part.kind in ("turn", "answer"))
        return sorted(turns, key=lambda part: part.start)
    whole = sorted(leaves(sections), key=lambda part: part.start) or [Section("", "", 0, len(text))]
    if by == "document":
        return whole
    split = []
    for part in whole:
        ends = [match.end() for match in ENDS[by].finditer(text, part.start, part.end)]
        borders = [part.start, *(end for end in ends if end < part.end), part.end]
        spans = (span for span in pairwise(borders) if text[slice(*span)].strip())
        split += [part._replace(start=start, end=end) for start, end in spans]
    return split


def first_visible(text: str, span: tuple[int, int]) -> int:
    """Return the first character of a range that is no white space; its start if all are."""
    start, end = span
    written = text[start:end]
    return start + len(written) - len(written.lstrip()) if written.strip() else start


def tokens_of(sections: Sequence[Section], text: str, offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the positions of each section's tokens: those whose first visible character is in it."""
    starts = [section.start for section in sections]
    tokens: list[list[int]] = [[] for _ in sections]
    for position, span in enumerate(offsets):
        character = first_visible(text, span)
        index = bisect_right(starts, character) - 1
        if span[1] > span[0] and index >= 0 and character < sections[index].end:
            tokens[index].append(position)
    return tokens


def ablatable(
    text: str, sections: Sequence[Section], offsets: Sequence[tuple[int, int]] | None, count: int
) -> list[int]:
    """Return the positions of the tokens that can be removed from a prompt: its text, not its template.

    Of a prompt with documents these are the tokens of the documents, not of the question; of a conversation
    those of its turns. Special tokens without characters are left out.

    Args:
        text: the text.
        sections: its sections; without any, all of the text counts.
        offsets: each token's characters; without them all tokens count.
        count: the number of tokens.
    """
    if offsets is None:
        return list(range(count))
    documents = [section for section in sections if section.kind == "document"]
    if not sections:
        return [position for position, (start, end) in enumerate(offsets) if end > start]
    chosen = sorted(documents or leaves(sections), key=lambda section: section.start)
    return [position for tokens in tokens_of(chosen, text, offsets) for position in tokens]


def to_json(text: str) -> str | None:
    """Return what a text has besides its characters, for a file; None for a text without sections."""
    if isinstance(text, Conversation):
        nested = [sections_of(message.get("content") or "") for message in text.messages]
        return json.dumps({"messages": text.messages, "tools": text.tools, "nested": nested})
    if isinstance(text, SectionedText):
        documents = isinstance(text, Documents)
        return json.dumps({"sections": text.sections, "formatted": text.formatted, "documents": documents})
    return None


def from_json(text: str, record: str | None) -> str:
    """Return the text that `to_json` described."""
    if record is None:
        return text
    fields = json.loads(record)
    if "messages" not in fields:
        kind = Documents if fields["documents"] else SectionedText
        return _restored(kind, text, (Section(*part) for part in fields["sections"]), fields["formatted"])
    messages = [
        {**message, "content": SectionedText(message["content"], (Section(*part) for part in nested))}
        if nested
        else message
        for message, nested in zip(fields["messages"], fields["nested"], strict=True)
    ]
    return Conversation(messages, fields["tools"])


def _restored(
    kind: type[SectionedText], text: str, sections: Iterable[Section], formatted: bool
) -> SectionedText:
    """Return a copy, which is not written again from its parts."""
    return SectionedText.__new__(kind, text, sections, formatted)
