"""Scores summed by sentence, document and turn, and the sentences that an answer rests on."""

from __future__ import annotations

import pytest
import torch

from depass_lightning import DePass, DePassError, Documents, Spans
from depass_lightning.faithfulness import text_components

pytestmark = pytest.mark.covering

TEXTS = {
    "Who": "Mary and John went to the store. The weather was good.",
    "Where": "The park was open all day.",
}
QUESTION = "John gave a drink to"


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.fixture(scope="module")
def documents() -> Documents:
    return Documents(TEXTS, QUESTION, header="", separator=" ")


def test_documents_are_one_text_with_its_parts_named() -> None:
    text = Documents(
        [{"title": "A", "text": "One."}, " Two. "], "Three?", ask="Question: {question}\nAnswer:"
    )
    assert text == "A:\nOne.\n\nDocument 2:\nTwo.\n\nQuestion: Three?\nAnswer:"
    assert [(part.kind, part.name, text[part.start : part.end]) for part in text.sections] == [
        ("document", "A", "One."),
        ("document", "Document 2", "Two."),
        ("question", "question", "Three?"),
    ]


def test_sentences_are_components_and_are_cited(depass: DePass, documents: Documents) -> None:
    found = depass.attribute(documents, " Mary", source=Spans("sentence"), rule="half")
    assert [name.strip() for name in found.names] == [
        "<s>",
        "Mary and John went to the store.",
        "The weather was good.",
        "The park was open all day.",
        QUESTION,
    ]
    first, *_ = cited = found.cite(2)
    assert (first.document, first.text) == ("Who", "Mary and John went to the store.")
    assert len(cited) == 2
    assert first.score == pytest.approx(float(found.scores[1]))
    assert "".join(found.tokens[slice(*first.span)]).strip() == first.text
    by_document = found.grouped("document")
    assert by_document.names == ["Who", "Where", "question", "template"]
    assert torch.allclose(by_document.scores[0], found.scores[1] + found.scores[2])
    assert float(by_document.scores.sum()) == pytest.approx(found.value, rel=1e-5)
    assert [found.names[i].strip()[:4] for i in text_components(found)] == ["Mary", "The ", "The "]


def test_tokens_are_summed_to_the_same_units(depass: DePass, documents: Documents) -> None:
    """A linear rule's spans are the sums of its tokens."""
    tokens = depass.attribute(documents, " Mary", rule="half")
    spans = depass.attribute(documents, " Mary", source=Spans("sentence"), rule="half")
    summed, whole = tokens.cite(3), spans.cite(3)
    assert [(cited.document, cited.text, cited.span) for cited in summed] == [
        (cited.document, cited.text, cited.span) for cited in whole
    ]
    assert [cited.score for cited in summed] == pytest.approx([cited.score for cited in whole], abs=1e-4)


def test_what_cannot_be_cited_is_named(depass: DePass, documents: Documents) -> None:
    with pytest.raises(DePassError, match="has no documents to cite"):
        depass.attribute(QUESTION, " Mary").cite()
    with pytest.raises(DePassError, match="the prompt has no turns"):
        depass.attribute(documents, " Mary").grouped("turn")
    with pytest.raises(DePassError, match=r"reaches over several sentences; choose a source of smaller"):
        depass.attribute(documents, " Mary", source=Spans("document")).cite()
    with pytest.raises(DePassError, match=r"Spans\('document'\): the prompt has no documents"):
        depass.attribute(QUESTION, " Mary", source=Spans("document"))
    with pytest.raises(
        DePassError, match=r"context of 128; shorten or leave out documents; 'Document 10' reaches"
    ):
        depass.attribute(Documents([TEXTS["Who"]] * 20, QUESTION, header="", separator=" "))


@pytest.mark.parametrize(
    ("documents", "question", "reason"),
    [
        ([], "why?", "there are no documents"),
        ("text", "why?", "there are no documents; give a list"),
        (["a", " "], "why?", "Document 2 is ' '; a document must be text"),
        ([{"title": "A"}], "why?", "A is None"),
        ([{"title": "A", "text": "a"}, {"title": "A", "text": "b"}], "why?", "two documents are called 'A'"),
        (["a"], " ", "the question about the documents is ' '"),
    ],
)
def test_bad_documents_are_named(documents: list[str], question: str, reason: str) -> None:
    with pytest.raises(DePassError, match=reason):
        Documents(documents, question)
