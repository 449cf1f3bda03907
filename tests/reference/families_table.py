"""`make families`: measure every family, and write the table of `docs/families.md`.

Each row is a tiny random model of `tests/reference/zoo.py` with every parameter randomised. What it is built
of is read from its declaration and the modules bound to it; its errors are measured on one prompt:

1. the components' sum at every layer against the real model's states, in float64;
2. the score of each token under `taylor` against derivatives through the real model, in float64;
3. how far scores are from summing to the value, the worst of three rules, in float32 and in bfloat16,
   and how large the component `rounding` is there;
4. the largest error of a block's sum that the check at loading finds, in float32.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from depass_lightning import Contrast, DePass, DePassError, Label, Masked
from depass_lightning.engine.norms import NormParameters
from depass_lightning.engine.rules import RuleName
from depass_lightning.engine.validate import validate
from depass_lightning.models.affine import has_bias
from depass_lightning.models.block import Block
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.families import FAMILIES, REFUSED, supported_model_types
from tests.conftest import ROOT
from tests.reference.models import SMALL, Double, distance, prompt, randomise
from tests.reference.zoo import ALL, BERT, ZOO, build, derivatives

PAGE = ROOT / "docs" / "families.md"
TARGET = Contrast(5, 7)
RULES: tuple[RuleName, ...] = ("softmax", "max", "taylor")
TEXTS = ("name", "model type", "sublayers", "norms", "attention", "MLP", "other")
ERRORS = ("sums, float64", "scores, float64", "completeness, float32", "bfloat16", "rounding", "check")


def row_of(name: str) -> dict[str, str]:
    """A row of the table, column by column.

    Args:
        name: one of `tests.reference.zoo.ALL`.
    """
    return described(name) | {column: f"{error:.0e}" for column, error in measured(name).items()}


def described(name: str) -> dict[str, str]:
    """What a family is built of, in words."""
    decoder = DePass(build(name)).decoder
    blocks = decoder.blocks
    cells = (
        name,
        f"`{ZOO[name][0]}`",
        _order(blocks[0]),
        _norms(decoder),
        _attention(decoder),
        " or ".join(dict.fromkeys(_mlp(block, decoder) for block in blocks)),
        ", ".join(_other(decoder)),
    )
    return dict(zip(TEXTS, cells, strict=True))


def _order(block: Block) -> str:
    if not block.parallel:
        return "sequential"
    return "parallel, one norm" if block.attention.norm is block.mlp.norm else "parallel, two norms"


def _norms(decoder: Decoder) -> str:
    attention = decoder.blocks[0].attention
    norm = attention.norm or attention.post_norm
    assert norm is not None
    probe = NormParameters.of(norm, norm, decoder.hidden_size, torch.float32, torch.float32)
    kind = "LayerNorm" if probe.centred else "RMSNorm"
    places = [word for word, own in (("before", attention.norm), ("after", attention.post_norm)) if own]
    stream = " the sum" if attention.residual == "post_norm" else ""
    return f"{kind} {' and '.join(places)}{stream}" + (
        ", stream normed" if attention.residual == "norm" else ""
    )


def _attention(decoder: Decoder) -> str:
    mixers = [block.attention.mixer for block in decoder.blocks]
    kinds = [mixer.kind.replace("_", " ") for mixer in mixers if mixer is not None and mixer.mixes][:1]
    full = [block for block in decoder.blocks if block.attention.mixer is None][:1]
    return ", or ".join([*kinds, *(_full_attention(decoder, block) for block in full)])


def _full_attention(decoder: Decoder, block: Block) -> str:
    spec, parts = decoder.spec.attention, block.attention
    size = parts.output.shape[1] // parts.heads
    groups = parts.value.shape[0] // size
    kinds = {parts.heads: "multi-head", 1: "multi-query"}
    words = [kinds.get(groups, "grouped")]
    if spec.latent is not None:
        words.append("values from a latent")
    elif spec.layout != "own":
        words.append("fused" if spec.layout == "concatenated" else "fused by head")
    if hasattr(parts.module, "sinks"):
        words.append("sinks")
    if parts.gate is not None:
        words.append("gated")
    if parts.value_norm is not None:
        words.append("values normed")
    if has_bias(parts.value.module):
        words.append("biases")
    return ", ".join(words)


def _mlp(block: Block, decoder: Decoder) -> str:
    spec = decoder.spec.mlp
    if block.mlp.absent or spec is None:
        return "none"
    if block.mlp.experts is not None:
        count, shared = block.mlp.experts.count, block.mlp.experts.shared
        return f"{count} experts" + ("" if shared is None else " and a shared one")
    words = "plain" if spec.up is None else "gated, fused" if spec.up == spec.gate else "gated"
    assert block.mlp.dense is not None
    return words + (", biases" if has_bias(block.mlp.dense.down.module) else "")


def _other(decoder: Decoder) -> Iterable[str]:
    parts = [(block, part) for block in decoder.blocks for part in (block.attention, block.mlp)]
    if any(block.factor(part) != 1 for block, part in parts):
        yield "sublayers scaled"
    if decoder.logit_scale != 1:
        yield "logits scaled"
    if decoder.soft_capped:
        yield "logits soft-capped"
    if has_bias(decoder.unembedding):
        yield "bias on logits"


def measured(name: str) -> dict[str, float]:
    """The errors of a family."""
    exact = build(name, dtype=torch.float64)
    plain, half = build(name), build(name, dtype=torch.bfloat16)
    rounded, rounding = completeness(half)
    errors = (
        state_error(exact),
        score_error(exact),
        completeness(plain)[0],
        rounded,
        rounding,
        validate(DePass(plain).decoder),
    )
    return dict(zip(ERRORS, errors, strict=True))


def state_error(model: nn.Module) -> float:
    """How far components are from summing to the real states, over all layers.

    Args:
        model: in float64.
    """
    depass, ids = DePass(model), prompt(9)
    entered: list[torch.Tensor] = []

    def keep(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered.append((given[0] if given else named["hidden_states"]).clone())

    handles = [
        block.module.register_forward_pre_hook(keep, with_kwargs=True) for block in depass.decoder.blocks
    ]
    with torch.no_grad():
        model(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    sums = [layer.states.sum(0) for layer in depass.decompose_layers(input_ids=ids[None])]
    return max(distance(own, state[0]) for own, state in zip(sums, entered, strict=False))


def score_error(model: nn.Module) -> float:
    """How far the tokens' scores, and the biases', are from derivatives through the real model.

    Args:
        model: in float64.
    """
    ids = prompt(9)
    tokens, biases, _ = derivatives(model, ids, 5, 7)
    with Double():  # results are handed out in float32: these are measured before
        own = DePass(model).attribute(input_ids=ids[None], target=TARGET, rule="taylor")[0]
    expected = torch.cat([tokens, tokens.new_full((len(own.scores) - len(ids),), biases)])
    return distance(own.scores.double(), expected)


def completeness(model: nn.Module) -> tuple[float, float]:
    """How far scores are from summing to the value, and how large rounding is, the worst of three rules.

    Args:
        model: in any precision.
    """
    depass, ids = DePass(model), prompt(9)[None]
    found = [depass.attribute(input_ids=ids, target=TARGET, rule=rule)[0] for rule in RULES]
    rounding = [
        abs(float(own.scores[-1])) / max(abs(own.value), float(own.scores.abs().max()))
        for own in found
        if own.names[-1] == "rounding"
    ]
    return max(own.completeness for own in found), max(rounding, default=0.0)


def table(known: str = "", names: Iterable[str] = ALL) -> str:
    """The table of all families in Markdown.

    Args:
        known: an earlier table, whose other rows are kept.
        names: the families to measure.
    """
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in known.splitlines()}
    kept |= {name: _line(row_of(name).values()) for name in names}
    columns = TEXTS + ERRORS
    return "\n".join([_line(columns), _line(["---"] * len(columns)), *(kept[name] for name in ALL)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def refused() -> str:
    """What is refused by name, in Markdown."""
    kinds = {why: ", ".join(f"`{own}`" for own in sorted(names)) for why, names in REFUSED.items()}
    return "\n".join(f"- {why}: {names}" for why, names in kinds.items())


def types() -> str:
    """What becomes of each of Transformers' causal language models, in Markdown."""
    declared = set(supported_model_types())
    reasons = {kind: why for why, kinds in REFUSED.items() for kind in kinds}
    rows = {name: ZOO[name][0] for name in ALL}
    lines = ["| model type | |", "| --- | --- |"]
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        names = [name for name, of in rows.items() if of in (kind, f"{kind}_text", f"{kind}_text_model")]
        if kind in declared:
            said = f"exact: {', '.join(names)}"
            if kind in reasons:
                said += f"; other configurations are refused: {reasons[kind]}"
        elif kind in reasons:
            said = f"refused: {reasons[kind]}"
        else:
            said = "no declaration: tried against all of them when it is loaded, and refused if none fits"
        lines.append(f"| `{kind}` | {said} |")
    return "\n".join(lines)


