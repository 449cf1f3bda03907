"""Attributions and summaries in a terminal, in colours readable on a dark and on a light background."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from depass_lightning.reports.answer_facts import answer_facts, prediction_name, prediction_text
from depass_lightning.reports.components import (
    Grid,
    asked_for,
    complete,
    grid_of,
    made,
    remainders_of,
    repeats_of,
)
from depass_lightning.reports.numbers import plain, signed, summary_cards, visible
from depass_lightning.reports.palette import Colour, hexadecimal, mixed
from depass_lightning.reports.prompt_segments import prompt_segments, strengths, unread_words
from depass_lightning.results.attribution import Attribution

# A terminal's background is unknown. Weak scores colour only the letters, in a tone of medium lightness;
# strong scores colour the background, with white letters on it.
LETTERS: tuple[Colour, Colour] = ((58, 124, 246), (224, 96, 32))
GROUNDS: tuple[tuple[Colour, Colour], tuple[Colour, Colour]] = (
    ((82, 104, 150), (22, 84, 240)),
    ((146, 100, 78), (200, 66, 0)),
)
BAR_WIDTH = 24
RELIES_ON = 22  # characters of a component's name in a table of prompts
NARROW = 110  # characters; a table of prompts in a narrower terminal leaves out their texts
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
LEVELS = "·░▒▓█"  # of a heat map's cells, distinguishable without colours


def attribution_text(attribution: Attribution, top: int = 8) -> RenderableType:
    """Return the prompt with its tokens coloured by score, and a table of the strongest components.

    Args:
        attribution: the attribution.
        top: the number of components in the table.
    """
    parts: list[RenderableType] = [_headline(attribution), _tokens(attribution)]
    if (grid := grid_of(attribution)) is not None:
        parts.append(_map(attribution, grid))
    parts.append(_components(attribution, top))
    first, *others = parts
    return Group(first, *(shown for part in others for shown in (Text(), part)))


def _headline(attribution: Attribution) -> Text:
    """Return the target and its value, the model's next token, and the settings."""
    value = f"{visible(attribution.target)} = {signed(attribution.value)}"
    facts = ", ".join(f"{name} {number}" for name, number in answer_facts(attribution).items())
    lines = [line for line in (prediction_text(attribution), facts, unread_words(attribution)) if line]
    return Text.assemble((value, "bold"), "\n", "\n".join(lines), "\n", (_settings(attribution), "dim"))


def _settings(attribution: Attribution) -> str:
    how = f"{made(attribution)}, rule {attribution.rule}"
    if not complete(attribution):
        return f"{how}, control paths alone, which do not sum to the value"
    return f"{how}, completeness error {plain(attribution.completeness)}"


def _tokens(attribution: Attribution) -> Text:
    """Return the prompt, each segment in the colour of its component."""
    strength = strengths(attribution)
    text = Text()
    for segment in prompt_segments(attribution):
        text.append(segment.space)
        style = score_style(0.0 if segment.component is None else strength[segment.component])
        text.append(segment.text, style)
    return text


def score_style(strength: float) -> Style:
    """Return the style of a token.

    Args:
        strength: its score relative to the largest, from -1 to 1.
    """
    size, sign = abs(strength), int(strength < 0)
    if size < 0.05:
        return Style()
    if size < 0.25:
        return Style(color=hexadecimal(LETTERS[sign]))
    weak, strong = GROUNDS[sign]
    return Style(
        color="#ffffff", bgcolor=hexadecimal(mixed(weak, strong, (size - 0.25) / 0.75)), bold=size > 0.6
    )


def _map(attribution: Attribution, grid: Grid) -> Text:
    """Return the components of all layers as a heat map, one line per layer; fuller cells are stronger."""
    rows = attribution.grid().tolist()
    full = max((abs(row[i]) for row in rows for i in grid.cells), default=0.0) or 1.0
    widest = len(str(max(grid.layers)))
    first, last = grid.columns[grid.cells[0]], grid.columns[grid.cells[-1]]
    text = Text(f"each layer's {first}" + (f" to {last}" if first != last else ""), "dim")
    for layer, row in zip(grid.layers, rows, strict=True):
        text.append(f"\n{layer:>{widest}} ", "dim")
        for i in grid.cells:
            level = math.ceil(abs(row[i]) / full * (len(LEVELS) - 1) - 0.25)
            text.append(2 * LEVELS[max(level, 0)], hexadecimal(LETTERS[int(row[i] < 0)]))
        for i in grid.remainders:
            text.append(f"  {grid.columns[i]} {signed(row[i])}", "dim")
    return text


