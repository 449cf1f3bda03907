"""What a circuit's page, figure and tree show."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from depass_lightning import Circuit, Contrast, DePass
from depass_lightning.logit_lens import describe_nodes, promoted_tokens
from depass_lightning.reports.circuit_page import circuit_tree
from tests.reports.test_page import drawn
from tests.results.test_circuit import NODES, circuit


def page_data(page: Path) -> dict[str, object]:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert match is not None
    return json.loads(match[1])


def test_the_page_has_the_largest_edges_first(tmp_path: Path) -> None:
    whole = circuit(
        notes={"layer 0 head 0": "promotes <C>"}, patterns={"layer 0 head 0": [[1.0, 0], [0.5, 0.5]]}
    )
    whole.to_html(tmp_path / "a.html")
    data = page_data(tmp_path / "a.html")
    assert data["edges"][:3] == [[1, 3, 0, -3.0], [1, 5, 0, 3.0], [3, 5, 0, -1.5]]  # type: ignore[index]
    assert (data["heads"], data["total"], data["value"]) == (1, 7, 2.0)
    head = data["nodes"][3]  # type: ignore[index]
    assert head["note"] == "promotes <C>"
    assert head["pattern"] == [[1.0, 0], [0.5, 0.5]]
    assert (head["layer"], head["index"], head["score"]) == (0, 0, -2.0)
    assert "<C>" not in (tmp_path / "a.html").read_text("utf-8")


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    figure = circuit().plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert {text.get_text() for text in figure.axes[0].texts} == {"A", "B", "bias", "H0", "MLP", "' C'"}
    assert len(figure.axes[0].patches) == 7


def test_the_tree_follows_each_node_once() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(circuit_tree(circuit()))
    lines = [line.strip("│├└─ ") for line in console.export_text().splitlines()]
    assert lines[0] == "' C' = +2, half"
    assert lines[1] == "+3  B (1)"
    assert [line for line in lines if "layer 0 head 0" in line] == [
        "−1.50  layer 0 head 0",
        "−0.500  layer 0 head 0",
    ]
    assert sum("A (0)" in line for line in lines) == 1


def test_nodes_are_described_by_what_they_write() -> None:
    depass = DePass.from_pretrained("tiny")
    prompt = "When Mary and John went to the store, John gave a drink to"
    plain = depass.circuit(prompt, Contrast(" Mary", " John"))
    described = describe_nodes(depass, plain)
    ids = torch.tensor([plain.token_ids])
    model: Any = depass.model
    model.set_attn_implementation("eager")
    attention = model(ids, output_attentions=True).attentions
    pattern = torch.tensor(described.patterns["layer 2 head 1"])
    assert torch.allclose(pattern, attention[2][0, 1], atol=1e-3)
    written: list[torch.Tensor] = []
    hook = depass.decoder.blocks[2].mlp.module.register_forward_hook(
        lambda *call: written.append(call[2][0, -1:])
    )
    model(ids)
    hook.remove()
    ((up, _),) = promoted_tokens(depass, written[0].detach())
    assert described.notes["layer 2 mlp"].startswith(f"promotes {', '.join(up)}; demotes ")
    assert replace(described, notes={}, patterns={}).nodes == plain.nodes


def test_what_is_described_comes_back_from_the_file(tmp_path: Path) -> None:
    whole = circuit(notes={"layer 0 mlp": "promotes A"}, patterns={"layer 0 head 0": [[1.0]]})
    whole.save(tmp_path / "a.safetensors")
    back = Circuit.load(tmp_path / "a.safetensors")
    assert (back.notes, back.patterns) == (whole.notes, whole.patterns)


@pytest.mark.parametrize("edges", [0, 1])
def test_small_circuits_are_drawn_too(edges: int, tmp_path: Path) -> None:
    small = circuit().prune(edges=2 * edges)  # the largest leads nowhere
    small.to_html(tmp_path / "a.html")
    small.plot(tmp_path / "a.png")
    assert len(page_data(tmp_path / "a.html")["edges"]) == edges  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to open the page")
def test_a_browser_numbers_repeated_tokens(tmp_path: Path) -> None:
    first, second = (replace(node, label="Ann") for node in NODES[:2])
    circuit(nodes=[first, second, *NODES[2:]]).to_html(tmp_path / "a.html")
    body = drawn(tmp_path, "a.html")
    assert "<title>Ann₁: +1.00</title>" in body
    assert "Ann₂ → layer 0 head 0" in body
    assert ">bias<" in body