READINGS: dict[str, tuple[Any, Any]] = {
    "classifies texts": (AutoModelForSequenceClassification, Label(1)),
    "classifies tokens": (AutoModelForTokenClassification, Label(1, position=4)),
    "masked words": (AutoModelForMaskedLM, Masked(3)),
}


def encoders() -> str:
    """Which classes of each declared encoder are supported, from attributing tiny models, in Markdown."""
    lines = [_line(["model type", *READINGS]), _line(["---"] * (1 + len(READINGS)))]
    whole = SimpleNamespace(is_decoder=False)
    families = [family for family in FAMILIES if family.model is None and not family.causal(whole)]
    for kind in sorted(name for family in families for name in family.names):
        cells = [_encoder_cell(kind, *reading) for reading in READINGS.values()]
        if "yes" in cells:
            lines.append(_line([f"`{kind}`", *cells]))
    return "\n".join(lines)


def _encoder_cell(kind: str, auto: Any, target: Any) -> str:
    _, settings = ZOO.get(kind, (kind, {"dim": 36, "hidden_dim": 44, "n_layers": 3, "n_heads": 6}))
    config = AutoConfig.for_model(kind, **(SMALL | BERT | settings | {"is_decoder": False}))
    try:
        model = auto.from_config(config)
    except ValueError:
        return "no such model"
    randomise(model, 0)
    try:
        result = DePass(model.eval()).attribute(input_ids=prompt(9)[None], target=target)[0]
    except DePassError:
        return "refused"
    assert result.completeness < 1e-4
    return "yes"


SECTIONS: dict[str, Callable[[], str]] = {"types": types, "encoders": encoders, "refused": refused}


def section(text: str, name: str) -> str:
    """What stands between a section's marks on the page.

    Args:
        text: the page.
        name: one of `SECTIONS`.
    """
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, flags=re.DOTALL)
    assert found is not None, f"the page has no section {name}"
    return found[1]


def main() -> None:
    """Write the sections into the page, whose other text stays."""
    parser = argparse.ArgumentParser(description="Measure every family, and write the table of its page.")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; by default docs/families.md")
    parser.add_argument("--names", nargs="*", default=ALL, help="measure these only, and keep other rows")
    options = parser.parse_args()
    page: Path = options.page
    text = page.read_text(encoding="utf-8")
    sections = {name: made() for name, made in SECTIONS.items()}
    sections["families"] = table(section(text, "families"), options.names)
    for name, made in sections.items():
        text = text.replace(f"\n{section(text, name)}\n<!-- /{name}", f"\n{made}\n<!-- /{name}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
