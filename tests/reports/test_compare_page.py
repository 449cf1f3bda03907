"""The comparison page: matched components, their changes, and what cannot be compared."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from depass_lightning.errors import DePassError
from depass_lightning.reports.compare_page import compared, write_compare_page
from depass_lightning.results.attribution import Attribution
from tests.reference.attributions import NASTY, Elements, attribution_of, heads, ioi, nasty
from tests.reports.test_page import data_of, drawn


def page_of(folder: Path, attributions: list[Attribution], **options: object) -> str:
    labels = [f"run {k}" for k in range(len(attributions))]
    write_compare_page(folder / "page.html", {"a": attributions}, labels, title="T", **options)  # type: ignore[arg-type]
    return (folder / "page.html").read_text(encoding="utf-8")


def test_tokens_of_two_prompts_are_matched_in_their_order(tmp_path: Path) -> None:
    before = attribution_of([("When", 1.0), (" Mary", 3.0), (" left", 0.5)], bias=0.5)
    after = attribution_of([("When", 2.0), (" Anna", 4.0), (" has", 1.0), (" left", 0.25)], bias=1.0)
    (prompt,) = data_of(page_of(tmp_path, [before, after]))["prompts"]
    first, second = (row["views"]["tokens"] for row in prompt["rows"])
    # <s>, When, Mary, left, bias; then what only the second has
    assert first["scores"] == [0.25, 1.0, 3.0, 0.5, 0.5, None, None]
    assert second["scores"] == [0.25, 2.0, None, 0.25, 1.0, 4.0, 1.0]
    assert second["change"] == [0, 1.0, None, -0.25, 0.5, None, None]
    assert second["spans"] == [[0, 1], [1, 2], None, [4, 5], None, [2, 3], [3, 4]]
    assert prompt["views"]["tokens"]["names"] == ["<s>", "When", " Mary", " left", "bias", " Anna", " has"]
    assert prompt["value"] == pytest.approx(after.value - before.value)
    same = torch.tensor([[0.25, 1.0, 0.5, 0.5], [0.25, 2.0, 0.25, 1.0]]).double()
    cosine = torch.cosine_similarity(same[0], same[1], dim=0).item()
    assert prompt["change"] == pytest.approx(1 - cosine, abs=1e-6)
    assert compared(before, after).cosine == pytest.approx(cosine)


def test_three_runs_are_each_compared_with_the_first(tmp_path: Path) -> None:
    runs = [ioi(), ioi(scores=2 * ioi().scores), ioi(scores=-ioi().scores)]
    (prompt,) = data_of(page_of(tmp_path, runs))["prompts"]
    changes = [row["views"]["tokens"]["change"] for row in prompt["rows"]]
    assert changes == [[0] * 11, ioi().scores.tolist(), (-2 * ioi().scores).tolist()]
    assert prompt["change"] == pytest.approx(2)
    (prompt,) = data_of(page_of(tmp_path, runs[:1] * 2))["prompts"]
    assert str(prompt["change"]) in ("0", "0.0")  # neither rounding error nor minus zero


def test_scores_of_other_methods_are_divided_by_their_largest(tmp_path: Path) -> None:
    other = ioi(method="random", scores=100 * ioi().scores)
    (prompt,) = data_of(page_of(tmp_path, [ioi(), other]))["prompts"]
    assert prompt["relative"] is True
    assert prompt["rows"][1]["views"]["tokens"]["change"] == pytest.approx([0] * 11, abs=1e-6)


def test_the_mean_change_of_heads_is_on_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, [heads(), heads(scores=3 * heads().scores, value=7.5)])
    data = data_of(page)
    assert data["mean"]["value"] == 5
    assert data["mean"]["view"]["scores"] == (2 * heads().scores).tolist()
    assert data["prompts"][0]["views"]["tokens"]["grid"] == 0


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (heads(), "scores of tokens cannot be compared with scores of heads"),
        (attribution_of([("Hello", 1.0)]), "'When Mary and John.*' and 'Hello' have no token in common"),
    ],
)
def test_what_cannot_be_compared_is_named(second: Attribution, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        compared(ioi(), second)
    with pytest.raises(DePassError, match="are of different heads"):
        compared(heads(2), heads(3))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_draws_the_rows_and_their_change(tmp_path: Path) -> None:
    hostile = replace(nasty(), text=f"{NASTY} more")
    page = page_of(tmp_path, [nasty(), hostile], table=[{"cosine": 1.0}, {"cosine": 0.5, "mean_value": None}])
    assert [tag for tag, _ in Elements(page).found].count("script") == 2
    body = drawn(tmp_path, "page.html")
    assert body.count('class="compared-row"') == 2
    assert body.count('class="compared-row change"') == 1
    assert body.count('class="answer"') == 2  # of the two rows, not of the change
    write_compare_page(
        tmp_path / "page.html",
        {"x": [ioi(), attribution_of([("When", 1.0), (" Anna", 4.0), (" waved", -1.0)])]},
        ["first", "second"],
        title="T",
    )
    body = drawn(tmp_path, "page.html")
    assert body.count("piece unmatched") == 1  # Anna
    assert "+1" in body.split('class="changes"', 1)[1]
