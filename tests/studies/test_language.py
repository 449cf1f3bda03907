"""The language experiment: parts that are carried to the end, and how much of what there is in them."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from depass_lightning import DePass, Subspace
from depass_lightning.errors import DePassError
from depass_lightning.linear_probes import LinearProbe
from depass_lightning.prompts import prompts_of
from depass_lightning.studies import read_experiment
from depass_lightning.studies.language import parts
from depass_lightning.studies.language.measures import (
    language_told,
    measure,
    nearest_means_the_same,
    words_of,
)
from depass_lightning.studies.language.parts import carry_parts, decode
from depass_lightning.studies.language.study import Language, split_layers
from depass_lightning.tasks import Example, Task, Texts, load
from depass_lightning.utils.bootstrap import Interval
from tests.reference.models import build, prompt

TEXTS = ["The capital of France is", "By profession, Mary Larsen is a", "Most families in Peru speak"]


@pytest.fixture(scope="module")
def tiny():
    return DePass.from_pretrained("tiny")


def basis(rows, hidden, seed=0):
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))


def test_parts_are_what_is_decomposed_behind_the_frozen_norm(tiny):
    sources = [Subspace(1, basis(3, 64)), Subspace(2, basis(2, 64, seed=1))]
    prompts = prompts_of(tiny.decoder, tiny.tokenizer, TEXTS, None, None)
    carried = carry_parts(tiny, prompts, sources, batch_size=2)
    assert carried.states.shape == (2, 2, 3, 64)
    assert carried.error < 1e-5
    weight = tiny.model.model.norm.weight
    for at, source in enumerate(sources):
        for row, text in enumerate(TEXTS):
            parts = tiny.decompose(text, source=source).states[:, -1]
            scale = (parts.sum(0).pow(2).mean() + tiny.model.config.rms_norm_eps).rsqrt()
            expected = parts * scale * weight
            torch.testing.assert_close(carried.states[at, :, row], expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(carried.whole[row], expected.sum(0), rtol=1e-3, atol=1e-4)


def test_parts_and_the_bias_component_add_up_where_there_is_one():
    model: Any = build("qwen2")
    depass = DePass(model)
    ids = torch.stack([prompt(7, seed=1), prompt(7, seed=2)])
    prompts = prompts_of(depass.decoder, None, None, ids, None)
    carried = carry_parts(depass, prompts, [Subspace(1, basis(2, 36))])
    assert carried.error < 1e-5
    for row, own in enumerate(ids):
        (parts,) = depass.decompose(input_ids=own[None], source=Subspace(1, basis(2, 36)))
        assert parts.names == ["subspace", "rest", "bias"]
        states = parts.states[:, -1]
        scale = (states.sum(0).pow(2).mean() + model.config.rms_norm_eps).rsqrt()
        expected = states[:2] * scale * model.model.norm.weight
        torch.testing.assert_close(carried.states[0, :, row], expected, rtol=1e-3, atol=1e-4)


def test_decoding_is_the_unembedding(tiny, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK", 2)
    states = basis(5, 64, seed=4)
    answers = [3, 9, 27, 81, 243]
    tokens, ranks = decode(tiny, states, answers, top=4)
    logits = states @ tiny.model.lm_head.weight.T
    assert tokens.tolist() == logits.argsort(dim=1, descending=True)[:, :4].tolist()
    order = logits.argsort(dim=1, descending=True).tolist()
    assert ranks == [1 + own.index(answer) for own, answer in zip(order, answers, strict=True)]


def test_the_nearest_prompt_by_hand():
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.05], [0.5, 0.5]])
    languages, cases = ["a", "b", "a", "b", "b"], ["1", "1", "2", "2", "3"]
    hits, chance = nearest_means_the_same(states, languages, cases)
    # The first is nearest to the fourth, which means something else; the second to the first; the third to
    # the last; the fourth to the first. The last has its case in no other language.
    assert hits == [0.0, 1.0, 0.0, 0.0]
    assert chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def named(languages, cases):
    examples = [
        Example(f"{i}", f"prompt {i}", " x", labels={"language": language, "case": case})
        for i, (language, case) in enumerate(zip(languages, cases, strict=True))
    ]
    return Task("multilingual", examples)


def test_languages_are_told_where_they_are_and_only_there():
    generator = np.random.default_rng(0)
    languages = ["a", "b", "c"] * 40
    cases = [str(i // 3) for i in range(120)]
    noise = torch.from_numpy(generator.normal(size=(120, 6)))
    codes = torch.eye(3, 6).double()[[0, 1, 2] * 40] * 6
    told = language_told(noise + codes, languages, cases, layer=0, seed=0)
    assert len(told) == 60
    assert sum(told) / 60 > 0.95
    assert sum(language_told(noise, languages, cases, layer=0, seed=0)) / 60 < 0.55


def test_measures_by_hand():
    languages, cases = ["a", "b"] * 4, [str(i // 2) for i in range(8)]
    places = torch.tensor([0.3, -0.3] * 4)
    meanings = torch.eye(4).repeat_interleave(2, 0)
    task = named(languages, cases)
    top = torch.tensor([[1, 2, 3, 4], [1, 7, 8, 9]] * 4)
    words = {"a": frozenset({1, 2, 3}), "b": frozenset({7, 8})}
    ranks, answers = [1, 3, 10, 5, 1, 1, 1, 1], [2, 5] * 4
    states = torch.cat([3 * meanings, places[:, None]], 1)
    found = measure(states, task, top, ranks, answers, words, layer=1)
    assert found.values["own_words"] == [0.5, 0.5] * 4  # the answer 2 is not counted
    assert found.values["other_words"] == [0.0, 0.25] * 4
    assert found.values["answer_first"] == [1, 0, 0, 0, 1, 1, 1, 1]
    assert found.values["answer_in_top"] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert found.median_rank == 1
    assert found.mean("same_meaning") == 1
    assert found.chance == pytest.approx(1 / 4)
    assert found.mean("silhouette_meaning") > 0.8 > 0.1 > found.mean("silhouette_language")


def test_a_languages_words_are_in_no_other_language(tiny):
    texts = Texts("language", ["Mary plays the violin", "The people of Peru speak"], ["music", "speech"])
    task = named(["music", "speech"], ["1", "2"])

    def encode(word):
        return tiny.tokenizer(word, add_special_tokens=False)["input_ids"][0]

    words = words_of(tiny, texts, task, [encode("piano"), encode("violin")])
    assert {tiny.tokenizer.decode(own) for own in words["music"]} == {"Mary", "plays", "the", "piano"}
    assert encode("violin") not in words["speech"]


@pytest.mark.slow
def test_it_parts_relations_from_subjects_on_the_embedded_model(tiny, tmp_path):
    study = Language(size=30, layers=[1])
    found = study.run(tiny, tmp_path)
    rows = {row["part"]: row for row in found.table}

    def cell(part, measure):
        value = rows[part][measure]
        assert isinstance(value, Interval)
        return value

    language, rest = "language part", "rest"
    for other in (rest, "random part", "random rest"):
        assert cell(language, "own_words").low > cell(other, "own_words").high
        assert cell(language, "silhouette_language").low > cell(other, "silhouette_language").high
    assert cell(rest, "answer_first").low > cell(language, "answer_first").high
    assert cell(rest, "same_meaning").value > cell(language, "same_meaning").value
    assert found.settings["completeness_error"] < 1e-5
    assert "no finding" not in found.notes[0]
    assert "relations play the part of languages" in found.notes[0]
    assert sum(note.startswith("“") and "split at layer 1" in note for note in found.notes) == 2
    assert len(found.clouds) == 2
    assert len(found.clouds[0].x) == found.prompts == len(load("multilingual", size=30))
    assert LinearProbe.load(tmp_path / "probe.safetensors").layer == 1
    back = read_experiment(tmp_path)
    assert (back.table, back.notes, back.clouds) == (found.table, found.notes, found.clouds)


def test_mistakes_are_named_before_anything_is_run(tiny, tmp_path):
    rows = [{"case_id": i, "original": {"prompt": "I am", "answer": "old"}} for i in range(5)]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    rows = [row | {"Danish": {"prompt": "Jeg er", "answer": "gammel"}} for row in rows]
    (tmp_path / "two.json").write_text(json.dumps(rows))
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"top": 0}, "top must be 1 or more"),
        ({"size": 3}, "two languages and four cases"),
        ({"path": str(tmp_path / "one.json")}, "two languages and four cases"),
        ({"path": str(tmp_path / "two.json")}, "prompts in Danish, English, but no training texts"),
    ]
    for settings, message in mistakes:
        with pytest.raises(DePassError, match=message):
            Language(**settings).run(tiny, tmp_path / "out")


def test_states_are_split_inside_the_model():
    assert split_layers(30) == [6, 12, 18, 24]
    assert split_layers(3) == [1, 2]
    assert split_layers(2) == [1]
