"""The result object: what it adds up, groups, compares, keeps and refuses."""

import dataclasses
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from depass_lightning.errors import DePassError
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.results.component import Component
from depass_lightning.utils.words import word_spans, word_tokens_by_space
from tests.reference.attributions import attribution_of, heads, ioi

pytestmark = pytest.mark.covering


def test_completeness_is_the_relative_distance_of_the_sum_from_the_value() -> None:
    assert ioi().completeness == 0.0
    # The scores sum to 2.5 and the largest is 3: a value of 4 is missed by 1.5 of 4, one of 2 by 0.5 of 3.
    assert ioi(value=4.0).completeness == pytest.approx(1.5 / 4)
    assert ioi(value=2.0).completeness == pytest.approx(0.5 / 3)


def test_completeness_of_nothing_at_all_is_zero() -> None:
    assert attribution_of([("a", 0.0)], scores=torch.zeros(2), value=0.0).completeness == 0.0


def test_the_sum_is_taken_in_double_precision() -> None:
    scores = torch.full((100_001,), 0.1)
    components = [Component("component", "")] * len(scores)
    a = ioi(scores=scores, components=components, value=scores.double().sum().item())
    assert a.completeness < 1e-12
    assert abs(scores.cumsum(0)[-1].item() - a.value) > 1e-4  # as single precision would have it


def test_scores_become_detached_single_precision_on_the_cpu() -> None:
    a = ioi(scores=torch.ones(11, dtype=torch.float64, requires_grad=True) * 2)
    assert a.scores.dtype == torch.float32
    assert not a.scores.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": []}, "components has 0 entries, but one a component makes 11"),
        ({"token_ids": [1, 2]}, "token_ids has 2 entries, but one a token makes 10"),
        ({"offsets": [(0, 0)]}, "offsets has 1 entries, but one a token makes 10"),
        ({"scores": torch.zeros(11, 2)}, r"scores is one number a component, not a tensor of \(11, 2\)"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DePassError, match=message):
        ioi(**changes)


def test_correct_follows_the_rank() -> None:
    assert [ioi(rank=rank).correct for rank in (1, 3, None)] == [True, False, None]


def test_top_ranks_by_score_or_by_size() -> None:
    a = ioi()
    assert a.top(2) == [(" Mary", 3.0), (" and", 0.5)]
    assert a.top(2, absolute=True) == [(" Mary", 3.0), (" John", -1.0)]
    assert len(a.top(99)) == len(a) == 11
    assert a.top(0) == []


def test_without_drops_every_component_of_the_name_and_keeps_the_value() -> None:
    a = ioi().without([" John", "bias"])
    assert " John" not in a.names
    assert "bias" not in a.names
    assert len(a.names) == len(a.positions) == len(a) == 8
    assert a.value == 2.5
    assert a.completeness == pytest.approx(1.625 / 4.125 * 4.125 / 3.0)  # what was dropped, and the largest
    assert ioi().without("bias").names == ioi().names[:-1]  # one name, not its letters


def test_groups_stay_whole_where_components_are_dropped() -> None:
    a = heads()
    assert a.grid().tolist() == [[4.0, -2.0, 1.0, -0.5, 0.0], [4.0, -3.0, 2.0, -0.5, 0.0]]
    assert a.without(["layer 0 bias", "layer 1 bias"]).completeness == 0.0
    assert a.without(["layer 0 head 0", "layer 1 head 0"]).completeness == pytest.approx(3 / 4)
    with pytest.raises(DePassError, match="name those of every layer"):
        a.without("layer 0 head 0")


def test_without_names_the_unknown_component() -> None:
    with pytest.raises(
        DePassError, match=r"no component is named 'Mary'; the names are '<s>', 'When', ' Mary'"
    ):
        ioi().without("Mary")


def test_words_sum_their_pieces() -> None:
    pieces = [
        ("When", 1.0),
        (" Mar", 2.0),
        ("y", 0.5),
        (" did", -1.0),
        ("n't", -2.0),
        (" stop", 1.0),
        (",", 4.0),
    ]
    a = attribution_of(pieces, bias=8.0).words()
    assert a.names == ["<s>", "When", " Mary", " didn't", " stop", ",", "bias"]
    assert a.scores.tolist() == [0.25, 1.0, 2.5, -3.0, 1.0, 4.0, 8.0]
    assert a.positions == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 7), (7, 8), None]
    assert a.completeness == 0.0
    assert len(a.tokens) == 8  # the tokens themselves stay


