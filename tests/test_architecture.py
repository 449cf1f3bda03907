"""The structure of the package: imports run one way, and file names are unique."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mutants
from tests.conftest import ROOT

PACKAGE = ROOT / "depass_lightning"
FILES = sorted(
    path
    for folder in (PACKAGE, ROOT / "callbacks")
    for path in folder.rglob("*.py")
    if path.name != "__init__.py"
)
# Each may import its own group and those before.
ORDER = (
    {"errors", "utils"},
    {"models"},
    {"engine"},
    {"prompts", "targets", "results"},
    {"sources"},
    {"attribution"},
    {"depass"},
    {"logit_lens", "tasks", "methods", "faithfulness", "linear_probes", "storage", "reports"},
    {"studies", "modules", "monitoring"},
    {"callbacks", "integrations", "commands"},
)
# What runs the other way on purpose: results draw themselves when they are asked to.
UPWARDS = {("results", "reports")}


def rank(part: str) -> int:
    (place,) = (place for place, group in enumerate(ORDER) if part in group)
    return place


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
    return inside.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            parts = node.module.split(".")[1:]
            yield from parts[:1] or (name.name for name in node.names if name.name != "__version__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    wrong = {other for other in imported(path) if rank(other) > rank(part)}
    assert {(part, other) for other in wrong} <= UPWARDS


def test_every_part_has_its_place() -> None:
    assert set(map(part_of, FILES)) - {"callbacks"} == set().union(*ORDER) - {"callbacks"}


def test_no_two_modules_share_a_name() -> None:
    """But for what several packages are built on, each study's main file, and DePass with its callback."""
    names = Counter(path.stem for path in FILES if path.stem not in ("base", "study", "depass"))
    assert [name for name, count in names.items() if count > 1] == []


def test_only_commands_know_hydra() -> None:
    knowing = {
        part_of(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [own.name for own in node.names]
        )
        if name.split(".")[0] in ("hydra", "omegaconf")
    }
    assert knowing <= {"commands"}


def test_the_mutation_run_lists_files_that_exist() -> None:
    """A file or a test that is renamed would otherwise be missed until the next run, which takes days."""
    for path, tests in mutants.TESTS.items():
        assert (ROOT / path).is_file(), path
        for test in mutants.paths_of(tests):
            assert (ROOT / test).is_file(), test


# Called by users and by Hydra: their arguments are settings with names and defaults.
PUBLIC_FACE = {
    ("DePass", "attribute"),
    ("DePass", "attribute_sources"),
    ("DePass", "attribute_generation"),
    ("DePass", "decompose"),
    ("DePassCallback", "__init__"),
    ("ProbeMonitor", "__init__"),
    ("", "fit_probes"),
    ("", "removal_curves"),
    ("", "train_probe"),
    ("", "train_probes"),
}
ROOT_MODULES = {"__init__", "depass", "errors", "logit_lens", "prompts", "targets"}


def test_the_root_of_the_package_holds_what_users_import() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES


def test_no_two_public_classes_share_a_name() -> None:
    names = Counter(
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a file with the name of its class, which is empty outside of one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = {
        function: node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for function in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield owners.get(node, ""), node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    """At most 400 lines a file, 60 lines of code a function, and 8 arguments outside the public face."""
    # `DePass` explains the arguments of each of its calls.
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (450 if path.name == "depass.py" else 400)
    for owner, function in functions(path):
        docstring = ast.get_docstring(function, clean=False) or ""
        length = (function.end_lineno or 0) - function.lineno + 1 - len(docstring.splitlines())
        assert length <= 60, function.name
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        named = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(named) <= 8 or (owner, function.name) in PUBLIC_FACE, function.name
