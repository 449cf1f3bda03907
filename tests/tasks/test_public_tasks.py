"""The tasks of the paper's experiments: what they read, from files and by name, and what tiny has instead."""

import json
import re

import datasets
import pytest

from depass_lightning import DePass
from depass_lightning.errors import DePassError
from depass_lightning.tasks import NAMES, Task, load, load_texts
from depass_lightning.tasks.synthetic.facts import FACTS
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not available")

COUNTERFACT = [
    {"case_id": 4, "relation_id": "P1", "subject": "Ann", "answer": "French", "prompt": "Ann speaks"},
    {"case_id": 5, "relation_id": "P1", "subject": "Bo", "answer": "Dutch", "prompt": "Bo speaks"},
    {"case_id": 6, "relation_id": "P2", "subject": "Cy", "answer": "chess", "prompt": "Cy plays"},
    {"case_id": 7, "relation_id": "P2", "subject": "Nobody", "answer": "chess", "prompt": "Di plays"},
]
TRUTHFUL = {
    "case_id": 0,
    "question": "Do pigs fly?",
    "wrong_info": "Pigs fly.",
    "options": "A: Pigs fly. B: They do not.",
    "correct_option": "B",
    "prompt_init": "Question: Do pigs fly?\nOptions: A: Pigs fly. B: They do not.\nThe answer is",
    "prompt_correct": "Information: They do not.\nQuestion: ...\nThe answer is",
    "prompt_wrong": "Information: Pigs fly.\nQuestion: Do pigs fly?\n"
    "Options: A: Pigs fly. B: They do not.\nThe answer is",
}


def texts(example, role):
    return [example.prompt[start:end] for start, end in example.roles[role]]


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_every_task_has_a_name_and_prompts_of_its_own():
    expected = "ioi known counterfact truthfulqa longra multilingual language jsonl labelled chat rag"
    assert tuple(expected.split()) == NAMES
    for name in set(NAMES) - {"jsonl", "labelled", "chat"}:  # which read files
        task = load(name, size=5)
        assert task.name == name
        assert [example.id for example in load(name, size=5)] == [example.id for example in task]
        for example in task:
            assert example.prompt == example.prompt.strip()
            assert str(example.answer).startswith(" ")
            for spans in example.roles.values():
                assert all(example.prompt[start:end].strip() for start, end in spans)


def test_counterfact_rows_of_all_layouts_are_one(tmp_path):
    (own, *_) = load("counterfact", path=write(tmp_path / "own.json", COUNTERFACT))
    rewrite = {
        "prompt": "{} speaks",
        "relation_id": "P1",
        "subject": "Ann",
        "target_true": {"str": "French"},
        "target_new": {"str": "Dutch"},
    }
    row = {"case_id": 4, "requested_rewrite": rewrite}
    (original,) = load("counterfact", path=write(tmp_path / "original.json", [row]))
    row = {"case_id": 4, "relation_id": "P1", "subject": "Ann", "prompt": "Ann speaks"}
    row |= {"target_true": " French", "target_false": " Dutch"}
    (tracing,) = load("counterfact", path=write(tmp_path / "tracing.json", [row]))
    assert original == tracing
    assert (own.foil, original.foil) == (None, " Dutch")
    for example in (own, original):
        assert (example.id, example.prompt, example.answer) == ("4", "Ann speaks", " French")
        assert texts(example, "subject") == ["Ann"]
        assert (example.evidence, example.labels) == (("subject",), {"relation": "P1"})


def test_a_bad_row_of_counterfact_costs_only_itself(tmp_path):
    task = load("counterfact", path=write(tmp_path / "own.json", COUNTERFACT))
    assert (len(task), [row["row"] for row in task.skipped]) == (3, [4])
    assert "'Nobody' does not occur" in task.skipped[0]["reason"]


def test_misleading_prompts_state_the_answer_to_another_row(tmp_path):
    task = load("counterfact", path=write(tmp_path / "own.json", COUNTERFACT), split="misleading")
    ann, bo = task
    assert ann.prompt == "Ann speaks Dutch. Ann speaks"
    assert (ann.answer, ann.foil, ann.evidence) == (" French", " Dutch", ())
    assert texts(ann, "misleading") == ["Ann speaks Dutch."]
    assert texts(ann, "false_answer") == ["Dutch"]
    assert ann.roles["subject"] == ((18, 21),)
    assert ann.variants == {"plain": "Ann speaks", "correct": "Ann speaks French. Ann speaks"}
    assert bo.foil == " French"
    assert [row["reason"] for row in task.skipped[1:]] == ["no other row has the relation 'P2'"]


def test_false_statements_about_tinys_facts_are_false_and_worded_otherwise():
    right = {(fact.subject, fact.relation): fact.answer for fact in FACTS}
    task = load("counterfact", split="misleading")
    assert len(task) == len(FACTS)
    for example in task:
        (subject,), relation = texts(example, "subject"), example.labels["relation"]
        assert example.answer == f" {right[subject, relation]}"
        assert example.foil != example.answer
        (statement,) = texts(example, "misleading")
        assert statement.endswith(f"{example.foil}.")
        assert subject in statement
        assert example.prompt == f"{statement} {example.variants['plain']}"
        assert not statement.startswith(example.variants["plain"])
    assert {example.foil for example in load("truthfulqa")} == {example.foil for example in task}