def test_words_without_offsets_begin_at_spaces() -> None:
    pieces = [("When", 1.0), (" Mar", 2.0), ("y", 0.5), (" left", 1.0)]
    a = attribution_of(pieces, offsets=None, text="").words()
    assert a.names == ["<s>", "When", " Mary", " left"]
    assert a.scores.tolist() == [0.25, 1.0, 2.5, 1.0]


def test_words_join_the_bytes_of_one_letter() -> None:
    a = attribution_of([("日", 1.0), ("本", 2.0), ("\ufffd", 4.0), ("\ufffd", 8.0)], text="日本語")
    a.offsets = [(0, 0), (0, 1), (1, 2), (2, 3), (2, 3)]
    assert a.words().names == ["<s>", "日", "本", "語"]
    assert a.words().scores.tolist() == [0.25, 1.0, 2.0, 12.0]


def test_words_keep_a_gap_that_was_dropped_apart() -> None:
    a = (
        attribution_of([(" un", 1.0), ("believ", 2.0), ("able", 4.0), (" yes", 8.0)])
        .without("believ")
        .words()
    )
    assert a.scores.tolist() == [0.25, 5.0, 8.0]
    assert a.positions[1] == (1, 4)


def test_words_of_components_without_a_place_stay_as_they_are() -> None:
    a = ioi(scores=torch.tensor([1.0, 2.0]), components=heads(1).components[1:3])
    assert a.words().names == ["head 0", "head 1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, well-known U.S.!", ["Don't", "stop", ",", "well-known", "U", ".", "S", ".", "!"]),
        ("It costs 3.14 or 1,000.", ["It", "costs", "3.14", "or", "1,000", "."]),
        ("Wait... “no”", ["Wait", "...", "“", "no", "”"]),
        ("snake_case  and\ttabs\n", ["snake_case", "and", "tabs"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("日本語 ok", ["日", "本", "語", "ok"]),
        ("👩‍🚀 x", ["👩‍🚀", "x"]),
        ("", []),
    ],
)
def test_word_spans_in_many_scripts(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words


def test_a_space_of_its_own_goes_with_the_word_behind_it_and_a_line_end_does_not() -> None:
    a = attribution_of([("a", 1.0), (" ", 2.0), ("b", 4.0), ("\n", 8.0), ("c", 16.0)])
    assert a.words().scores.tolist() == [0.25, 1.0, 6.0, 8.0, 16.0]
    assert word_tokens_by_space(["<s>", "a", " ", "b", "\n", "c", "d"]) == [0, 1, 2, 2, 3, 4, 4]


def test_share_is_the_positive_score_on_the_ranges() -> None:
    a = ioi()
    mary = a.text.index("Mary")
    assert a.positive_fraction([(mary, mary + 4)]) == pytest.approx(3.0 / 4.125)
    # A part of the token is enough.
    assert a.positive_fraction([(mary + 1, mary + 2)]) == pytest.approx(3.0 / 4.125)
    assert a.positive_fraction([(mary, mary + 8)]) == pytest.approx(3.5 / 4.125)
    # A range's space belongs to no token, though " and" begins with it.
    assert a.positive_fraction([(mary, mary + 5)]) == pytest.approx(3.0 / 4.125)
    john = a.text.index("John")
    assert a.positive_fraction([(john, john + 4)]) == 0.0  # a negative score is no share
    assert a.words().positive_fraction([(mary, mary + 4)]) == pytest.approx(3.0 / 4.125)


def test_share_is_zero_where_no_score_is_positive() -> None:
    assert attribution_of([("a", -1.0)], scores=torch.tensor([-1.0, -2.0])).positive_fraction([(0, 1)]) == 0.0


@pytest.mark.parametrize("span", [(-1, 2), (3, 3), (0, 1000)])
def test_share_refuses_ranges_outside_of_the_text(span: tuple[int, int]) -> None:
    with pytest.raises(DePassError, match="is no range of characters"):
        ioi().positive_fraction([span])


def test_share_needs_offsets() -> None:
    with pytest.raises(DePassError, match="give the prompt as text, with a fast tokenizer"):
        ioi(offsets=None).positive_fraction([(0, 1)])


def test_compare_measures_direction_ranks_and_changes() -> None:
    before = attribution_of([("a", 1.0), ("b", 2.0), ("c", 3.0)])
    after = attribution_of([("a", 3.0), ("b", 1.5), ("c", 3.0)])
    comparison = before.compare(after)
    one, other = before.scores.double(), after.scores.double()
    assert comparison.cosine == pytest.approx(float(one @ other / one.norm() / other.norm()))
    # ranks 1 2 3 4 and, with a tie, 1 3.5 2 3.5
    assert comparison.spearman == pytest.approx(3.0 / (5.0 * 4.5) ** 0.5)
    assert comparison.gained == [("a", 1.0, 3.0)]
    assert comparison.lost == [("b", 2.0, 1.5)]


def test_compare_lists_the_largest_change_first() -> None:
    before = attribution_of([("a", 0.0), ("b", 0.0), ("c", 0.0), ("d", 0.0)])
    after = attribution_of([("a", 1.0), ("b", 3.0), ("c", -2.0), ("d", -1.0)])
    comparison = before.compare(after)
    assert [name for name, *_ in comparison.gained] == ["b", "a"]
    assert [name for name, *_ in comparison.lost] == ["c", "d"]


def test_compare_with_itself_and_with_nothing() -> None:
    same = ioi().compare(ioi())
    assert (same.cosine, same.spearman) == (pytest.approx(1.0), pytest.approx(1.0))
    assert same.gained == same.lost == []
    nothing = ioi().compare(ioi(scores=torch.zeros(11)))
    assert (nothing.cosine, nothing.spearman) == (0.0, 0.0)


def test_compare_refuses_other_components() -> None:
    with pytest.raises(DePassError, match="component 2 is ' Mary' in one and ' Ann' in the other"):
        ioi().compare(attribution_of([("When", 0.0), (" Ann", 0.0)]))
    with pytest.raises(DePassError, match="one has 11 and the other 10"):
        ioi().compare(ioi().without("bias"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"offsets": None, "text": "", "probability": None, "rank": None, "metadata": {}},
        {"target": "'\ud83d'", "metadata": {"nested": {"list": [1, 2.5, None, "é\n"]}, "true": True}},
        {"value": 0.1 + 0.2, "probability": 1e-300},
    ],
)
def test_every_field_survives_saving(tmp_path: Path, changes: dict[str, Any]) -> None:
    a = ioi(**changes)
    a.save(tmp_path / "deep" / "a.safetensors")
    b = Attribution.load(tmp_path / "deep" / "a.safetensors")
    assert torch.equal(a.scores, b.scores)
    for entry in dataclasses.fields(Attribution):
        if entry.name != "scores":
            assert getattr(a, entry.name) == getattr(b, entry.name), entry.name


