"""The documentation's site is complete: all public names in the reference, all pages in the navigation.

`make docs` builds it, which checks the links; this does not.
"""

import re
from importlib import import_module
from typing import Any

import yaml

from tests.conftest import ROOT

DOCS = ROOT / "docs"
REFERENCES = [
    name
    for page in sorted((DOCS / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
]
PACKAGES = ("", ".callbacks", ".methods", ".monitoring", ".sources")


def referenced(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def pages(nav: Any) -> list[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]


def test_every_public_name_is_in_the_reference_once() -> None:
    assert len(set(REFERENCES)) == len(REFERENCES)
    listed = {id(referenced(name)) for name in REFERENCES}
    public = [
        f"depass_lightning{package}.{name}"
        for package in PACKAGES
        for name in import_module(f"depass_lightning{package}").__all__
        if not name.startswith("__")
    ]
    assert [name for name in public if id(referenced(name)) not in listed] == []


def test_what_the_reference_shows_has_a_docstring() -> None:
    for name in REFERENCES:
        shown = referenced(name)
        assert not callable(shown) or shown.__doc__, name


def test_every_page_is_in_the_navigation_once() -> None:
    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(set(nav)) == len(nav)
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {*nav} == there | {"index.md", "changelog.md"}
