"""The truthfulness experiment: masking prompts and asking again, the blamed tokens, and the results."""

import json
from typing import Any

import pytest
import torch

from depass_lightning import DePass, Tokens, tasks
from depass_lightning.errors import DePassError
from depass_lightning.linear_probes import Fit, LinearProbe, hidden_states, spread
from depass_lightning.studies import read_experiment
from depass_lightning.studies.truthfulness.answers import DEPASS, METHODS, NONE, PROBE, RANDOM, Answers
from depass_lightning.studies.truthfulness.questions import ForcedChoice, Reply, ask
from depass_lightning.studies.truthfulness.study import (
    Truthful,
    blamed_by_depass,
    flagged_by_probe,
    misled_prompts,
)
from depass_lightning.utils.bootstrap import Interval, bootstrap
from tests.reference.models import build, prompt

FIT = Fit(1.0, 0.5, 10, 10, 5, True)


@pytest.fixture(scope="module")
def tiny():
    return DePass.from_pretrained("tiny")


@pytest.fixture(scope="module")
def random_model():
    return DePass(build("qwen2"))


def rows(count=4):
    return [prompt(length, seed=length).tolist() for length in range(6, 6 + count)]


def replies_one_by_one(depass, ids, answer, foil):
    """Ask by a plain call of the model, without padding or masks."""
    with torch.no_grad():
        logits = depass.model(torch.tensor([ids])).logits[0, -1]
    share = torch.softmax(logits[[answer, foil]], 0)[0]
    return 1 + int((logits > logits[answer]).sum()), bool(logits[answer] > logits[foil]), float(share)


def agree(reply, expected):
    assert (reply.rank, reply.preferred) == expected[:2]
    assert reply.share == pytest.approx(expected[2], rel=1e-4)


def test_replies_are_the_models_own(random_model):
    questions = [ForcedChoice(ids, answer=7 + i, foil=20) for i, ids in enumerate(rows())]
    removed, hidden = ask(random_model, questions), ask(random_model, questions, mask="attention")
    for replies in (removed, hidden):
        for question, reply in zip(questions, replies, strict=True):
            agree(reply, replies_one_by_one(random_model, question.ids, question.answer, question.foil))


def test_removed_tokens_are_not_there(random_model):
    masked = [{2}, {1, 3}, set(), {4, 5, 1}]
    questions = [ForcedChoice(ids, 9, 20, own) for ids, own in zip(rows(), masked, strict=True)]
    for question, reply in zip(questions, ask(random_model, questions, batch_size=3), strict=True):
        left = [own for place, own in enumerate(question.ids) if place not in question.masked]
        agree(reply, replies_one_by_one(random_model, left, 9, 20))


def test_hidden_tokens_reach_nobody_and_the_others_keep_their_places(random_model):
    (ids, *_) = rows()
    other = [*ids[:2], 50, *ids[3:]]
    questions = [ForcedChoice(other, 9, 20), ForcedChoice(ids, 9, 20, {2}), ForcedChoice(other, 9, 20, {2})]
    seen, hidden, elsewhere = ask(random_model, questions, mask="attention")
    removed = ask(random_model, questions)[1]
    assert hidden.share == pytest.approx(elsewhere.share, rel=1e-5)
    assert abs(hidden.share - seen.share) > 1e-3
    assert abs(hidden.share - removed.share) > 1e-6


def test_asking_leaves_the_model_as_it_was_and_refuses_what_has_no_answer(random_model):
    random_model.model.train()
    ask(random_model, [ForcedChoice(rows()[0], 9, 20)])
    assert random_model.model.training
    random_model.model.eval()
    with pytest.raises(DePassError, match="last token cannot be masked"):
        ask(random_model, [ForcedChoice([1, 5, 6], 9, 20, {2})])


def made_probe(tiny, direction, layer=2):
    weight = direction.double()[None]
    return LinearProbe(weight / weight.norm(), torch.zeros(1).double(), ("false", "true"), layer, FIT)


