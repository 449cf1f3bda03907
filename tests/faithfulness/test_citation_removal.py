"""What the answer loses without the sentences that scores rank first, against plain runs of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from depass_lightning import DePass, DePassError, Spans
from depass_lightning.faithfulness import Case, CitationRemoval, evaluate, summarise
from depass_lightning.tasks import load


def test_the_drop_is_that_of_a_run_without_the_sentence() -> None:
    depass = DePass.from_pretrained("tiny")
    (example,) = load("rag", size=1, sentences=3)
    found = depass.attribute(example.prompt, example.answer, source=Spans("sentence"), rule="half")
    scores = torch.zeros_like(found.scores)
    scores[2], scores[1], scores[4], scores[3] = 3.0, 2.0, 1.0, 0.5
    scores[5] = 9.0  # the question is no candidate
    (columns,) = evaluate([Case(replace(found, scores=scores))], [CitationRemoval(samples=0)], depass)

    def log_probability(without: set[int]) -> float:
        spans = [found.positions[i] or (0, 0) for i in without]
        gone = {position for span in spans for position in range(*span)}
        ids = torch.tensor([[id for i, id in enumerate(found.token_ids) if i not in gone]])
        with torch.no_grad():
            logits = depass.model(ids).logits[0, -1].double()  # type: ignore[operator]
        return float(logits.log_softmax(-1)[found.target_ids[0]])

    whole = log_probability(set())
    assert columns["drop_1"] == pytest.approx(whole - log_probability({2}), abs=1e-4)
    assert columns["drop_3"] == pytest.approx(whole - log_probability({1, 2, 4}), abs=1e-4)
    assert "drop_5" not in columns
    assert set(columns) == {f"drop_{count}{suffix}" for count in (1, 3) for suffix in ("", "_random")}


def test_the_measures_are_summarised() -> None:
    depass = DePass.from_pretrained("tiny")
    task = load("rag", size=4, sentences=5)
    cases = [
        Case(depass.attribute(example.prompt, example.answer, source=Spans("sentence"), rule="half"))
        for example in task
    ]
    rows = evaluate(cases, [CitationRemoval(samples=8)], depass)
    summary = summarise(rows)
    for name in ("lds", "drop_1", "drop_3", "drop_5"):
        mean = sum(row[name] for row in rows) / len(rows)
        assert summary[name]["value"] == pytest.approx(mean)
    assert summary["drop_1"]["value"] > summary["drop_1"]["chance"]
    with pytest.raises(DePassError, match="samples must be 0 or at least 2; got 1"):
        CitationRemoval(samples=1)
