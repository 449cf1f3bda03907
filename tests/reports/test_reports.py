"""What people look at: the notebook's panel, the figures and the terminal."""

import io
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console, RenderableType

from depass_lightning import DePass
from depass_lightning.reports.component_figures import attribution_figure
from depass_lightning.reports.components import repeats_of
from depass_lightning.reports.figures import curves_figure, save_figure, tokens_figure
from depass_lightning.reports.numbers import (
    model_name,
    ordinal,
    percent,
    plain,
    signed,
    summary_cards,
    visible,
)
from depass_lightning.reports.page import page_html
from depass_lightning.reports.palette import DARK, LIGHT, hexadecimal, ink, shade
from depass_lightning.reports.prompt_segments import unread_words
from depass_lightning.reports.terminal import attribution_text, attributions_table, summary_table
from depass_lightning.results.attributions import Attributions
from tests.reference.attributions import CURVES, Elements, attribution_of, heads, ioi, nasty, neurons


def printed(renderable: RenderableType, width: int = 120, colour: bool = False) -> str:
    """Return what a terminal would show."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


# numbers


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0.0, "0"),
        (3.814, "3.81"),
        (-0.02134, "−0.0213"),
        (12.0, "12"),
        (12345.6, "12,346"),
        (6.1e-8, "6.1e−8"),
    ],
)
def test_numbers_have_three_digits_and_a_real_minus(number: float, written: str) -> None:
    assert plain(number) == written


def test_numbers_that_are_none() -> None:
    assert [plain(float(x)) for x in ("nan", "inf", "-inf")] == ["not a number", "∞", "−∞"]
    assert [signed(x) for x in (1.5, 0.0, -1.5)] == ["+1.50", "0", "−1.50"]
    assert [percent(x) for x in (0.712, 1.0, 0.0, 0.0004)] == ["71.2%", "100%", "0%", "<0.1%"]


def test_characters_without_a_look_become_signs() -> None:
    assert visible("a\nb\tc") == "a↵b⇥c"
    assert visible("  ") == "␣␣"
    assert visible("\x1b[31m\u202e\ud83d") == "␛[31m��"
    assert visible("👩‍🚀") == "👩‍🚀"


def test_summary_cards_say_what_to_hold_a_number_against() -> None:
    cards = summary_cards(
        {
            "prompts": 2000,
            "correct": 0.871,
            "completeness_max": 6.1e-8,
            "evidence_first": {
                "value": 0.93,
                "chance": 0.071,
                "low": 0.9,
                "high": 0.96,
                "note": "known for 5",
            },
            "seconds": 12.31,
            "curves": CURVES,
            "device": "cpu",
            "complete": True,
        }
    )
    assert [(card.label, card.value) for card in cards] == [
        ("prompts", "2,000"),
        ("model is right", "87.1%"),
        ("completeness error, largest", "6.1e−8"),
        ("evidence ranked first", "93%"),
        ("seconds", "12.3 s"),
        ("complete", "yes"),
    ]
    assert cards[3].note == "90% to 96%, at random 7.1%, known for 5"
    assert [card.label for card in cards if card.leading] == [
        "model is right",
        "completeness error, largest",
        "evidence ranked first",
    ]
    assert all(card.definition for card in cards if card.leading)


@pytest.mark.parametrize(
    ("entry", "marked"),
    [
        ({"value": 0.5, "chance": 0.4, "low": 0.3, "high": 0.7}, True),
        ({"value": 0.5, "chance": 0.4, "low": 0.45, "high": 0.7}, False),
        ({"value": 0.3, "chance": 0.4, "low": 0.2, "high": 0.35}, True),
        ({"value": 0.3, "chance": 0.4, "low": 0.2, "high": 0.35, "note": "lower is better"}, False),
        ({"value": 0.3, "chance": 0.4, "low": 0.2, "high": 0.45, "note": "lower is better"}, True),
        ({"value": 0.3, "chance": 0.4, "low": 0.3, "high": 0.3}, False),  # a single prompt
        ({"value": 0.3, "chance": 0.4}, False),
    ],
)
def test_a_figure_no_better_than_random_is_marked(entry: dict[str, Any], marked: bool) -> None:
    (card,) = summary_cards({"patch_top_area": entry})
    assert card.random is marked
    assert ("no better than random" in card.note) is marked
    page = page_html([ioi()], title="T", summary={"patch_top_area": entry})
    assert ('<dd class="random">' in page) is marked


def test_ranks_are_ordinals() -> None:
    written = {1: "first", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 22: "22nd", 48: "48th", 1001: "1,001st"}
    assert {rank: ordinal(rank) for rank in written} == written


def test_repeated_words_are_numbered_in_the_order_of_the_text() -> None:
    numbered = repeats_of(ioi())
    assert {ioi().names[i].strip() for i in numbered} == {"John"}
    assert sorted(numbered.values()) == [1, 2]


def test_unknown_words_of_the_bundled_model_name_a_model_that_reads_them() -> None:
    unread = {"unknown_words": ("zyzzyva",)}
    assert "smollm2-135m" in unread_words(ioi(metadata={**unread, "model": "tiny"}))
    assert unread_words(ioi(metadata=unread)) == "the model's tokenizer does not know 'zyzzyva'"


def test_a_models_path_is_shortened() -> None:
    assert model_name("/home/someone/models/mine.gguf") == "mine.gguf"
    assert model_name("someone/model") == "someone/model"


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_letters_can_be_read_on_every_shade(theme: Any) -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(-20, 21):
        ground = shade(theme, step / 20)
        light, dark = sorted((luminance(ground), luminance(ink(ground))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.2, step
    assert shade(theme, 1.0) == theme.positive
    assert shade(theme, -1.0) == theme.negative
    assert shade(theme, 0.0) == theme.ground


# the notebook and the terminal


def test_the_notebook_shows_the_prompt_as_plain_html() -> None:
    shown = ioi()._repr_html_()
    elements = Elements(shown)
    assert "script" not in {tag for tag, _ in elements.found}
    spans = [attributes for tag, attributes in elements.found if tag == "span" and "title" in attributes]
    assert [span["title"] for span in spans[:3]] == ["+0.250", "0", "+3"]
    assert "0.6)" in (spans[2]["style"] or "")  # the largest score has the strongest colour
    assert "' Mary' − ' John'" in elements.text
    assert "script" not in {tag for tag, _ in Elements(nasty()._repr_html_()).found}


def test_a_notebook_shows_matrices_and_circuits_as_the_terminal_does() -> None:
    depass = DePass.from_pretrained("tiny")
    prompt = "When Mary and John went to the store, John gave a drink to"
    several = depass.attribute(prompt, [" Mary", " John"], rule="half")._repr_html_()
    elements = Elements(several)
    assert {tag for tag, _ in elements.found} == {"pre", "span"}
    assert "completeness error" in elements.text
    assert "background-color" in several
    hostile = Elements(Attributions([nasty()])._repr_html_())
    assert {tag for tag, _ in hostile.found} == {"pre", "span"}
    generation = Elements(depass.attribute_generation(prompt, max_new_tokens=2, rule="half")._repr_html_())
    assert "what each generated token relies on" in generation.text
    circuit = depass.circuit(prompt, " Mary")
    shown = Elements(circuit._repr_html_())
    assert {tag for tag, _ in shown.found} == {"pre", "span"}
    assert circuit.top(1)[0].source.label in shown.text
    assert repr(depass) == (
        "DePass('tiny', family llama, 3 blocks, scores in float32, rule softmax unless rule= is given)"
    )


def test_show_prints_in_a_terminal_and_displays_in_a_notebook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ioi().show()
    assert "' Mary' − ' John' = +2.50" in capsys.readouterr().out
    displayed: list[Any] = []
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    display = SimpleNamespace(HTML=lambda html: html, display=displayed.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # type: ignore[arg-type]
    ioi().show()
    assert displayed == [ioi()._repr_html_()]
    assert capsys.readouterr().out == ""


def test_the_terminal_shows_tokens_and_the_strongest_components() -> None:
    shown = printed(attribution_text(ioi(), top=2))
    assert "WhenMary" not in shown
    assert "When Mary and John left, John waved to" in shown
    assert "next token ' Mary'; the target is the model's first choice, probability 75%" in shown
    assert re.search(r"Mary +\+3 +█{24}", shown)
    assert re.search(r"John₁ +−1 +█{8}", shown)
    assert "and 9 more" in shown


def test_the_terminal_shows_heads_as_a_map_and_ranks_them_without_the_state() -> None:
    shown = printed(attribution_text(heads(), top=2))
    assert "0 ▓▓▒▒░░  state +4  bias 0" in shown
    assert "1 ██▓▓░░  state +4  bias 0" in shown
    assert re.search(r"layer 1 head 0 +−3 +█{24}\n", shown)
    assert "and 4 more" in shown
    assert "heads of every layer" in shown
    assert "layer 1 head 1 +2" in printed(attributions_table([heads()]))


def test_the_terminal_says_what_stands_beside_one_layers_neurons() -> None:
    shown = printed(attribution_text(neurons(), top=1))
    assert re.search(r"neuron 299 +\+0\.299 +█{24}\n", shown)
    assert "and 299 more, state +50" in shown


def test_the_terminal_colours_for_and_against_apart() -> None:
    shown = printed(attribution_text(ioi()), colour=True)
    mary = re.search(r"\x1b\[1;38;2;255;255;255;48;2;(\d+);(\d+);(\d+)mMary", shown)
    john = re.search(r"\x1b\[38;2;255;255;255;48;2;(\d+);(\d+);(\d+)mJohn", shown)
    assert mary is not None
    assert john is not None
    assert int(mary[3]) > int(mary[1])  # blue
    assert int(john[1]) > int(john[3])  # orange
    assert "mleft" not in shown  # no score, no colour


def test_no_token_steers_the_terminal() -> None:
    for renderable in (attribution_text(nasty()), attributions_table([nasty()], ids=["[red]x[/red]"])):
        shown = printed(renderable)
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    assert "[red]x[/red]" in shown


def test_the_table_cuts_the_prompt_before_the_numbers() -> None:
    table = attributions_table([ioi(), ioi(rank=3, prediction=" John")] * 3, limit=4)
    shown = printed(table, width=76)
    assert max(map(len, shown.splitlines())) <= 76
    assert "Mary ✓" in shown
    assert "John ✗" in shown
    assert shown.count("+2.50") == 4
    assert "Mary +3" in shown
    assert "and 2 more" in shown


def test_a_narrow_table_keeps_numbers_and_reads_a_shared_target_once() -> None:
    long = [
        ioi(target=f"linear log-probability of ' {name}'", prediction=" Mary", value=-2.5)
        for name in ("Mary", "Bartholomew the Younger")
    ]
    for attribution in long:
        attribution.components[2] = replace(
            attribution.components[2], label="a sentence of many words and more"
        )
    shown = printed(attributions_table(long, width=70), width=70)
    assert shown.count("linear") == shown.count("log-probability") == 1  # in the heading
    assert re.search(r"' Mary' +−2\.50 +Mary", shown)
    assert "a sentence of many wo… +" in shown
    assert "John left" not in shown  # no room for the prompt


def test_the_summary_in_the_terminal() -> None:
    shown = printed(
        summary_table({"evidence_first": {"value": 0.93, "chance": 0.071}, "model": {"name": "tiny"}})
    )
    assert re.search(r"evidence ranked first +93% +at random 7\.1%", shown)
    assert "tiny" not in shown


# figures


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("dark", [False, True])
def test_the_figure_of_a_prompt_writes_every_token_inside_the_picture(dark: bool) -> None:
    figure = tokens_figure(ioi(), dark=dark)
    texts = texts_of(figure)
    for word in ("<s>", "When", "Mary", "and", "John", "left", ",", "waved", "to", "+3", "−1", "+3", "−3"):
        assert word in texts
    assert "' Mary' − ' John' = +2.50" in texts
    assert any("bias −0.125" in text for text in texts)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_the_figure_breaks_lines_and_never_overlaps() -> None:
    pieces = [(f" word{i}", float(i % 5 - 2)) for i in range(60)]
    figure = tokens_figure(attribution_of(pieces))
    tokens = [text for text in figure.axes[0].texts if text.get_text().startswith("word")]
    assert len(tokens) == 60
    assert len({text.get_position()[1] for text in tokens}) > 3
    for one, other in pairwise(tokens):
        if one.get_position()[1] == other.get_position()[1]:
            assert one.get_window_extent().x1 < other.get_window_extent().x0
    assert max(token.get_window_extent().x1 for token in tokens) < figure.canvas.get_width_height()[0] - 20


def test_numbers_below_narrow_tokens_do_not_run_into_each_other() -> None:
    figure = tokens_figure(attribution_of([("(", 1.0), ("a", 3.0), (",", 2.0), ("b", -1.5)]))
    numbers = [text for text in figure.axes[0].texts if text.get_fontsize() == 8.5]
    assert "+3" in [text.get_text() for text in numbers]
    for one, other in pairwise(sorted(numbers, key=lambda text: text.get_position()[0])):
        assert one.get_window_extent().x1 < other.get_window_extent().x0


def test_the_figure_stops_where_the_target_was_read() -> None:
    texts = texts_of(tokens_figure(ioi(position=2)))
    assert "and" not in texts
    assert texts.count("Mary") == 2  # the token, and what the model goes on with


def test_the_figure_survives_any_text(tmp_path: Path) -> None:
    for name, a in {"nasty": nasty(), "empty": ioi().without(ioi().names), "words": ioi().words()}.items():
        a.plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = next(text for text in tokens_figure(nasty()).axes[0].texts if text.get_text() == "$x$")
    assert not written.get_parse_math()


def test_a_very_long_prompt_is_cut_in_the_middle() -> None:
    texts = texts_of(tokens_figure(attribution_of([(f" {i}", 0.0) for i in range(1000)])))
    assert "…" in texts
    assert "0" in texts
    assert "999" in texts
    assert "500" not in texts


def test_figures_do_not_touch_pyplot_and_are_the_same_twice(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for name in ("one.svg", "two.svg"):
        save_figure(tokens_figure(ioi()), tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert "<dc:date>" not in one
    assert len(one) == len(two)
    assert dict(matplotlib.rcParams) == before


def test_heads_are_drawn_as_a_map_and_neurons_as_bars() -> None:
    texts = texts_of(attribution_figure(heads()))
    assert [text for text in texts if text in {"head 0", "1", "2", "state", "bias"}].count("state") == 1
    assert {"−2", "−3", "+1", "+2", "−0.500", "+4", "layer"} <= set(texts)
    squares = list(attribution_figure(heads()).axes[0].patches)
    assert len(squares) == 6
    assert to_hex(squares[3].get_facecolor()) == hexadecimal(LIGHT.negative)  # layer 1 head 0, the strongest
    bars = attribution_figure(neurons(), title="Mean")
    assert {"Mean", "neuron 299", "+0.299"} <= set(texts_of(bars))
    assert any("state +50" in text for text in texts_of(bars))
    assert len(bars.axes[0].patches) == 16
    assert "Mary" in texts_of(attribution_figure(ioi()))


@pytest.mark.parametrize("layers", [2, 40])
def test_nothing_of_a_map_lies_outside_of_the_picture(layers: int) -> None:
    figure = attribution_figure(heads(layers), dark=True)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    boxes += [patch.get_window_extent() for patch in figure.axes[0].patches]
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_curves_are_drawn_as_given() -> None:
    figure = curves_figure(CURVES)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Deletion curve", "Insertion curve"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert np.asarray(lines["depass"].get_xydata()).tolist() == [[0.0, 0.7], [50.0, 0.1], [100.0, 0.0]]
    assert lines["random"].get_linestyle() == "--"
    assert figure.axes[1].get_xlabel() == "tokens kept (%)"
