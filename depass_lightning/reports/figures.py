"""Figures for papers, READMEs and loggers, drawn by matplotlib without a window or global state."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path

from depass_lightning.reports.components import made
from depass_lightning.reports.numbers import measure_name, model_name, percent, signed, visible
from depass_lightning.reports.palette import DARK, LIGHT, Theme, hexadecimal, ink, shade
from depass_lightning.reports.prompt_segments import PromptSegment, full_score, prompt_segments, strengths
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.atomic_files import write_whole

# The first of these that is installed is used; the others supply the characters that it lacks.
FAMILIES = (
    "Inter",
    "Helvetica Neue",
    "Segoe UI",
    "Arial",
    "Liberation Sans",
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
)

WIDTH = 8.6  # inches; everything below is in points, of which an inch has 72
MARGIN = 24
TOKEN_SIZE = 17
NUMBER_SIZE = 8.5
LINE = 44
SPACE = 4.4  # between tokens with a space between them
PADDING = 2.6  # left and right of a token in its box
NUMBERED = 0.12  # scores of at least this fraction of the largest are written below their tokens
HEAD, FOOT = 52, 44  # above the first line and below the last
MOST = 600  # segments; of a longer prompt the beginning and the end are drawn


@dataclass(frozen=True)
class Box:
    """One component's text with its place in the figure.

    Attributes:
        text: the text.
        strength: the score relative to the largest, from -1 to 1; None for text without a score.
        score: the score, if it is large enough to be written.
        left: the distance from the left edge, in points.
        width: the width in points.
        line: the number of its line.
    """

    text: str
    strength: float | None
    score: float | None
    left: float
    width: float
    line: int


def tokens_figure(attribution: Attribution, dark: bool = False) -> Figure:
    """Draw the prompt with its tokens in boxes coloured by score, and the model's next token.

    Args:
        attribution: the attribution; pass its `words()` to draw words.
        dark: use the dark theme.
    """
    theme = DARK if dark else LIGHT
    boxes, answer = _layout(attribution)
    height = HEAD + LINE * (answer.line + 1) + FOOT
    figure, axes = canvas(WIDTH * 72, height, theme)
    _headline(axes, attribution, theme, height)
    for box in boxes:
        _draw_token(axes, box, theme, height - HEAD - LINE * (box.line + 0.5))
    if answer.text:
        _draw_answer(axes, answer, theme, height - HEAD - LINE * (answer.line + 0.5), attribution.correct)
    draw_scale(axes, full_score(attribution), theme)
    _draw_elsewhere(axes, attribution, theme)
    return figure


def curves_figure(curves: Mapping[str, Mapping[str, Sequence[float]]], dark: bool = False) -> Figure:
    """Draw deletion and insertion curves of tokens, or masking curves of heads or neurons.

    Args:
        curves: one panel per entry (`patch_top`, `mask_top`, ...): the `fraction` of the components, 0 to 1,
            and one line per further entry, of the same length; `random` is the baseline.
        dark: use the dark theme.
    """
    theme = DARK if dark else LIGHT
    figure = Figure(figsize=(4.3 * max(len(curves), 1), 3.1), facecolor=hexadecimal(theme.ground), dpi=100)
    FigureCanvasAgg(figure)
    for number, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), number + 1)
        _draw_curves(axes, name, curve, theme)
    figure.subplots_adjust(
        left=0.14 / max(len(curves), 1) + 0.02, right=0.97, bottom=0.18, top=0.86, wspace=0.24
    )
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, whole or not at all; its suffix (.png, .svg, .pdf) selects the format."""
    kind = Path(path).suffix.lower().removeprefix(".") or "png"
    # Without the date, two runs write the same file.
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=200, metadata=dated)
    write_whole(path, buffer.getvalue())


def _layout(attribution: Attribution) -> tuple[list[Box], Box]:
    """Lay the prompt's segments out in lines, and after the last one the model's next token."""
    right = WIDTH * 72 - MARGIN
    x, line, indent = float(MARGIN), 0, 0.0
    boxes: list[Box] = []
    for segment, strength, score in _segments(attribution):
        first, *below = segment.text.split("\n")
        # Text after a line break is a separate box in the next line; the last one's spaces indent it.
        for number, text in enumerate([first, *(line_text for line_text in below if line_text.strip())]):
            bare = text.lstrip() if number else text
            indent = font_width(text[: -len(bare)], TOKEN_SIZE) + 0.1 if number else indent
            width = font_width(bare, TOKEN_SIZE) + 2 * PADDING
            gap = SPACE if segment.space else 1.0
            if boxes and (x + gap + width > right or indent):
                x, line = MARGIN + indent, line + 1
            elif boxes:
                x += gap
            boxes.append(Box(bare, strength, None if number else score, x, width, line))
            x += width
            indent = 0.0
        if below and not below[-1].strip():
            indent = font_width(below[-1], TOKEN_SIZE) + 0.1
    said = visible(attribution.prediction.strip(" ") or attribution.prediction)
    width = font_width(said, TOKEN_SIZE) + 4 * PADDING
    if x + 2 * SPACE + width > right or indent:
        x, line = MARGIN + indent - 2 * SPACE, line + 1
    return _numbered(boxes), Box(said, None, None, x + 2 * SPACE, width, line)