def test_a_prompts_misleading_tokens_are_found(tiny):
    task = tasks.load("truthfulqa", size=20)
    prompts, skipped = misled_prompts(tiny, task)
    assert skipped == []
    for own in prompts:
        words = [own.prompt.tokens[place] for place in own.places]
        (start, end), *_ = own.example.roles["misleading"]
        assert "".join(words).strip().replace(" .", ".") == own.example.prompt[start:end].replace(" .", ".")
        assert own.example.foil == words[-2]
        assert own.false == own.places[-2:-1]
        assert tiny.tokenizer.decode(own.answer).strip() == str(own.example.answer).strip()
        assert own.plain == tiny.tokenizer(own.example.variants["plain"])["input_ids"]


def test_depass_blames_what_speaks_against_truth(tiny):
    prompts, _ = misled_prompts(tiny, tasks.load("truthfulqa", size=6))
    probe = made_probe(tiny, torch.randn(64, generator=torch.Generator().manual_seed(3)))
    orders = blamed_by_depass(tiny, probe, prompts, "softmax", 4)
    for own, order in zip(prompts, orders, strict=True):
        found = tiny.attribute(own.prompt.text, probe.target("true", own.places[-1]), source=Tokens())
        scores = found.scores[order].tolist()
        assert scores == sorted(scores)
        assert sorted(order) == own.places
        assert found.names[order[0]] == own.prompt.tokens[order[0]]


def test_the_probe_flags_where_it_reads_least_truth(tiny):
    prompts, _ = misled_prompts(tiny, tasks.load("truthfulqa", size=6))
    for own in prompts:
        (states,) = hidden_states(tiny, [own.prompt.text], layers=[2], position="all")
        flagged = own.places[1]
        unit = torch.nn.functional.normalize(states[0], dim=1)
        probe = made_probe(tiny, -unit[flagged])
        (order,) = flagged_by_probe(tiny, probe, [own], 4)
        expected = sorted(own.places, key=lambda place: float(states[0, place] @ -unit[flagged]))
        assert order == expected


def reply(right, share=0.5):
    return Reply(1 if right else 3, right, share)


def hand_made():
    """Three prompts: the second is misled, and masking one token by DePass undoes it."""
    replies = {}
    for number, (without, before, depass, probe) in enumerate([(1, 1, 1, 0), (1, 0, 1, 0), (0, 0, 0, 0)]):
        replies[NONE, 0, number] = [reply(bool(without))]
        for method, after in ((DEPASS, [depass]), (PROBE, [probe]), (RANDOM, [0, 1])):
            replies[method, 0, number] = [reply(bool(before))] * len(after)
            replies[method, 1, number] = [reply(bool(own), 0.25 + own / 2) for own in after]
    found = {(method, count): [1.0, 0.0, 1.0] for method in METHODS for count in (0, 1)}
    return Answers(replies, [0, 1], 3, by_options=True, seed=0, covered=found)


def test_answers_come_to_what_they_come_to_by_hand():
    answers = hand_made()
    assert answers.misled == [1]
    assert answers.right(DEPASS, 1) == [1, 1, 0]
    assert answers.right(RANDOM, 1) == [0.5, 0.5, 0.5]
    assert answers.share(RANDOM, 1) == [0.5, 0.5, 0.5]
    table = {(row["method"], row["masked"]): row for row in answers.table()}
    assert list(table) == [
        (NONE, 0),
        ("nothing masked", 0),
        (DEPASS, 1),
        (PROBE, 1),
        (RANDOM, 1),
    ]
    row = table[DEPASS, 1]
    assert row["right"] == bootstrap([1, 1, 0])
    assert row["right_again"] == bootstrap([1.0])
    assert row["right_over_random"] == bootstrap([0.5, 0.5, -0.5])
    assert row["right_over_the_probe"] == bootstrap([1, 1, 0])
    assert row["of_the_two_over_the_probe"] == bootstrap([0.5, 0.5, 0])
    assert row["false_answer_found"] == bootstrap([1, 0, 1])
    assert table[PROBE, 1]["right_again"] == bootstrap([0.0])
    panels = answers.panels()
    assert panels[0].name == "all prompts"
    assert panels[0].curves[DEPASS].y == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert panels[2].name == "right again, of 1 misled prompts"
    assert panels[2].curves[RANDOM].y == [0, 0.5]
    assert panels[3].curves[PROBE].y[1] == pytest.approx(2 / 3)
    exact = Answers(answers.replies, [0, 1], 3, by_options=False, seed=0)
    assert exact.right(DEPASS, 1) == [1, 1, 0]