def test_truthfulqa_rows(tmp_path):
    bad = [TRUTHFUL | {"options": "yes or no"}, TRUTHFUL | {"wrong_info": "Cows fly."}]
    bad += [TRUTHFUL | {"correct_option": "C"}]
    task = load("truthfulqa", path=write(tmp_path / "own.json", [TRUTHFUL, *bad]))
    (example,) = task
    assert (example.answer, example.foil) == (" B", " A")
    assert example.roles["misleading"] == ((13, 22),)
    assert texts(example, "misleading") == texts(example, "wrong_option") == ["Pigs fly."]
    assert texts(example, "right_option") == ["They do not."]
    assert example.roles["wrong_option"] > example.roles["misleading"]
    assert example.variants["plain"] == TRUTHFUL["prompt_init"]
    assert [row["row"] for row in task.skipped] == [2, 3, 4]


def test_truthfulqa_prompts_are_built_from_the_public_set_as_the_release_does(tmp_path):
    rows = [
        {"question": f"Is {i} odd?", "best_answer": "It may be", "incorrect_answers": ["It may be", "Never."]}
        for i in range(20)
    ]
    task = load("truthfulqa", path=write(tmp_path / "public.json", rows))
    assert {example.answer for example in task} == {" A", " B"}
    example = next(example for example in task if example.answer == " A")
    question = f"Question: Is {int(example.id) - 1} odd?\nOptions: A: It may be. B: Never.\nThe answer is"
    asked = "According to the given information and your knowledge, choose the best choice from the following"
    assert example.prompt == f"{asked} options.\nInformation: Never.\n{question}"
    assert example.variants["plain"] == f"{asked} options.\n{question}"
    assert example.variants["correct"] == f"{asked} options.\nInformation: It may be.\n{question}"


def test_longra_evidence_is_what_is_not_asked_for(tmp_path):
    prompt = "I landed in Romania, slept (I dreamt of Romanian food) and paid in the local"
    rows = [
        {"id": 9, "a": "Romania", "b": "leu", "prompt": prompt, "target_token": "leu", "category": "money"},
        {"id": 8, "a": "Peru", "b": "sol", "prompt": prompt, "target_token": "sol"},
        {"id": 7, "a": "Peru", "b": "sol", "prompt": prompt, "target_token": "leu"},
    ]
    task = load("longra", path=write(tmp_path / "own.json", rows))
    (example,) = task
    assert (example.id, example.answer, example.labels) == ("9", " leu", {"category": "money"})
    assert example.evidence_ranges() == [(12, 19)]
    assert [row["row"] for row in task.skipped] == [2, 3]


def test_tinys_long_range_prompts_have_their_evidence_before_the_idle_sentence():
    task = load("longra", size=40)
    assert len({example.prompt for example in task}) == 40
    for example in task:
        opening, idle, _ = example.prompt.split(". ")
        assert idle.split()[0] in ("The", "There")
        assert texts(example, "indirect_object") == [str(example.answer).strip()]
        assert texts(example, "repetition") == texts(example, "subject") == [str(example.foil).strip()]
        assert all(end <= len(opening) for _, end in example.evidence_ranges())
    with pytest.raises(DePassError, match="no split 'dev'"):
        load("longra", split="dev")


def test_multilingual_rows_are_taken_apart_by_language(tmp_path):
    rows = [
        {
            "case_id": 3,
            "original": {"prompt": "I am", "answer": "cold"},
            "French": {"prompt": "J'ai", "answer": ""},
        },
        {
            "case_id": 4,
            "original": {"prompt": "I am", "answer": "old"},
            "French": {"prompt": "Je suis", "answer": "vieux"},
        },
        {"case_id": 4, "French": {"prompt": "Je", "answer": "suis"}},
        {"case_id": 5},
        "nothing",
    ]
    path = write(tmp_path / "own.json", rows)
    task = load("multilingual", path=path)
    assert [(example.id, example.answer) for example in task] == [
        ("3 English", " cold"),
        ("4 English", " old"),
        ("4 French", " vieux"),
    ]
    assert task[2].labels == {"language": "French", "case": "4"}
    assert [row["row"] for row in task.skipped] == [1, 3, 4, 5]
    assert [example.id for example in load("multilingual", path=path, language="French")] == ["4 French"]
    assert len(load("multilingual", path=path, size=1)) == 1
    with pytest.raises(DePassError, match="no language 'Danish'; there are English, French"):
        load("multilingual", path=path, language="Danish")


def test_tinys_relations_stand_in_for_languages():
    task = load("multilingual", size=2)
    names = ["France capital", "France language", "Germany capital", "Germany language"]
    assert [example.id for example in task] == names
    people = load("multilingual", language="profession")
    assert all(example.labels["language"] == "profession" for example in people)
    with pytest.raises(DePassError, match="in one language"):
        load("ioi", language="French")