def _components(attribution: Attribution, top: int) -> Table:
    """Return the components with the largest absolute scores, with bars."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("component")
    table.add_column("score", justify="right")
    table.add_column("", no_wrap=True)
    asked = asked_for(attribution)
    rows, repeats = asked.ranked(top, absolute=True), repeats_of(asked)
    strongest = abs(asked.scores[rows[0]].item()) if rows else 0.0
    for i in rows:
        score, index = asked.scores[i].item(), str(repeats.get(i, "")).translate(SUBSCRIPTS)
        bar = _bar(abs(score) / strongest if strongest else 0.0)
        name = Text.assemble(_name(asked.names[i]), (index, "dim"), overflow="ellipsis", no_wrap=True)
        table.add_row(name, signed(score), Text(bar, hexadecimal(LETTERS[int(score < 0)])))
    notes = [f"and {left:,} more"] if (left := len(asked) - len(rows)) else []
    if attribution.groups == 1:  # with several groups, each has one
        names = attribution.names
        notes += [f"{names[i]} {signed(attribution.scores[i].item())}" for i in remainders_of(attribution)]
    if notes:
        table.caption = ", ".join(notes)
        table.caption_justify = "left"
    return table


def _name(name: str) -> Text:
    """Return a component's name without a token's leading space."""
    return _cut(visible(name.strip(" ") or name))


def _cut(text: str) -> Text:
    """Return a text that is cut where there is no room for it."""
    return Text(text, overflow="ellipsis", no_wrap=True)


def _bar(part: float) -> str:
    """Return a bar for a fraction of the full width, in eighths of a character."""
    eighths = round(part * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def attributions_table(
    attributions: Sequence[Attribution],
    ids: Sequence[str] | None = None,
    limit: int = 20,
    width: int | None = None,
) -> Table:
    """Return one row per prompt: the target, its value, and the component that it relies on most.

    Args:
        attributions: the attributions, in order.
        ids: their names; by default their numbers.
        limit: the maximum number of rows; the rest are counted below the table.
        width: of the terminal, in characters; a narrow one has no room for the prompts.
    """
    narrow = width is not None and width < NARROW
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("", style="dim", no_wrap=True)
    # Columns that may wrap are cut first where there is no room, so that numbers stay whole.
    if not narrow:
        table.add_column("prompt")
    shared = _shared_beginning([visible(attribution.target) for attribution in attributions])
    table.add_column(shared or "target")
    table.add_column("value", justify="right", no_wrap=True)
    names = {prediction_name(attribution) for attribution in attributions}
    table.add_column(f"{names.pop() if len(names) == 1 else 'prediction'}\n(✓ target)", no_wrap=True)
    table.add_column("relies on", no_wrap=True)
    for number, attribution in enumerate(attributions[:limit]):
        name = str(number) if ids is None else ids[number]
        table.add_row(Text(name), *_row(attribution, shared)[int(narrow) :])
    if len(attributions) > limit:
        table.caption = f"and {len(attributions) - limit:,} more"
        table.caption_justify = "left"
    return table


def _shared_beginning(targets: Sequence[str]) -> str:
    """Return what is read of all targets, "linear log-probability of "; "" where they differ."""
    beginnings = {beginning + of for beginning, of, _ in (target.partition(" of ") for target in targets)}
    shared = beginnings.pop() if len(beginnings) == 1 else ""
    return shared if shared.endswith(" of ") else ""


def _row(attribution: Attribution, shared: str) -> tuple[Text, ...]:
    """Return one attribution as cells: prompt, target, value, prediction, strongest component."""
    token = Text(visible(attribution.prediction.strip(" ")))
    if attribution.correct is not None:
        token.append(" ✓" if attribution.correct else " ✗", "green" if attribution.correct else "red")
    relies_on = "nothing"
    for name, score in asked_for(attribution).top(1):
        short = _name(name)
        short.truncate(RELIES_ON, overflow="ellipsis")
        relies_on = f"{short.plain} {signed(score)}"
    return (
        _cut(visible(attribution.text or "".join(attribution.tokens))),
        _cut(visible(attribution.target).removeprefix(shared)),
        Text(signed(attribution.value)),
        token,
        Text(relies_on),
    )


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the numbers of a run's summary, one per row, with their chance level or interval.

    Args:
        summary: see `summary_cards`.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    for card in summary_cards(summary):
        table.add_row(Text(card.label), Text(card.value), Text(card.note))
    return table
