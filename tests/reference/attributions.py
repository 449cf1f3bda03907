"""Attributions made by hand, whose right answers can be read off, and what reads pages made of them."""

from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import torch

from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Component, block_components, constant

NASTY = "<script>alert(1)</script>"
CURVES = {
    "patch_top": {"fraction": [0.0, 0.5, 1.0], "depass": [0.7, 0.1, 0.0], "random": [0.7, 0.4, 0.0]},
    "recover_top": {"fraction": [0.0, 0.5, 1.0], "depass": [0.0, 0.6, 0.7], "random": [0.0, 0.3, 0.7]},
}


def spans(names: Sequence[str], ranges: Sequence[tuple[int, int] | None]) -> list[Component]:
    """Return components that stand for token ranges; what has no range is the bias, or a user's own."""
    return [
        Component("span" if span else "bias" if name == "bias" else "component", name, span=span)
        for name, span in zip(names, ranges, strict=True)
    ]


def attribution_of(pieces: list[tuple[str, float]], bias: float | None = None, **changes: Any) -> Attribution:
    """Return an attribution whose tokens, after a special first one, are the given pieces of a text.

    Args:
        pieces: each token's text, with its leading space, and its score.
        bias: the score of a last component that stands for no token.
        changes: fields to set otherwise.
    """
    offsets, end = [(0, 0)], 0
    for piece, _ in pieces:
        offsets.append((end, end + len(piece)))
        end += len(piece)
    tokens = ["<s>", *(piece for piece, _ in pieces)]
    scores = [0.25, *(score for _, score in pieces)]
    components = [Component("token", text, index=i, span=(i, i + 1)) for i, text in enumerate(tokens)]
    if bias is not None:
        scores, components = [*scores, bias], [*components, constant("bias")]
    fields: dict[str, Any] = {
        "scores": torch.tensor(scores),
        "components": components,
        "value": sum(scores),
        "target": "' Mary' − ' John'",
        "text": "".join(piece for piece, _ in pieces),
        "tokens": tokens,
        "token_ids": list(range(len(tokens))),
        "offsets": offsets,
        "source": "tokens",
        "rule": "softmax",
        "layer": 0,
        "position": len(tokens) - 1,
        "prediction": " Mary",
        "probability": 0.75,
        "rank": 1,
        "metadata": {"model": "tiny", "temperature": 0.1},
    }
    return Attribution(**fields | changes)


def ioi(**changes: Any) -> Attribution:
    """Return the sentence of indirect objects, where Mary counts most and John against her."""
    pieces = [("When", 0.0), (" Mary", 3.0), (" and", 0.5), (" John", -1.0), (" left", 0.0), (",", 0.125)]
    return attribution_of([*pieces, (" John", -0.5), (" waved", 0.0), (" to", 0.25)], bias=-0.125, **changes)


def heads(layers: int = 2, **changes: Any) -> Attribution:
    """Return three heads of each layer, the state before them and a bias; every layer sums to 2.5."""
    groups = block_components(tuple(range(layers)), "head", range(3))
    components = [
        component
        for layer, group in enumerate(groups)
        for component in (*group, constant("bias", layer if layers > 1 else None))
    ]
    scores = torch.tensor([[4.0, -2.0 - layer, 1.0 + layer, -0.5, 0.0] for layer in range(layers)])
    fields: dict[str, Any] = {"scores": scores.flatten(), "components": components}
    return ioi(**fields | {"value": 2.5, "source": "heads", "groups": layers} | changes)


def neurons(count: int = 300) -> Attribution:
    """Return one layer's neurons, each a thousandth larger than the one before, and the state after them."""
    scores = torch.tensor([50.0, *(i / 1000 for i in range(count))])
    (components,) = block_components((0,), "neuron", range(count))
    return ioi(scores=scores, components=components, value=scores.sum().item(), source="neurons")


def nasty() -> Attribution:
    """Return an attribution whose every text tries to break out."""
    pieces = [
        (NASTY, 1.0),
        (" &amp;", -1.0),
        ("\n", 0.5),
        (" $x$", 0.5),
        (" \x1b[31m\u202e", 0.25),
        (" 🙂", 2.0),
    ]
    return attribution_of(pieces, target=repr(NASTY), prediction="</script>", metadata={"model": NASTY})


class Elements(HTMLParser):
    """Collect a page's elements and their attributes, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