def test_labelled_texts_have_names_for_labels(tmp_path):
    rows = [
        {"text": "Water is wet.", "label": 1},
        {"statement": "Fire is cold.", "label": 0},
        {"text": "No label."},
        {"text": "Wrong label.", "label": 2},
        {"text": "True label.", "label": "true"},
    ]
    found = load_texts("truthful", path=write(tmp_path / "own.json", rows))
    assert found.texts == ["Water is wet.", "Fire is cold.", "True label."]
    assert found.labels == ["true", "false", "true"]
    assert [row["row"] for row in found.skipped] == [3, 4]
    rows = [{"text": "Bonjour", "labels": "fr"}, {"text": "Hola", "label": 5}, {"text": "Hei", "label": "no"}]
    found = load_texts("language", path=write(tmp_path / "languages.json", rows))
    assert found.labels == ["French", "Spanish", "no"]
    assert load("language", path=tmp_path / "languages.json")[1].answer == " Spanish"
    with pytest.raises(DePassError, match="no labelled texts 'colours'; there are truthful, language"):
        load_texts("colours")


@pytest.mark.parametrize("name", ["truthful", "language"])
def test_tinys_labelled_texts_do_not_meet_across_the_splits(name):
    subjects = {fact.subject for fact in FACTS}
    train, test = (load_texts(name, split=split) for split in ("train", "test"))
    sides = [
        {own for own in subjects if any(re.search(rf"\b{own}\b", text) for text in side.texts)}
        for side in (train, test)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert set(train.labels) == set(test.labels)
    assert min(len(train), len(test)) > 50
    if name == "truthful":
        assert abs(train.labels.count("true") - train.labels.count("false")) < 2
        true = {f"{prompt} {fact.answer}." for fact in FACTS for prompt, _ in fact.prompts("train")}
        assert all(
            (text in true) == (label == "true") for text, label in zip(train.texts, train.labels, strict=True)
        )


def test_a_data_set_is_loaded_by_its_name(monkeypatch):
    calls = []

    def fake(name, configuration):
        calls.append((name, configuration))
        whole = datasets.Dataset.from_list(COUNTERFACT[:2])
        return datasets.DatasetDict(
            {"train": whole, "test": whole.select([1])} if configuration else {"x": whole}
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert [example.id for example in load("counterfact", path="hub:someone/facts")] == ["4", "5"]
    assert [example.id for example in load("counterfact", path="hub:someone/facts:small@test")] == ["5"]
    assert calls == [("someone/facts", None), ("someone/facts", "small")]
    with pytest.raises(
        DePassError, match=r"several splits; there are train, test: path=hub:someone/facts:small@train"
    ):
        load("counterfact", path="hub:someone/facts:small")
    with pytest.raises(DePassError, match="no split 'dev'; there are train, test"):
        load("counterfact", path="hub:someone/facts:small@dev")
    with pytest.raises(DePassError, match="does not name a data set"):
        load("counterfact", path="hub:a b")


def test_without_a_network_the_message_says_how_to_get_the_rows(monkeypatch):
    def refuse(name, configuration):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DePassError, match=r"ConnectionError: no route.*save_to_disk\('folder'\).*path=folder"
    ):
        load("truthfulqa", path="hub:truthfulqa/truthful_qa:generation")


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    whole = datasets.Dataset.from_list(COUNTERFACT[:2])
    datasets.DatasetDict({"only": whole}).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"a": whole, "b": whole.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert len(load("counterfact", path=tmp_path / "one")) == 2
    assert len(load("counterfact", path=tmp_path / "two" / "b")) == 1
    with pytest.raises(DePassError, match="several splits; there are a, b"):
        load("counterfact", path=tmp_path / "two")
    with pytest.raises(DePassError, match="has no data set"):
        load("counterfact", path=tmp_path)


@needs_data
def test_the_layouts_in_several_parts_load_whole():
    task = load("truthfulqa", path=DATA / "truthfulqa.json")
    assert (len(task), task.skipped) == (200, [])
    misled = load("counterfact", path=DATA / "counterfact.json", split="misleading")
    assert len(misled) + len(misled.skipped) == 1000
    for example in (*task, *misled):
        assert len(texts(example, "misleading")) == 1
        assert texts(example, "misleading")[0] not in example.variants["plain"].split("Options:")[0]
    several = load("multilingual", path=DATA / "counterfact_multilingual.json")
    assert (len(several), several.skipped) == (1200, [])
    for name in ("truthful", "language"):
        for split in ("train", "test"):
            assert load_texts(name, path=DATA / f"{name}_{split}.json").skipped == []


@pytest.mark.parametrize(("name", "least"), [("counterfact", 0.95), ("truthfulqa", 0.95), ("longra", 0.75)])
def test_the_embedded_model_answers_its_prompts(name, least):
    depass = DePass.from_pretrained("tiny")
    task: Task = load(name, size=60)
    found = depass.attribute(
        [example.prompt for example in task], [example.answer for example in task], rule="taylor"
    )
    assert sum(own.rank == 1 for own in found) / len(task) >= least
