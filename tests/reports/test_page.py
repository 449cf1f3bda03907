"""The page: what it holds, what it escapes, and that a browser draws it."""

import html
import io
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from depass_lightning.errors import DePassError
from depass_lightning.reports.figures import curves_figure, save_figure
from depass_lightning.reports.notebook import attribution_html
from depass_lightning.reports.page import SharedComponents, page_html, write_matrix_page, write_page
from depass_lightning.reports.terminal import attribution_text
from depass_lightning.results.component import Component
from depass_lightning.results.generation import Generation
from depass_lightning.utils.sections import Section
from tests.reference.attributions import CURVES, NASTY, Elements, attribution_of, heads, ioi, nasty, neurons
from tests.reports.browser import FLAGS

EXAMPLE = {
    "id": "ioi-7",
    "answer": " Mary",
    "roles": {"subject": [(14, 18)], "indirect_object": [(5, 9)]},
    "evidence": ["indirect_object"],
    "evidence_first": True,
}


def data_of(page: str) -> dict[str, Any]:
    """Return the data that a page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", [ioi()], title="T", summary={"correct": 1.0, "curves": CURVES})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for tag, attributes in Elements(page).found:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "@import" not in page


def test_the_page_allows_its_own_script_alone() -> None:
    import base64
    import hashlib

    page = page_html([ioi()], title="T")
    script = page.rsplit("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_no_text_of_a_run_becomes_markup() -> None:
    page = page_html(
        [nasty()],
        title=NASTY,
        subtitle=NASTY,
        summary={NASTY: {"value": 1.0, "note": NASTY}},
        examples=[{"id": NASTY, "answer": NASTY, "roles": {NASTY: [(0, 3)]}, "evidence": [(0, 3)]}],
    )
    assert [tag for tag, _ in Elements(page).found].count("script") == 2
    assert NASTY not in page
    prompt = data_of(page)["prompts"][0]
    assert prompt["tokens"][1] == NASTY
    assert prompt["tokens"][3] == "↵"
    assert prompt["id"] == NASTY
    assert prompt["prediction"] == "</script>"


def test_the_page_holds_scores_words_and_roles() -> None:
    page = page_html([ioi()], title="Indirect objects", subtitle="Sub", examples=[EXAMPLE])
    prompt = data_of(page)["prompts"][0]
    assert prompt["id"] == "ioi-7"
    assert prompt["views"]["tokens"]["scores"] == ioi().scores.tolist()
    assert prompt["views"]["tokens"]["spans"][-1] is None
    assert prompt["views"]["tokens"]["names"][-2:] == [None, "bias"]
    assert "words" not in prompt["views"]  # every token is a word already
    assert prompt["marks"] == [
        {"name": "indirect object", "right": True, "tokens": [2]},
        {"name": "subject", "right": False, "tokens": [4]},
    ]
    assert prompt["share"] == pytest.approx(3.0 / 4.125, rel=1e-4)
    assert prompt["first"] is True
    assert prompt["special"] == [0]
    text = Elements(page).text
    assert "Indirect objects" in text
    assert "tokens at layer 0" in text


def test_the_page_offers_words_where_tokens_are_pieces() -> None:
    page = page_html([attribution_of([(" Mar", 1.0), ("y", 2.0)])], title="T")
    words = data_of(page)["prompts"][0]["views"]["words"]
    assert words == {"names": [None, None], "texts": {}, "scores": [0.25, 3.0], "spans": [[0, 1], [1, 3]]}


def test_a_letter_in_two_tokens_is_read_from_the_prompt() -> None:
    a = attribution_of([("\ufffd", 1.0), ("\ufffd", 2.0)], text="語", offsets=[(0, 0), (0, 1), (0, 1)])
    assert data_of(page_html([a], title="T"))["prompts"][0]["views"]["words"]["texts"] == {"1": "語"}


def test_evidence_can_be_given_as_ranges_and_left_out() -> None:
    page = page_html([ioi(), ioi()], title="T", examples=[{"evidence": [[5, 9]]}, {}])
    known, unknown = data_of(page)["prompts"]
    assert known["marks"] == [{"name": "evidence", "right": True, "tokens": [2]}]
    assert (unknown["marks"], unknown["share"], unknown["first"]) == ([], None, None)
    assert [known["id"], unknown["id"]] == ["prompt 1", "prompt 2"]


def test_a_page_of_bare_token_ids_and_of_heads() -> None:
    bare = ioi(text="", offsets=None)
    two = ioi(scores=torch.tensor([1.0, -2.0]), components=heads(1).components[1:3])
    first, second = data_of(page_html([bare, two], title="T", examples=[EXAMPLE, {}]))["prompts"]
    assert first["marks"] == []
    assert first["share"] is None
    assert second["views"]["tokens"]["names"] == ["head 0", "head 1"]


def test_heads_of_all_layers_share_one_grid_and_are_shown_together() -> None:
    one, other = heads(), heads(scores=2 * heads().scores, value=5.0)
    page = page_html([one, other], title="T")
    data = data_of(page)
    kinds = ["state", "head 0", "head 1", "head 2", "bias"]
    assert data["grids"] == [{"layers": [0, 1], "columns": kinds, "cells": [1, 2, 3], "remainders": [0, 4]}]
    view = data["prompts"][0]["views"]["tokens"]
    assert view["grid"] == 0
    assert view["scores"] == one.scores.tolist()
    assert view["names"] == []  # the grid's
    assert data["mean"]["value"] == 3.75
    assert data["mean"]["view"]["scores"] == pytest.approx((1.5 * one.scores).tolist())
    assert "heads of every layer" in Elements(page).text
    assert data["prompts"][0]["share"] is None
    assert data_of(page_html([ioi(), ioi()], title="T"))["mean"] is None


def test_of_many_neurons_the_strongest_are_shown_and_the_rest_summed() -> None:
    a = neurons()
    page = page_html([a], title="T", components=SharedComponents(notes={"neuron 299": f"promotes {NASTY}"}))
    data = data_of(page)
    view = data["prompts"][0]["views"]["tokens"]
    assert view["names"] == ["state", *(f"neuron {i}" for i in range(240, 300)), "the other 240"]
    assert view["remainders"] == [0, 61]
    assert view["partial"] is False
    assert sum(view["scores"]) == pytest.approx(a.value, rel=1e-4)
    assert data["notes"] == {"neuron 299": f"promotes {NASTY}"}
    assert NASTY not in page
    assert "promotes" in Elements(page).text


def test_settings_that_differ_stand_with_their_prompt() -> None:
    page = page_html([ioi(rule="softmax"), ioi(rule="taylor")], title="T")
    assert [prompt["settings"] for prompt in data_of(page)["prompts"]] == [
        {"rule": "softmax"},
        {"rule": "taylor"},
    ]
    assert "rule" not in Elements(page.split("<main", 1)[0]).text


def test_settings_are_written_for_a_reader_once() -> None:
    known = {"score_weight": 0.5, "labels": True, "log_probability": -0.25}
    page = page_html([ioi(metadata=known)], title="T")
    head = Elements(page.split("<main", 1)[0]).text
    assert "score weight 0.5" in " ".join(head.split())
    assert "labels" not in head
    assert "probability" not in head
    assert data_of(page)["prompts"][0]["settings"] == {"log-probability": "−0.25"}


def test_equal_ids_are_told_apart() -> None:
    page = page_html([ioi()] * 3, title="T", examples=[{"id": "a"}, {"id": "b"}, {"id": "a"}])
    assert [prompt["id"] for prompt in data_of(page)["prompts"]] == ["a", "b", "a (2)"]


def test_numbers_that_json_lacks_are_left_out() -> None:
    a = ioi(scores=torch.tensor([float("nan")] * 11), value=float("inf"))
    prompt = data_of(page_html([a], title="T"))["prompts"][0]
    assert prompt["value"] is None
    assert prompt["views"]["tokens"]["scores"] == [None] * 11


def test_figures_are_embedded(tmp_path: Path) -> None:
    save_figure(curves_figure(CURVES), tmp_path / "mean_curves.png")
    page = page_html([ioi()], title="T", figures=[tmp_path / "mean_curves.png"])
    images = [attributes for tag, attributes in Elements(page).found if tag == "img"]
    assert len(images) == 1
    assert (images[0]["src"] or "").startswith("data:image/png;base64,iVBOR")
    assert images[0]["alt"] == "mean curves"


def test_what_no_page_can_be_made_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DePassError, match="at least one attribution"):
        page_html([], title="T")
    with pytest.raises(DePassError, match="1 examples for 2 attributions"):
        page_html([ioi(), ioi()], title="T", examples=[EXAMPLE])
    with pytest.raises(DePassError, match=r"numbers\.csv: a page cannot embed"):
        page_html([ioi()], title="T", figures=[tmp_path / "numbers.csv"])
    with pytest.raises(DePassError, match="there is no figure"):
        page_html([ioi()], title="T", figures=[tmp_path / "missing.png"])


def drawn(folder: Path, page: str) -> str:
    """Return what a browser makes of a page, as markup."""
    profile = f"--user-data-dir={folder / 'profile'}"
    address = f"{folder.as_uri()}/{page}"
    command = ["chromium", *FLAGS, profile, "--virtual-time-budget=2000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split("<noscript>", 1)[0]


def generated(count: int = 3, **changes: Any) -> Generation:
    """Return what the last tokens of the sentence of indirect objects rest on, each over those before it."""
    rows = []
    for position in range(len(ioi().tokens) - 1 - count, len(ioi().tokens) - 1):
        own = ioi(position=position, target_ids=[position + 1], **changes)
        own.scores[position + 1 : len(own.tokens)] = 0
        own.target = repr(own.tokens[position + 1])
        rows.append(own)
    return Generation(rows)


def test_a_generation_is_one_matrix_that_repeats_nothing(tmp_path: Path) -> None:
    found = generated()
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What the model relies on for" in Elements(page).text
    data = data_of(page)
    first, second, third = data["prompts"]
    assert data["matrices"] == [{"name": "matrix", "rows": [0, 3]}]
    assert data["mean"] is None
    assert (first["matrix"], second["like"], third["like"]) == (0, 0, 0)
    assert [first["target_position"], second["target_position"], third["target_position"]] == [7, 8, 9]
    assert [first["row"], second["row"], third["row"]] == ["John", "waved", "to"]
    assert not {"tokens", "special", "marks"} & set(second)
    assert set(second["views"]["tokens"]) == {"scores"}
    assert (
        second["views"]["tokens"]["scores"][: second["target_position"]]
        == found.scores[1, : second["target_position"]].tolist()
    )


def test_a_whole_answer_is_part_of_the_text() -> None:
    answer = ioi(answer_start=7, target_ids=[], position=8, remainder=-0.5)
    (prompt,) = data_of(page_html([answer], title="T"))["prompts"]
    assert prompt["answer_start"] == 7
    assert prompt["predicted"] == "model's answer begins"
    assert list(prompt["facts"]) == [
        "from the prompt",
        "from the answer's earlier tokens",
        "from elsewhere",
        "remainder to the log-probability",
    ]
    assert prompt["facts"]["remainder to the log-probability"] == "−0.500"
    shown = io.StringIO()
    Console(width=200, file=shown).print(attribution_text(answer))
    assert "from the answer's earlier tokens" in shown.getvalue()
    assert "model's answer begins" in html.unescape(attribution_html(answer))


def test_several_matrices_stand_beside_single_prompts() -> None:
    found = generated(2)
    rows = [{"id": f"a/{i}", "matrix": "a", "row": str(i)} for i in range(2)]
    more = [{"id": f"b/{i}", "matrix": "b", "row": str(i)} for i in range(2)]
    page = page_html([*found, ioi(), *found], title="T", examples=[*rows, {"id": "alone"}, *more])
    data = data_of(page)
    assert data["matrices"] == [{"name": "a", "rows": [0, 2]}, {"name": "b", "rows": [3, 5]}]
    assert [prompt.get("matrix") for prompt in data["prompts"]] == [0, None, None, 1, None]
    assert [prompt.get("like") for prompt in data["prompts"]] == [None, 0, None, None, 3]


def test_the_rows_of_a_matrix_show_the_same_neurons() -> None:
    one, other = neurons(), neurons()
    other.scores = torch.cat([other.scores[:1], other.scores[1:].flip(0) / 10])
    page = page_html([one, other], title="T", examples=[{"id": str(i), "matrix": "m"} for i in range(2)])
    lead, row = data_of(page)["prompts"]
    assert "names" not in row["views"]["tokens"]
    assert {"neuron 0", "neuron 299"} <= set(lead["views"]["tokens"]["names"])
    assert sum(row["views"]["tokens"]["scores"]) == pytest.approx(other.scores.sum().item(), rel=1e-4)


def chosen_rows(body: str) -> list[bool]:
    """Return of each row of a drawn matrix whether it is the chosen one."""
    return ['aria-selected="true"' in row for row in re.findall(r'<div id="row-[^>]*>', body)]


USED = """
const go = (kind, at, more) => at.dispatchEvent(new PointerEvent(kind, { bubbles: true, ...more }));
const box = () => document.querySelectorAll(".matrix-band")[1].getBoundingClientRect();
const at = document.querySelectorAll(".matrix-band")[1];
go("click", at, { clientX: box().left + 1, clientY: box().top + 4 });
const down = new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true });
document.querySelector(".matrix").dispatchEvent(down);
const over = { clientX: box().left + (2.5 * box().width) / 10, clientY: box().top + 4 };
setTimeout(() => go("pointermove", at, over), 200);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_a_matrix_whose_rows_can_be_chosen(tmp_path: Path) -> None:
    examples = [
        {"id": f"mine/{row}", "matrix": "mine", "row": name}
        for row, name in enumerate(["John", "waved", "to"])
    ]
    write_page(tmp_path / "page.html", generated(), title="Generated", examples=examples)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    body = drawn(tmp_path, "page.html")
    assert body.count('class="matrix-row"') == 3
    assert body.count('class="matrix-band"') == 3
    assert chosen_rows(body) == [True, False, False]
    assert "piece answer" in body  # the generated token, in the text
    assert 'class="answer"' not in body  # a single-token answer needs no text of its own
    assert "<strong>mine, token 1</strong>" in body
    # What a reader does, by a script that the page itself would not allow.
    used = page.replace("http-equiv", "data-off").replace("</body>", f"<script>{USED}</script></body>")
    (tmp_path / "used.html").write_text(used, encoding="utf-8")
    body = drawn(tmp_path, "used.html")
    assert chosen_rows(body) == [False, False, True]
    tip = re.sub("<[^>]*>", "", body.split('id="tip"', 1)[1])
    assert "Mary → waved+377.4% of what supports it" in tip
    assert 'class="matrix-mark"' in body


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_token_of_an_answer_shows_what_it_rests_on_when_it_is_pointed_at(tmp_path: Path) -> None:
    write_matrix_page(tmp_path / "page.html", generated(), title="Generated")
    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("http-equiv", "data-off")
    pointing = """
    const tokens = document.querySelectorAll(".prompt [data-row]");
    tokens[1].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    """
    leaving = 'document.querySelector(".prompt").dispatchEvent(new PointerEvent("pointerleave"));'
    clicking = 'document.querySelectorAll(".prompt [data-row]")[2].click();'
    for script, target, row in (
        (pointing, "waved", 0),
        (pointing + leaving, "John", 0),
        (clicking, "to", 2),
    ):
        used = page.replace("</body>", f"<script>{script}</script></body>")
        (tmp_path / "used.html").write_text(used, encoding="utf-8")
        body = drawn(tmp_path, "used.html")
        targets = re.findall(r'<span class="piece[^"]* answer[^"]*"[^>]*>([^<]*)<', body)
        assert targets == [target]
        assert chosen_rows(body).index(True) == row


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_the_map_of_heads(tmp_path: Path) -> None:
    write_page(
        tmp_path / "page.html",
        [heads(), heads()],
        title="Heads",
        components=SharedComponents(notes={"layer 1 head 0": "a note"}),
    )
    body = drawn(tmp_path, "page.html")
    assert body.count('class="cell"') == 2 * 2 * 3  # the mean's and the prompt's
    assert body.count("a note") == 2
    assert "layer 1 head 0 −3, layer 0 head 0 −2" in body  # the map's text alternative
    assert 'class="chip"' not in body


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    many = [nasty() if i == 1234 else ioi() for i in range(2000)]
    examples = [EXAMPLE | {"id": f"ioi-{i}"} for i in range(1234)] + [
        {"id": f"x {i}"} for i in range(1234, 2000)
    ]
    write_page(tmp_path / "page.html", many, title="Many", summary={"curves": CURVES}, examples=examples)
    body = drawn(tmp_path, "page.html#x%201234")
    assert "1235 of 2000" in body
    assert body.count('class="item"') < 100  # only the rows in sight
    assert 'aria-selected="true"' in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert body.count("<polyline") == 4


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_the_layers_and_the_next_tokens(tmp_path: Path) -> None:
    count = len(nasty().tokens)
    likely = [[{"id": 1, "text": NASTY, "probability": 0.5}] * 7] * count
    example = {"likely": likely, "layers": [[0.0] * count, [1.0] * count]}
    write_page(tmp_path / "page.html", [nasty()], title="T", examples=[example])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(data_of(page)["prompts"][0]["likely"][0]) == 5
    assert [tag for tag, _ in Elements(page).found].count("script") == 2
    pointing = (
        'document.querySelector(".piece").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));'
    )
    used = page.replace("http-equiv", "data-off").replace("</body>", f"<script>{pointing}</script></body>")
    (tmp_path / "used.html").write_text(used, encoding="utf-8")
    body = drawn(tmp_path, "used.html")
    assert body.count('class="matrix-band"') == 2
    assert "next token: &lt;script&gt;alert(1)&lt;/script&gt; 50%" in body


