"""The words of the code and of its prose: names that mean something, standard English (docs/glossary.md)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

CODE = ("depass_lightning", "callbacks", "conf", "examples", "benchmarks")
FILES = [ROOT / "train.py", ROOT / "analyze.py"]
FILES += sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "RESULTS.md",
]
TEXTS += [*sorted((ROOT / "docs").glob("*.md"))]
TEXTS += sorted((ROOT / "conf").rglob("*.yaml"))
TEXTS += sorted(path for path in (ROOT / "depass_lightning" / "reports" / "assets").iterdir())

# A variable is called what it is; a loop's variable is the singular of its collection.
VARIABLES = {"own", "each", "found", "given", "here", "at"}
WORDS = re.compile(r"\b(beside|behind|anew|so many|comes? to)\b", re.IGNORECASE)
# Strings that are data, not prose: the sentences of generated tasks.
DATA = ROOT / "depass_lightning" / "tasks" / "synthetic"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and name of every variable and argument that a file binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The line and text of every comment, docstring and string of a file."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    tree = ast.parse(source)
    documented = [
        node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    docstrings = {ast.get_docstring(node, clean=False) for node in documented}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if text in docstrings or not path.is_relative_to(DATA):
                yield node.lineno, text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_variables_are_called_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [f"line {line}: {name}" for line, name in bound(tree) if name in VARIABLES] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_prose_in_code_is_plain(path: Path) -> None:
    words = [(line, word) for line, text in prose(path) for word in WORDS.findall(text)]
    assert [f"line {line}: {word}" for line, word in words] == []


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_documents_and_settings_are_plain(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [(number, word) for number, line in enumerate(lines, 1) for word in WORDS.findall(line)]
    assert [f"line {number}: {word}" for number, word in words] == []
