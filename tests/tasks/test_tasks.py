"""The tasks: what they generate, what they read, and the errors for bad input."""

import json
import os
import re
from collections import Counter

import pytest

from depass_lightning import Contrast, Token
from depass_lightning.errors import DePassError
from depass_lightning.tasks import ioi, load, load_texts
from depass_lightning.tasks.synthetic import corpus, facts, vocabulary
from depass_lightning.tasks.synthetic.passages import answered, from_examples, read_passages
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not available")


@pytest.fixture(scope="module")
def prompts():
    return list(load("ioi", size=400, seed=3))


def texts(example, role):
    return [example.prompt[start:end] for start, end in example.roles[role]]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_ioi_is_wide():
    assert len(ioi.TEMPLATES) == len(set(ioi.TEMPLATES)) >= 20
    assert len(set(vocabulary.NAMES)) >= 100
    assert len({*vocabulary.PLACES, *vocabulary.OBJECTS}) >= 80


def test_ioi_roles_are_what_they_are_called(prompts):
    for example in prompts:
        (indirect,), (subject,), (again,) = (
            texts(example, role) for role in ("indirect_object", "subject", "repetition")
        )
        assert example.answer == f" {indirect}"
        assert example.foil == f" {subject}" == f" {again}"
        assert subject != indirect
        assert example.prompt.count(indirect) == 1
        assert example.prompt == example.prompt.strip()
        assert example.evidence_ranges() == list(example.roles["indirect_object"])
        assert example.target() == Contrast(example.answer, example.foil, first=True)


def test_ioi_names_either_person_first_equally_often(prompts):
    first = sum(example.roles["subject"] < example.roles["indirect_object"] for example in prompts)
    assert first == len(prompts) / 2


def test_ioi_prompts_differ_and_come_from_the_seed(prompts):
    assert len({example.prompt for example in prompts}) == len({example.id for example in prompts}) == 400
    assert list(load("ioi", size=50, seed=3)) == prompts[:50]
    assert list(load("ioi", size=50, seed=4)) != prompts[:50]
    assert len(load("ioi", size=2000)) == 2000


def test_ioi_pairs_of_the_splits_never_meet(prompts):
    def pairs(examples):
        return {frozenset((example.answer, example.foil)) for example in examples}

    assert pairs(prompts).isdisjoint(pairs(load("ioi", size=3000, split="train")))
    trained = corpus.passages(3000, seed=3)
    for passage in trained:
        names = [name for name, count in Counter(passage.text.split()).items() if count > 1]
        answer = passage.text[slice(*passage.answers[-1])].strip()
        for name in set(names) & set(vocabulary.NAMES) - {answer}:
            assert answer not in vocabulary.NAMES or not ioi.held_out(name, answer), passage.text


def test_known_asks_each_fact_in_the_way_that_was_held_out():
    asked, trained = load("known"), load("known", split="train")
    assert (len(asked), len(trained)) == (360, 3 * 360)
    assert {example.prompt for example in asked}.isdisjoint(example.prompt for example in trained)
    read = " ".join(passage.text for passage in corpus.passages(20_000))
    assert not any(example.prompt + str(example.answer) in read for example in asked)
    paris = next(example for example in asked if example.answer == " Paris" and "France" in example.prompt)
    assert texts(paris, "subject") == ["France"]
    assert paris.evidence == ("subject",)
    assert paris.target() == Token(" Paris", first=True)


def test_new_facts_are_about_strangers():
    known = {fact.subject for fact in facts.FACTS}
    assert len(facts.NEW_FACTS) == 90
    assert known.isdisjoint(fact.subject for fact in facts.NEW_FACTS)
    assert len(load("known", split="new-train")) == 3 * len(load("known", split="new-test")) == 270


def test_a_corpus_passage_marks_its_answers():
    for passage in corpus.passages(500, seed=1):
        start, end = passage.answers[-1]
        assert end == len(passage.text)
        assert re.fullmatch(r" \w+", passage.text[start:end])


def test_a_task_is_a_dataset():
    task = load("ioi", size=4)
    columns = ["id", "prompt", "structure", "answer", "foil", "roles", "evidence", "variants", "labels"]
    assert task.dataset.column_names == columns
    assert task.dataset["prompt"][:] == [example.prompt for example in task]
    assert task[-1] == task[3]
    assert task.dataset.cache_files == []


