"""A prompt of a task, and a task: a sequence of prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError
from depass_lightning.targets import (
    AnswerTarget,
    Continuation,
    Contrast,
    Label,
    LogitReading,
    LogitTarget,
    Preference,
    Reduction,
    answer_target,
)
from depass_lightning.utils.chat_templates import formatted
from depass_lightning.utils.sections import Section, SectionedText, from_json, sections_of, to_json
from depass_lightning.utils.tokenization import continuation_ids

Span = tuple[int, int]
ANSWER, LABEL = "answer", "label"  # an entry in `labels` of an example whose answer is a classifier's label
ROLE = "role"  # marks an example's roles while its prompt is written

_FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "structure": Value("string"),
        "answer": Value("string"),
        "foil": Value("string"),
        "roles": [{"name": Value("string"), "start": Value("int32"), "end": Value("int32")}],
        "evidence": [Value("string")],
        "variants": [{"name": Value("string"), "text": Value("string")}],
        "labels": [{"name": Value("string"), "text": Value("string")}],
    }
)


@dataclass(frozen=True)
class Example:
    """A prompt, its correct answer, and the evidence for the answer in the prompt.

    Args:
        id: a unique name within the task.
        prompt: the text to continue, without trailing space; a `Conversation` or `Documents` too.
        answer: the correct continuation, with its leading space: `" Mary"`; None where it is not known. The
            model's most likely next token is explained then.
        foil: a wrong continuation to compare with, if the task has one: `" John"`.
        roles: named character ranges `[start, end)` in the prompt, for example
            `{"indirect_object": ((5, 9),), "subject": ((14, 18),)}`.
        evidence: the roles that an attribution should rank first; empty if unknown.
        variants: variants of the prompt by name: `{"plain": ...}` without misleading information.
        labels: further properties: `{"relation": "capital"}`, `{"language": "French", "case": "17"}`.
    """

    id: str
    prompt: str
    answer: str | None
    foil: str | None = None
    roles: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()
    variants: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def known_answer(self) -> str:
        """The answer, where one is needed.

        Raises:
            DePassError: it is not known.
        """
        if self.answer is None:
            raise DePassError(f"the prompt {self.id!r} has no answer, which is needed here; give its target")
        return self.answer

    def evidence_ranges(self) -> list[Span]:
        """Return the character ranges of all evidence, in the order of the text."""
        return sorted(span for role in self.evidence for span in self.roles[role])

    def formatted(self, tokenizer: PreTrainedTokenizerBase) -> "Example":
        """Return the example with its prompt as the model reads it, and its roles where they are there.

        Args:
            tokenizer: the model's tokenizer, with its chat template.

        Raises:
            DePassError: there is no chat template, or it refuses the conversation.
        """
        if not isinstance(self.prompt, SectionedText) or self.prompt.formatted:
            return self
        marks = [Section(ROLE, name, *span) for name, spans in self.roles.items() for span in spans]
        text = formatted(self.prompt.marked(marks), tokenizer, f"the prompt of {self.id!r}")
        roles: dict[str, tuple[Span, ...]] = {}
        for kind, name, start, end in sections_of(text):
            if kind == ROLE:
                roles[name] = (*roles.get(name, ()), (start, end))
        sections = [section for section in sections_of(text) if section.kind != ROLE]
        written = isinstance(text, SectionedText) and text.formatted
        answer, foil = (
            # After a text a word begins with a space, after the head of a turn it does not.
            reply if written or reply is None or reply[:1].isspace() else f" {reply}"
            for reply in (self.answer, self.foil)
        )
        prompt = SectionedText(text, sections, written)
        evidence = tuple(name for name in self.evidence if name in roles)
        return replace(self, prompt=prompt, answer=answer, foil=foil, roles=roles, evidence=evidence)

    def target(
        self,
        kind: AnswerTarget = "contrast",
        tokenizer: PreTrainedTokenizerBase | None = None,
        reading: LogitReading = "logit",
        reduce: Reduction = "sum",
    ) -> LogitTarget | Label | Continuation | Preference:
        """Return what to explain of the answer, which may be a classifier's label.

        Args:
            kind: "contrast", its logit less the foil's, or its logit where there is no foil; "token", its
                logit; "centred", its logit less the mean logit; "log_odds", its log-odds against all others;
                "logprob", its log-probability.
            tokenizer: to explain all tokens of an answer that has several, as a `Continuation` or, against
                the foil, a `Preference`; None explains the first token.
            reading: under "contrast" and "token", the value explained for each token of a whole answer.
            reduce: "sum" or "mean" over the tokens of a whole answer.
        """
        if self.answer is None:
            return answer_target(None, kind)
        foil = self.foil if kind == "contrast" else None
        if self.labels.get(ANSWER) == LABEL:
            return Label(self.answer, foil, "logit" if kind in ("contrast", "token") else kind)
        replies = [self.answer] if foil is None else [self.answer, foil]
        if tokenizer is not None and any(
            len(continuation_ids(reply, self.prompt, tokenizer)) > 1 for reply in replies
        ):
            if foil is not None:
                return Preference(self.answer, foil, reading, reduce)
            return Continuation(self.answer, reading if kind in ("contrast", "token") else kind, reduce)
        if foil is not None:
            return Contrast(self.answer, foil, first=True)
        return answer_target(self.answer, kind, first=True)


class Task:
    """A named sequence of examples, stored as a `datasets.Dataset`.

    Args:
        name: the name of the task in results.
        examples: the examples, in order; their ids must differ.
        skipped: unusable rows of a file, each with its `row` number and the `reason`.
    """

    def __init__(
        self, name: str, examples: Sequence[Example], skipped: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.name = name
        self.dataset = Dataset.from_list([_to_row(example) for example in examples], features=_FEATURES)
        self.skipped = [dict(row) for row in skipped]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return _from_row(self.dataset[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def formatted(self, tokenizer: PreTrainedTokenizerBase | None) -> "Task":
        """Return the task with its prompts as the model reads them; one that the template refuses is skipped.

        Args:
            tokenizer: the model's tokenizer, with its chat template.

        Raises:
            DePassError: no prompt can be written.
        """
        structures = self.dataset["structure"]
        if tokenizer is None or all(structure is None for structure in structures):
            return self
        examples, skipped = [], list(self.skipped)
        for number, example in enumerate(self, start=1):
            try:
                examples.append(example.formatted(tokenizer))
            except DePassError as error:
                skipped.append({"row": number, "reason": str(error)})
        if not examples:
            first = skipped[len(self.skipped)]["reason"]
            raise DePassError(f"the task {self.name!r} has no prompt that the model can read; {first}")
        return Task(self.name, examples, skipped)

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self)} examples, {len(self.skipped)} rows skipped)"


def _to_row(example: Example) -> dict[str, Any]:
    roles = [
        {"name": name, "start": start, "end": end}
        for name, spans in example.roles.items()
        for start, end in spans
    ]
    return {
        "id": example.id,
        "prompt": str(example.prompt),
        "structure": to_json(example.prompt),
        "answer": example.answer,
        "foil": example.foil,
        "roles": roles,
        "evidence": list(example.evidence),
        "variants": _named(example.variants),
        "labels": _named(example.labels),
    }


def _named(texts: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "text": text} for name, text in texts.items()]


def _from_row(row: Mapping[str, Any]) -> Example:
    roles: dict[str, tuple[Span, ...]] = {}
    for role in row["roles"]:
        roles[role["name"]] = (*roles.get(role["name"], ()), (role["start"], role["end"]))
    variants, labels = (
        {entry["name"]: entry["text"] for entry in row[key]} for key in ("variants", "labels")
    )
    prompt = from_json(row["prompt"], row["structure"])
    return Example(
        row["id"], prompt, row["answer"], row["foil"], roles, tuple(row["evidence"]), variants, labels
    )