def _numbered(boxes: list[Box]) -> list[Box]:
    """Return the boxes without scores that are small, or would overlap a larger one next to them."""
    taken: list[tuple[int, float, float]] = []
    kept = set()
    for i in sorted(range(len(boxes)), key=lambda i: -abs(boxes[i].strength or 0.0)):
        box = boxes[i]
        if box.score is None or abs(box.strength or 0.0) < NUMBERED:
            continue
        half = font_width(signed(box.score), NUMBER_SIZE) / 2 + 2
        middle = box.left + box.width / 2
        if all(line != box.line or middle + half < low or middle - half > high for line, low, high in taken):
            taken.append((box.line, middle - half, middle + half))
            kept.add(i)
    return [box if i in kept else replace(box, score=None) for i, box in enumerate(boxes)]


def _segments(attribution: Attribution) -> list[tuple[PromptSegment, float | None, float | None]]:
    """Return the prompt's segments up to the target's position, each with its strength and its score."""
    scores, strength = attribution.scores.tolist(), strengths(attribution)
    segments: list[tuple[PromptSegment, float | None, float | None]] = []
    for segment in prompt_segments(attribution):
        i = segment.component
        segments.append((segment, None, None) if i is None else (segment, strength[i], scores[i]))
        if segment.end > attribution.last:
            break
    if len(segments) > MOST:
        left_out = (PromptSegment(" ", "…", None, 0), None, None)
        segments = [*segments[: MOST // 2], left_out, *segments[-MOST // 2 :]]
    return segments


@lru_cache
def _font() -> list[str]:
    """Return the installed families, in order."""
    installed = set(fontManager.get_font_names())
    return [family for family in FAMILIES if family in installed]


@lru_cache
def _letters() -> frozenset[int]:
    """Return the code points that the installed families can write."""
    known: set[int] = set()
    for family in _font():
        known |= set(get_font(fontManager.findfont(FontProperties(family=family))).get_charmap())
    return frozenset(known)


def _writable(text: str) -> str:
    """Return the text with a box for every character that no installed font has."""
    known = _letters()
    return "".join(c if ord(c) in known else "□" for c in text if c not in "\u200c\u200d\ufe0f")


@lru_cache(maxsize=4096)
def font_width(text: str, size: float) -> float:
    """Return the width of a text in points."""
    properties = FontProperties(family=_font(), size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(_writable(text), properties, ismath=False)
    return width


def write(axes: Axes, x: float, y: float, text: str, size: float, **settings: Any) -> None:
    """Write a text at a place in points, without reading it as mathematics."""
    style = {"va": "center_baseline", "family": _font()} | settings
    axes.text(x, y, _writable(text), fontsize=size, parse_math=False, **style)


def canvas(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """Return a figure of a size in points, and axes that cover it in which one unit is one point."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor=hexadecimal(theme.ground), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _headline(axes: Axes, attribution: Attribution, theme: Theme, height: float) -> None:
    """Write the target and its value, and the settings at the right."""
    value = f"{visible(attribution.target)} = {signed(attribution.value)}"
    write(axes, MARGIN, height - 30, value, 13.5, color=hexadecimal(theme.ink), weight="bold")
    model, source = (
        attribution.metadata.get("model", ""),
        made(attribution),
    )
    text = "  ·  ".join(part for part in (model_name(str(model)), source, attribution.rule) if part)
    if font_width(value, 14.5) + font_width(text, 9.5) < WIDTH * 72 - 3 * MARGIN:
        write(axes, WIDTH * 72 - MARGIN, height - 30, text, 9.5, color=hexadecimal(theme.muted), ha="right")


def _draw_token(axes: Axes, box: Box, theme: Theme, y: float) -> None:
    """Draw one box with its text, and below it the score where it is large."""
    ground = theme.ground if box.strength is None else shade(theme, box.strength)
    letters = theme.muted if box.strength is None else ink(ground)
    _rounded(axes, box, y, facecolor=hexadecimal(ground), linewidth=0)
    middle = box.left + box.width / 2
    write(axes, middle, y, box.text, TOKEN_SIZE, color=hexadecimal(letters), ha="center")
    if box.score is not None:
        colour = hexadecimal(theme.positive if box.score > 0 else theme.negative)
        write(axes, middle, y - 20, signed(box.score), NUMBER_SIZE, color=colour, ha="center")


def _draw_answer(axes: Axes, box: Box, theme: Theme, y: float, correct: bool | None) -> None:
    """Draw the model's next token after the prompt, in a dashed frame."""
    colour = hexadecimal(theme.negative if correct is False else theme.ink)
    _rounded(axes, box, y, facecolor="none", edgecolor=colour, linewidth=1.1, linestyle=(0, (3, 2)))
    middle = box.left + box.width / 2
    write(axes, middle, y, box.text, TOKEN_SIZE, color=colour, ha="center", weight="bold")


def _rounded(axes: Axes, box: Box, y: float, **settings: Any) -> None:
    shape = FancyBboxPatch(
        (box.left, y - 12.5),
        box.width,
        25,
        boxstyle="round,pad=0,rounding_size=4.5",
        mutation_aspect=1,
        **settings,
    )
    axes.add_patch(shape)


def draw_scale(axes: Axes, largest: float, theme: Theme) -> None:
    """Draw the scale of the colours at the lower right."""
    right, width, y = WIDTH * 72 - MARGIN, 120, 24
    number = signed(largest)
    left = right - font_width(number, 9) - 8 - width
    stops = [hexadecimal(shade(theme, part)) for part in (-1.0, 0.0, 1.0)]
    ramp = LinearSegmentedColormap.from_list("scores", stops)
    axes.imshow(
        [list(range(256))], cmap=ramp, extent=(left, left + width, y - 4, y + 4), aspect="auto", zorder=2
    )
    axes.set(xlim=(0, WIDTH * 72), ylim=axes.get_ylim())
    muted = hexadecimal(theme.muted)
    write(axes, right, y, number, 9, color=muted, ha="right")
    write(axes, left - 8, y, signed(-largest), 9, color=muted, ha="right")


def _draw_elsewhere(axes: Axes, attribution: Attribution, theme: Theme) -> None:
    """List the components outside the text at the lower left, with the target's probability."""
    named = zip(attribution.names, attribution.scores.tolist(), attribution.positions, strict=True)
    parts = [f"{name} {signed(score)}" for name, score, span in named if span is None][:6]
    if attribution.probability is not None:
        parts.append(f"target's probability {percent(attribution.probability)}")
    write(axes, MARGIN, 24, "  ·  ".join(parts), 9, color=hexadecimal(theme.muted))


def _draw_curves(axes: Axes, name: str, curve: Mapping[str, Sequence[float]], theme: Theme) -> None:
    """Draw one panel of curves."""
    lines = {label: ys for label, ys in curve.items() if label != "fraction"}
    colours = [theme.positive, theme.negative, theme.ink]
    for number, (label, ys) in enumerate(sorted(lines.items(), key=lambda line: line[0] == "random")):
        look = {"color": hexadecimal(colours[number % len(colours)]), "linewidth": 2.2}
        if label == "random":
            look = {"color": hexadecimal(theme.muted), "linewidth": 1.6, "linestyle": (0, (4, 3))}
        axes.plot([100 * x for x in curve["fraction"]], ys, label=label.replace("_", " "), **look)
    what = "tokens kept" if "recover" in name else "tokens removed"
    measured = "probability of the answer"
    if name.startswith("mask"):
        what, measured = "masked", "accuracy"
    muted, line = hexadecimal(theme.muted), hexadecimal(theme.line)
    written = {"fontsize": 9, "family": _font()}
    title = written | {"fontsize": 11, "weight": "bold", "color": hexadecimal(theme.ink)}
    axes.set_title(measure_name(name).capitalize(), loc="left", fontdict=title)
    axes.set_xlabel(f"{what} (%)", fontdict=written, color=muted)
    axes.set_ylabel(measured, fontdict=written, color=muted)
    axes.set(facecolor="none", xlim=(0, 100 * max(curve["fraction"])))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if min(map(min, lines.values())) < 0 else 0.0)
    axes.tick_params(colors=muted, labelsize=9, labelfontfamily=_font(), length=0)
    axes.grid(axis="y", color=line, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, prop=FontProperties(family=_font(), size=9), labelcolor=hexadecimal(theme.ink))