def test_public_rows_get_their_roles_from_the_text(tmp_path):
    prompt = "Then, Ann and Bo were at the inn. Bo gave a pear to"
    path = write(tmp_path / "ioi.jsonl", [{"case_id": 7, "prompt": prompt, "answer": "Ann"}])
    (example,) = load("ioi", path=path)
    assert (example.id, example.answer, example.foil) == ("7", " Ann", " Bo")
    roles = {role: texts(example, role) for role in example.roles}
    assert roles == {"indirect_object": ["Ann"], "subject": ["Bo"], "repetition": ["Bo"]}
    assert example.roles["subject"] < example.roles["repetition"]


def test_known_1000_rows(tmp_path):
    row = {
        "known_id": 3,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "prompt": "Vinson Massif is in",
    }
    path = tmp_path / "known.json"
    path.write_text(json.dumps([row]))
    (example,) = load("known", path=path)
    assert (example.id, example.answer, example.foil) == ("3", " Antarctica", None)
    assert texts(example, "subject") == ["Vinson Massif"]


def test_jsonl_rows(tmp_path):
    rows = [
        {"prompt": "The sky is", "target": " blue", "foil": " green", "evidence": ["sky", [0, 3]], "id": "a"},
        {"prompt": "Grass is", "target": " green"},
    ]
    first, second = load("jsonl", path=write(tmp_path / "own.jsonl", rows))
    assert first.evidence_ranges() == [(0, 3), (4, 7)]
    assert first.target() == Contrast(" blue", " green", first=True)
    assert (second.id, second.evidence, second.target()) == ("2", (), Token(" green", first=True))


def test_a_bad_row_costs_only_itself(tmp_path):
    rows = [
        {"prompt": "The sky is", "target": " blue"},
        "not json",
        {"prompt": "Grass is", "foil": " grey"},
        {"prompt": "Snow is", "target": " white", "evidence": ["ice"]},
        {"prompt": "Snow is", "target": " white", "evidence": [[4, 40]]},
        {"prompt": "", "target": " white"},
        {"prompt": "Coal is", "target": " black", "foil": " black"},
        "[1, 2]",
        {"prompt": "Ice is", "target": " cold", "id": "1"},
        {"prompt": "Fire is", "target": " hot"},
    ]
    task = load("jsonl", path=write(tmp_path / "own.jsonl", rows))
    assert [example.answer for example in task] == [" blue", " hot"]
    reasons = {row["row"]: row["reason"] for row in task.skipped}
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 8, 9]
    expected = (
        "not valid JSON",
        "is compared with a target",
        "'ice' does not occur",
        "not inside",
        "'prompt' must be",
    )
    for row, part in zip((2, 3, 4, 5, 6), expected, strict=True):
        assert part in reasons[row]
    assert "taken by an earlier row" in reasons[9]


def test_null_is_no_name(tmp_path):
    """`"id": null` is what writers of tables put where rows have none."""
    rows = [{"prompt": f"The {name} is", "target": " blue", "id": None} for name in ("sky", "sea", "jay")]
    task = load("jsonl", path=write(tmp_path / "own.jsonl", rows))
    assert [example.id for example in task] == ["1", "2", "3"]
    public = [{"prompt": "Oslo is in", "subject": "Oslo", "attribute": "Norway", "known_id": None}] * 2
    assert [own.id for own in load("known", path=write(tmp_path / "known.json", [json.dumps(public)]))] == [
        "1",
        "2",
    ]
    cases = [{"case_id": None, "original": {"prompt": "a is", "answer": "b"}}] * 2
    found = load("multilingual", path=write(tmp_path / "cases.json", [json.dumps(cases)]))
    assert [own.id for own in found] == ["1 English", "2 English"]


def test_what_python_cannot_read_costs_only_its_row(tmp_path):
    """Half a surrogate pair, brackets or digits without end, and whatever else a row may hold."""
    good = {"prompt": "The sky is", "target": " blue"}
    bad = [
        good | {"prompt": "The \ud83d sky is"},
        good | {"id": "\udc00"},
        good | {"foil": " \ud800"},
        good | {"\ud800": 1, "target": 3},
        "[" * 50_000 + "]" * 50_000,
        '{"prompt": "a", "target": ' + "1" * 5001 + "}",
        good | {"evidence": {"a": [1]}},
        good | {"evidence": [[0, 2**70]]},
        "\x00",
        "null",
        "NaN",
    ]
    task = load("jsonl", path=write(tmp_path / "own.jsonl", [*bad, good]))
    assert [example.id for example in task] == [str(len(bad) + 1)]
    assert [row["row"] for row in task.skipped] == list(range(1, len(bad) + 1))
    reasons = [row["reason"] for row in task.skipped]
    assert all("lone surrogate" in reason for reason in reasons[:3])
    assert "nested too deeply" in reasons[4]
    assert "too long" in reasons[5]
    json.dumps(task.skipped, ensure_ascii=False).encode()
    path = write(
        tmp_path / "texts.jsonl",
        [{"text": "\ud800", "label": 1}, {"text": "a", "label": [1]}, {"text": "b", "label": 1}],
    )
    assert [row["row"] for row in load_texts("truthful", path=path).skipped] == [1, 2]


