"""The ask page: a form for a prompt, and its result, drawn by the scripts of a run's page."""

from typing import Literal, get_args

from markupsafe import Markup

from depass_lightning.reports.numbers import model_name, visible
from depass_lightning.reports.page import asset, rendered

# They are run again for every result; `ask_change.js` adds the panel of removed words below the prompt.
DRAWING = (
    "page_base.js",
    "page_panels.js",
    "page_prompt.js",
    "ask_change.js",
    "page_sections.js",
    "page_matrix.js",
    "page_heat.js",
    "page_compare.js",
    "page_layers.js",
    "page_components.js",
    "page_facts.js",
    "page_list.js",
)
SourceName = Literal["tokens", "spans", "turns", "documents", "heads", "modules"]
RuleChoice = Literal["auto", "half", "shap", "softmax", "taylor", "max", "relu", "linear"]
SOURCES: dict[SourceName, str] = {
    "tokens": "tokens",
    "spans": "words",
    "turns": "turns of the conversation",
    "documents": "sentences",
    "heads": "heads",
    "modules": "attention, by layer",
}


def ask_html(model: str) -> str:
    """Return the ask page, without a result.

    Args:
        model: the model's name.
    """
    drawing = "\n".join(asset(name) for name in DRAWING)
    parts = [asset("ask.js"), "function drawResult() {", drawing, "showResult();", "}"]
    script = "\n".join(['"use strict";', "(() => {", *parts, "})();", ""])
    return rendered(
        "ask",
        script,
        {},
        model=visible(model_name(model)),
        sources=SOURCES,
        rules=get_args(RuleChoice),
        style=Markup(asset("page.css") + asset("ask.css")),
    )
