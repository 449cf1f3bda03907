"""An attribution as a panel in a notebook: plain HTML, readable on a light and on a dark ground."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from depass_lightning.reports.components import asked_for, complete, made
from depass_lightning.reports.numbers import percent, plain, signed, visible
from depass_lightning.reports.prompt_segments import pieces_of, strengths, unread_words
from depass_lightning.results.attribution import Attribution

# A notebook does not tell its ground. Half transparent tones of middle lightness leave its letters readable.
POSITIVE, NEGATIVE = "46,107,255", "235,104,30"
STRONGEST = 0.6
BAR_WIDTH = 160


def attribution_html(attribution: Attribution, top: int = 8) -> str:
    """Return the prompt with its tokens coloured by score, and the strongest components, as HTML.

    Args:
        attribution: what to show.
        top: how many components are listed.
    """
    environment = Environment(
        loader=PackageLoader("depass_lightning", "reports/assets"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("notebook.html.j2").render(
        target=visible(attribution.target),
        value=signed(attribution.value),
        pieces=_pieces(attribution),
        prediction=visible(attribution.prediction.strip(" ") or attribution.prediction),
        rows=_rows(attribution, top),
        facts=_facts(attribution),
    )


def _pieces(attribution: Attribution) -> list[dict[str, object]]:
    """Return each piece of the prompt with the colour of the component that stands for it."""
    scores, strength = attribution.scores.tolist(), strengths(attribution)
    unread, shown = True, []
    for piece in pieces_of(attribution):
        number = piece.component
        read = unread and piece.end > attribution.position
        unread = unread and not read
        shown.append(
            {
                "space": piece.space,
                "text": piece.text,
                "title": "no component stands for this" if number is None else signed(scores[number]),
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
    """Return what else is known, in one line."""
    facts = [f"the model says {visible(attribution.prediction)!r}"]
    if attribution.probability is not None:
        facts.append(f"gives the target {percent(attribution.probability)}")
    if attribution.rank is not None:
        facts.append(f"rank {attribution.rank:,}")
    facts.append(f"{made(attribution)}, rule {attribution.rule}")
    if complete(attribution):
        facts.append(f"completeness {plain(attribution.completeness)}")
    return "; ".join(filter(None, [", ".join(facts), unread_words(attribution)]))
