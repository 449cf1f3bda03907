"""An attribution as a panel in a notebook: plain HTML, readable on a light and on a dark background."""

from io import StringIO

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console, RenderableType

from depass_lightning.reports.answer_facts import answer_facts, prediction_text
from depass_lightning.reports.components import asked_for, complete, made
from depass_lightning.reports.numbers import plain, signed, visible
from depass_lightning.reports.prompt_segments import (
    prediction_place,
    prompt_segments,
    strengths,
    unread_words,
)
from depass_lightning.results.attribution import Attribution

# A notebook's background is unknown. Half-transparent tones of medium lightness keep the text readable.
POSITIVE, NEGATIVE = "46,107,255", "235,104,30"
STRONGEST = 0.6
BAR_WIDTH = 160
CONSOLE = '<pre style="line-height:1.2;overflow-x:auto;font-family:ui-monospace,monospace">{code}</pre>'


def attribution_html(attribution: Attribution, top: int = 8) -> str:
    """Return the prompt with its tokens coloured by score, and the strongest components, as HTML.

    Args:
        attribution: the attribution.
        top: the number of components in the list.
    """
    environment = Environment(
        loader=PackageLoader("depass_lightning", "reports/assets"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("notebook.html.j2").render(
        target=visible(attribution.target),
        value=signed(attribution.value),
        segments=_segments(attribution),
        prediction=visible(attribution.prediction.strip(" ") or attribution.prediction),
        rows=_rows(attribution, top),
        facts=_facts(attribution),
    )


def console_html(printed: RenderableType, width: int = 110) -> str:
    """Return what a terminal would show, as HTML: plain spans of text, with its colours.

    Args:
        printed: a table, a tree or a text of rich.
        width: in characters.
    """
    console = Console(record=True, width=width, file=StringIO(), color_system="truecolor")
    console.print(printed)
    return console.export_html(inline_styles=True, code_format=CONSOLE)


def _segments(attribution: Attribution) -> list[dict[str, object]]:
    """Return each segment of the prompt with the colour of its component."""
    scores, strength = attribution.scores.tolist(), strengths(attribution)
    unread, shown = True, []
    for segment in prompt_segments(attribution):
        number = segment.component
        read = unread and bool(attribution.prediction) and segment.end > prediction_place(attribution)
        unread = unread and not read
        shown.append(
            {
                "space": segment.space,
                "text": segment.text,
                "title": "not a component" if number is None else signed(scores[number]),
                "colour": POSITIVE if number is not None and scores[number] > 0 else NEGATIVE,
                "strength": 0.0 if number is None else round(STRONGEST * abs(strength[number]), 3),
                "read": read,
            }
        )
    return shown


def _rows(attribution: Attribution, top: int) -> list[dict[str, object]]:
    """Return the strongest components with the lengths of their bars."""
    strongest = asked_for(attribution).top(top, absolute=True)
    largest = max((abs(score) for _, score in strongest), default=0.0) or 1.0
    return [
        {
            "name": visible(name.strip(" ") or name),
            "score": signed(score),
            "width": round(BAR_WIDTH * abs(score) / largest),
            "colour": POSITIVE if score > 0 else NEGATIVE,
        }
        for name, score in strongest
    ]


def _facts(attribution: Attribution) -> str:
    """Return the model's next token, the target's probability and rank, and the settings, in one line."""
    facts = list(filter(None, [prediction_text(attribution)]))
    facts += [f"{name} {number}" for name, number in answer_facts(attribution).items()]
    facts.append(f"{made(attribution)}, rule {attribution.rule}")
    if complete(attribution):
        facts.append(f"completeness error {plain(attribution.completeness)}")
    return "; ".join(filter(None, [", ".join(facts), unread_words(attribution)]))