def sectioned() -> list[Any]:
    """Return an attribution of a conversation and one of documents."""
    text = "<s>Hi. You?</s>Me.</s>"
    tokens, starts = ["<s>", "Hi.", " You?", "</s>", "Me.", "</s>"], [0, 3, 6, 11, 15, 18, 22]
    components = [Component("token", token, index=i, span=(i, i + 1)) for i, token in enumerate(tokens)]
    common: dict[str, Any] = {
        "text": text,
        "tokens": tokens,
        "token_ids": list(range(6)),
        "offsets": [(0, 0), *pairwise(starts[1:])],
        "position": 5,
        "components": components,
        "scores": torch.tensor([0.0, 3.0, 1.0, 0.5, 2.0, 0.0]),
    }
    chat = [Section("turn", "user", 3, 11), Section("turn", "assistant", 15, 18)]
    documents = [Section("document", "A", 3, 11), Section("question", "question", 15, 18)]
    return [ioi(**common, sections=chat), ioi(**common, sections=documents)]


def test_turns_and_documents_are_data_of_the_page() -> None:
    chat, documents = data_of(page_html(sectioned(), title="T"))["prompts"]
    assert chat["sections"] == [
        {"kind": "turn", "name": "user", "tokens": [1, 3]},
        {"kind": "turn", "name": "assistant", "tokens": [4, 5]},
    ]
    assert chat["citations"] == []
    assert [section["name"] for section in documents["sections"]] == ["A", "question"]
    assert documents["citations"] == [
        {"document": "A", "text": "Hi.", "score": 3.0, "tokens": [1, 2]},
        {"document": "A", "text": "You?", "score": 1.0, "tokens": [2, 3]},
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_a_conversation_and_documents(tmp_path: Path) -> None:
    chat, documents = sectioned()
    write_page(tmp_path / "chat.html", [chat], title="T")
    write_page(tmp_path / "documents.html", [documents], title="T")
    body = drawn(tmp_path, "chat.html")
    assert re.findall(r'class="section bubble( user)?"><b class="section-name">(\w+)<', body) == [
        (" user", "user"),
        ("", "assistant"),
        ("", "assistant"),
    ]
    assert body.count('<div class="template">') == 3
    body = drawn(tmp_path, "documents.html")
    assert re.findall(r'class="section document"><b class="section-name">(\w+)<', body) == ["A", "question"]
    (cited,) = re.findall(r'<ol class="citations".*?</ol>', body)
    assert cited.index("Hi.") < cited.index("You?")