@pytest.mark.parametrize("read", [lambda path: load("jsonl", path=path), read_passages])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "bytes", "brackets", "digits"])
def test_a_file_that_cannot_be_read_is_an_error_of_the_caller(tmp_path, read, kind):
    path = tmp_path / ("own.txt" if read is read_passages and kind in ("bytes", "a pipe") else "own.json")
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        brackets, digits = b"[" * 50_000 + b"]" * 50_000, b"[" + b"1" * 5001 + b"]"
        path.write_bytes({"bytes": b"\xff\xfe\x00\xd8", "brackets": brackets, "digits": digits}[kind])
    with pytest.raises(DePassError, match=re.escape(str(path))):
        read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "oii"}, "no task 'oii'; there are ioi, known, counterfact"),
        ({"name": "ioi", "size": 0}, "whole number from 1, not 0"),
        ({"name": "ioi", "split": "dev"}, "no split 'dev'; it has 'train' and 'test'"),
        ({"name": "known", "split": "dev"}, "it has train, test, new-train, new-test"),
        ({"name": "known", "size": 361}, "has 360 prompts, not 361"),
        ({"name": "jsonl"}, "give its path"),
        ({"name": "jsonl", "path": "missing.jsonl"}, r"no file missing\.jsonl"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(DePassError, match=message):
        load(**arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "neither a JSON list nor JSON Lines.*empty"),
        ("prompt,target", "line 1: not valid JSON"),
        ('[{"prompt": "a"', r"not valid JSON \(line 1, column"),
        ('{"text": "a"}', "no row that the task 'jsonl' can use; row 1: the field 'prompt' is missing"),
    ],
)
def test_a_file_that_is_no_task_is_named(content, message, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(DePassError, match=message) as error:
        load("jsonl", path=path)
    assert str(path) in str(error.value)


def test_passages_are_read_from_a_file(tmp_path):
    rows = [{"prompt": "The sky is", "target": " blue"}, {"text": "Grass is green."}]
    whole, plain = read_passages(write(tmp_path / "a.jsonl", rows))
    assert (whole.text, whole.answers, plain.answers) == ("The sky is blue", ((10, 15),), ())
    assert [whole] == from_examples(load("jsonl", size=1, path=tmp_path / "a.jsonl"))
    assert answered("The sky is", " blue") == whole
    (tmp_path / "a.txt").write_text("One.\nTwo.\n\n\nThree.\n")
    assert [passage.text for passage in read_passages(tmp_path / "a.txt")] == ["One.\nTwo.", "Three."]
    with pytest.raises(DePassError, match=r"row 2 of .*b\.jsonl: the field 'target' is missing"):
        read_passages(write(tmp_path / "b.jsonl", [rows[0], {"prompt": "a"}]))


@needs_data
@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("ioi", "ioi.json", 300),
        ("known", "known_1000.json", 400),
        ("counterfact", "counterfact.json", 1000),
        ("longra", "longra.json", 150),
        ("language", "language_test.json", 600),
    ],
)
def test_public_files_load_whole(name, file, rows):
    task = load(name, path=DATA / file)
    assert len(task) == rows
    assert task.skipped == []
    for example in task:
        spans = example.evidence_ranges()
        assert spans
        assert all(0 <= start < end <= len(example.prompt) for start, end in spans)


def test_what_is_too_large_is_named(tmp_path):
    """A file; or a text, which costs its row: some tokenizers end the process on 300 MB."""
    path = tmp_path / "rows.jsonl"
    rows = ({"prompt": prompt, "target": " b"} for prompt in ("a", "x" * 10_000_001))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load("jsonl", path=path)
    assert [example.prompt for example in task] == ["a"]
    assert "the field 'prompt' has 10,000,001 characters" in task.skipped[0]["reason"]
    with path.open("wb") as file:
        file.truncate(2**30 + 1)  # takes no room
    with pytest.raises(DePassError, match="too large: 1,073,741,825 bytes"):
        load("jsonl", path=path)
