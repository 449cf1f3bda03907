"""Rows as fine-tuning data has them, documents, and needles among other sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from depass_lightning import DePass, DePassError, Spans
from depass_lightning.monitoring.probe_sets import load_set
from depass_lightning.tasks import Example, load
from depass_lightning.utils.sections import Conversation, Documents, SectionedText
from tests.utils.test_chat_templates import tokenizer_of

USER = {"role": "user", "content": "Where is Mary? She left the park for the garden."}
SAID = {"role": "assistant", "content": "In the garden."}
OTHER = {"role": "assistant", "content": "In the park."}
WHOLE = "user: Where is Mary? She left the park for the garden.\n"
ROWS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "messages": ({"messages": [USER, SAID]}, SAID["content"], None),
    "json": ({"messages": json.dumps([USER, SAID])}, SAID["content"], None),
    "prompt-completion": ({"prompt": [USER], "completion": [SAID]}, SAID["content"], None),
    "completion-text": ({"prompt": [USER], "completion": "In the garden."}, SAID["content"], None),
    "preference": (
        {"prompt": [USER], "chosen": [SAID], "rejected": [OTHER]},
        SAID["content"],
        OTHER["content"],
    ),
    "implicit": ({"chosen": [USER, SAID], "rejected": [USER, OTHER]}, SAID["content"], OTHER["content"]),
    "empty-fields": (
        {"messages": [{**USER, "tool_calls": None}, SAID], "chosen": None},
        SAID["content"],
        None,
    ),
}


def write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def example_of(tmp_path: Path, row: dict[str, Any], task: str = "jsonl") -> Example:
    (example,) = load(task, path=write(tmp_path, row))
    return example


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("task", ["jsonl", "chat"])
def test_rows_of_conversations(tmp_path: Path, layout: str, task: str) -> None:
    row, answer, foil = ROWS[layout]
    example = example_of(tmp_path, {**row, "evidence": ["the garden"]}, task)
    assert (example.prompt, example.answer, example.foil) == (WHOLE, answer, foil)
    assert isinstance(example.prompt, Conversation)
    tokenizer = tokenizer_of("chatml")
    written = example.formatted(tokenizer)
    assert written.prompt == tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert (written.answer, written.foil) == (answer, foil)
    assert isinstance(written.prompt, SectionedText)
    assert [section.kind for section in written.prompt.sections] == ["turn"]
    assert [written.prompt[slice(*span)] for span in written.evidence_ranges()] == ["the garden"]
    assert written.formatted(tokenizer) == written


def test_text_is_a_turn_of_the_user_in_chats_alone(tmp_path: Path) -> None:
    row = {"prompt": "The sky is", "completion": " blue"}
    plain, chat = (example_of(tmp_path, row, task) for task in ("jsonl", "chat"))
    assert (plain.prompt, plain.answer) == ("The sky is", " blue")
    assert type(plain.prompt) is str
    assert chat.prompt == "user: The sky is\n"
    assert example_of(tmp_path, {"prompt": "The sky is", "target": "blue"}, "chat").prompt == chat.prompt


def test_rows_of_documents(tmp_path: Path) -> None:
    documents = [{"title": "A", "text": "Mary is here."}, "John is there."]
    row = {
        "documents": documents,
        "question": "Who is there?",
        "answer": "John",
        "evidence": ["John is there."],
    }
    example = example_of(tmp_path, row, "rag")
    assert isinstance(example.prompt, Documents)
    tokenizer = tokenizer_of("chatml")
    written = example.formatted(tokenizer)
    assert written.answer == "John"
    assert isinstance(written.prompt, SectionedText)
    assert [section.kind for section in written.prompt.sections] == [
        "turn",
        "document",
        "document",
        "question",
    ]
    assert [written.prompt[slice(*span)] for span in written.evidence_ranges()] == ["John is there."]
    tokenizer.chat_template = None
    plain = example.formatted(tokenizer)
    assert (plain.prompt, plain.answer) == (example.prompt, " John")
    assert plain.evidence_ranges() == example.evidence_ranges()


def test_a_saved_data_set_has_the_same_rows(tmp_path: Path) -> None:
    rows = [ROWS["messages"][0], {"messages": [USER, OTHER]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert [example.answer for example in load("chat", path=tmp_path / "saved")] == [
        SAID["content"],
        OTHER["content"],
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [{"content": "x"}, SAID]}, "message 0 of the prompt is"),
        ({"prompt": [USER], "completion": ""}, "the field 'completion' is ''"),
        ({"prompt": [USER], "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": "a", "rejected": "b"}, "the field 'prompt' is missing"),
        ({"chosen": [SAID], "rejected": [OTHER]}, "the prompt is \\[\\]"),
        ({"documents": [], "question": "q", "answer": "a"}, "there are no documents"),
        ({"documents": ["a"], "answer": "a"}, "'question' must be non-empty text"),
    ],
)
def test_bad_rows_are_skipped_with_the_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    task = load("chat", path=write(tmp_path, row, ROWS["messages"][0]))
    assert len(task) == 1
    with pytest.raises(DePassError, match=reason):
        load("chat", path=write(tmp_path, row))


def test_what_a_template_refuses_is_skipped(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be terse."}
    task = load("chat", path=write(tmp_path, {"messages": [system, USER, SAID]}, ROWS["messages"][0]))
    written = task.formatted(tokenizer_of("gemma"))
    assert (len(written), len(written.skipped)) == (1, 1)
    assert "refuses message 0 of the prompt of '1', of the role 'system'" in written.skipped[0]["reason"]
    with pytest.raises(
        DePassError, match="has no prompt that the model can read; the prompt of '1' is a conv"
    ):
        task.formatted(DePass.from_pretrained("tiny").tokenizer)
    with pytest.raises(DePassError, match="the chat task reads a file"):
        load("chat")


def test_probes_are_conversations_too(tmp_path: Path) -> None:
    row = {**ROWS["preference"][0], "evidence": ["the garden"]}
    tokenizer = tokenizer_of("chatml")
    (probe,) = load_set("rows", write(tmp_path, row), 4)
    (pair,) = load_set("pairs", [([USER], "In")], 4)
    expected = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    for loaded, evidence in ((probe, ["the garden"]), (pair, [])):
        written = loaded.formatted(tokenizer, "contrast")
        assert written.prompt == expected
        assert [written.prompt[slice(*span)] for span in written.evidence] == evidence


@pytest.mark.parametrize("kind", ["people", "needle", "several", "two_steps"])
def test_needles_are_sentences_of_the_documents(kind: str) -> None:
    task = load("rag", size=20, kind=kind, sentences=5, seed=1)
    assert [example.prompt for example in task] == [
        example.prompt for example in load("rag", size=20, kind=kind, sentences=5, seed=1)
    ]
    places = set()
    for example in task:
        assert isinstance(example.prompt, SectionedText)
        assert not isinstance(example.prompt, Documents)
        *documents, question = example.prompt.sections
        assert (question.kind, question.end) == ("question", len(example.prompt))
        assert len(documents) == {"people": 6, "needle": 6, "several": 9, "two_steps": 7}[kind]
        found = [(part.start, part.end) for part in documents]
        needles = example.evidence_ranges()
        assert len(needles) == (2 if kind == "two_steps" else 1)
        assert set(needles) <= set(found)
        places.add(found.index(needles[0]))
        evidence = "".join(example.prompt[slice(*span)] for span in needles)
        assert str(example.answer).strip() in evidence
        assert example.answer != example.foil
    assert len(places) > 3


def test_the_bundled_model_finds_whom_something_is_given_to() -> None:
    depass = DePass.from_pretrained("tiny")
    task = load("rag", size=60, kind="people", sentences=1)
    found = [
        depass.attribute(example.prompt, example.answer, source=Spans("sentence"), rule="half")
        for example in task
    ]
    right = [(example, result) for example, result in zip(task, found, strict=True) if result.rank == 1]
    assert len(right) >= 0.6 * len(task)
    cited = [result.cite(1)[0].text for _, result in right]
    needles = [example.prompt[slice(*example.evidence_ranges()[0])] for example, _ in right]
    assert sum(map(str.__eq__, cited, needles)) >= 0.95 * len(right)


def test_bad_settings_of_needles_are_named() -> None:
    with pytest.raises(DePassError, match="no kind 'stack'; it has people, needle"):
        load("rag", kind="stack")
    with pytest.raises(DePassError, match="sentences must be at least 0; got -1"):
        load("rag", sentences=-1)
    with pytest.raises(DePassError, match="the task 'ioi' hides no needles"):
        load("ioi", kind="needle")
