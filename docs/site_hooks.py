"""Hooks of the documentation's site (mkdocs.yml).

README.md and docs/ are written for a code host, where relative links reach every file of the repository. On
the site the README is the first page, and a link to a file that is not a page goes to the repository named by
REPOSITORY_URL. Without that variable only the link's text is shown.
"""

import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Lay the package out as it is installed, before the reference's search paths are read."""
    package = ROOT / "build" / "docs" / "depass_lightning"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "depass_lightning", package, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    shutil.copytree(ROOT / "callbacks", package / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))


def on_config(config: MkDocsConfig) -> None:
    """Give headings the anchors that a code host gives them.

    Args:
        config: the site's configuration.
    """
    config.repo_url = os.environ.get("REPOSITORY_URL") or None
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are at the repository's root.

    Args:
        files: the site's files.
        config: the site's configuration.
    """
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages.

    Args:
        markdown: a page's text.
        page: the page.

    Raises:
        FileNotFoundError: a link's file is not in the repository.
    """
    names = {page_path: name for name, page_path in FROM_ROOT.items()}
    path = page.file.src_uri
    source = names.get(path) or f"docs/{path}"
    outside_code = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    outside_code[::2] = [
        LINK.sub(lambda match: _link(match, source, path), text) for text in outside_code[::2]
    ]
    return "".join(outside_code)


def _link(match: re.Match[str], source: str, page: str) -> str:
    """Return a link as the site has it.

    Args:
        match: a link in Markdown.
        source: the file it is in, relative to the repository's root.
        page: the page it is on, relative to docs/.
    """
    mark, text, link, anchor = match[1], match[2], match[3], match[4] or ""
    if "://" in link:
        return match[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if not (ROOT / target).exists():
        raise FileNotFoundError(f"{source} links to {link}, which is not in the repository")
    inside = FROM_ROOT.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
    if inside is not None:
        return f"{mark}[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"
    repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    return f"[{text}]({repository}/blob/main/{target}{anchor})" if repository else text