@pytest.mark.parametrize("task", ["truthfulqa", "counterfact"])
@pytest.mark.covering(1)
def test_it_runs_on_the_embedded_model_and_says_what_it_does_not_show(tiny, tmp_path, task):
    study = Truthful(task=task, size=12, counts=(0, 1, 3), draws=2, layers=[1, 2])
    found = study.run(tiny, tmp_path / "one")
    assert read_experiment(tmp_path / "one").table == found.table
    assert found.prompts == 12
    assert any("no better than chance" in note for note in found.notes)
    assert any("misleads the model nowhere" in note for note in found.notes)
    probe = LinearProbe.load(tmp_path / "one" / "probe.safetensors")
    assert probe.layer == found.settings["probe_layer"]
    by_layer = found.settings["validation_by_layer"]
    assert by_layer[probe.layer] == max(by_layer.values())
    assert found.table[0]["right"] == Interval(1.0, 1.0, 1.0)
    json.loads((tmp_path / "one" / "results.json").read_text())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "ioi"}, "truthfulqa or counterfact, not of 'ioi'"),
        ({"counts": (1, 2)}, "counts must rise from 0"),
        ({"counts": (0, 2, 2)}, "counts must rise from 0"),
        ({"train_path": "none.json"}, r"no file none\.json"),
        ({"mask": "forget"}, "'remove' or 'attention'"),
    ],
)
def test_mistakes_are_named(tiny, tmp_path, settings, message):
    with pytest.raises(DePassError, match=message):
        Truthful(**settings).run(tiny, tmp_path)


def test_prompts_that_cannot_be_used_are_left_out(tiny, tmp_path):
    rows = [
        {"case_id": 1, "subject": "France", "prompt": "The capital of France is", "target_true": "Paris"},
        {"case_id": 2, "subject": "Italy", "prompt": "The capital of Italy is", "target_true": "xyzzy"},
    ]
    rows = [row | {"relation_id": "P", "target_false": "Rome"} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = tasks.load("counterfact", path=tmp_path / "rows.json", split="misleading")
    found, skipped = misled_prompts(tiny, task)
    assert [own.example.id for own in found] == ["1"]
    assert len(skipped) == 1
    assert "2:" in skipped[0]
    assert "xyzzy" in skipped[0]
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    task = tasks.load("counterfact", path=tmp_path / "rows.json", split="misleading")
    with pytest.raises(DePassError, match="no prompt of counterfact can be used; 2:"):
        misled_prompts(tiny, task)


@pytest.mark.usefixtures("undrawn")
def test_only_prompts_that_the_model_knows_are_taken(tiny, tmp_path):
    rows = [
        {
            "case_id": number,
            "subject": subject,
            "prompt": f"The capital of {subject} is",
            "target_true": answer,
        }
        for number, (subject, answer) in enumerate(
            [("France", "Paris"), ("Italy", "Oslo"), ("Spain", "Madrid")]
        )
    ]
    rows = [row | {"relation_id": "P", "target_false": "Berlin"} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings: dict[str, Any] = {
        "task": "counterfact",
        "path": str(tmp_path / "rows.json"),
        "counts": (0, 1),
        "draws": 1,
        "layers": [1],
    }
    assert Truthful(**settings).run(tiny, tmp_path / "known").prompts == 2
    assert Truthful(**settings, known=False).run(tiny, tmp_path / "all").prompts == 3
    assert Truthful(**settings, size=1).run(tiny, tmp_path / "one").prompts == 1
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:2]))
    with pytest.raises(DePassError, match=r"answers none of 1 prompts right.*known=false"):
        Truthful(**settings).run(tiny, tmp_path / "none")


def test_layers_are_spread_evenly():
    assert spread(30, 10) == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert spread(3, 10) == [1, 2, 3]