def test_words_with_merged_positions_survive_saving(tmp_path: Path) -> None:
    a = attribution_of([(" Mar", 1.0), ("y", 2.0)], bias=1.0).words()
    a.save(tmp_path / "a.safetensors")
    assert Attribution.load(tmp_path / "a.safetensors").positions == [(0, 1), (1, 3), None]


def test_a_saved_file_is_whole_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    ioi().save(path)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "plain"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    ioi().save(path)

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        ioi(value=7.0).save(path)
    assert Attribution.load(path).value == 2.5
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DePassError, match=r"metadata cannot be JSON.*Tensor"):
        ioi(metadata={"x": torch.zeros(1)}).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_load_refuses_what_is_no_attribution(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("hello")
    with pytest.raises(DePassError, match="is no safetensors file"):
        Attribution.load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(DePassError, match="holds no attribution"):
        Attribution.load(tmp_path / "weights")


def test_load_refuses_the_format_of_an_earlier_version(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    header = {"format": "depass-attribution-2", "attribution": "{}"}
    save_file({"scores": torch.zeros(2)}, tmp_path / "old", header)
    with pytest.raises(DePassError, match="format depass-attribution-2 of another version"):
        Attribution.load(tmp_path / "old")


def test_components_that_differ_in_more_than_the_name_are_not_shown_together() -> None:
    """A user's component may be called like a head."""
    a = heads()
    assert all(component.layer is not None for component in a.components)
    named = [Component("component", name) for name in a.names]
    with pytest.raises(DePassError, match="not over the same components"):
        Attributions([a, heads(components=named)])


def test_repr_says_what_matters() -> None:
    written = repr(ioi())
    assert "' Mary' − ' John'" in written
    assert "value=2.5" in written
    assert "' Mary' +3" in written
    assert "\n" not in written
