"""The environment of every test: one thread, no network, temporary caches, and (on request) a clean tree."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHES = TemporaryDirectory(prefix="depass-tests-", ignore_cleanup_errors=True)

# Before torch, transformers, wandb or matplotlib are imported; subprocesses of tests inherit it.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",  # asking a CUDA build for devices forbids forked processes to fork again
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",  # tiny models otherwise spin
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HOME=f"{CACHES.name}/huggingface",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_CACHE_DIR=f"{CACHES.name}/wandb",
    WANDB_CONFIG_DIR=f"{CACHES.name}/wandb",
    WANDB_DATA_DIR=f"{CACHES.name}/wandb",
    MPLBACKEND="Agg",
    PYTHONDONTWRITEBYTECODE="1",
)

_BEFORE = pytest.StashKey[set[str]]()
_WRITTEN = pytest.StashKey[set[str]]()
_OWN_CACHES = (".venv/", ".pytest_cache/", ".ruff_cache/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--clean-tree",
        action="store_true",
        help="fail the run if it changed or left a file in the repository (as `make test` does)",
    )


def _tree() -> set[str]:
    """The differences from the last commit, ignored files too, without pytest's and Python's own caches."""
    command = ["git", "status", "--porcelain", "--ignored=matching", "--untracked-files=all"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line for line in lines if "__pycache__/" not in line and line[3:] not in _OWN_CACHES}


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--clean-tree") and "PYTEST_XDIST_WORKER" not in os.environ:
        session.config.stash[_BEFORE] = _tree()


def pytest_sessionfinish(session: pytest.Session) -> None:
    before = session.config.stash.get(_BEFORE, None)
    if before is not None and (written := _tree() - before):
        session.config.stash[_WRITTEN] = written
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if written := config.stash.get(_WRITTEN, None):
        terminalreporter.section("tests wrote into the repository (use tmp_path)", red=True)
        terminalreporter.write_line("\n".join(sorted(written)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark those cases of `covering` tests slow in which every parameter has a value that it had before.

    `covering(n)` also marks all cases after the first `n` that are left.
    """
    seen: set[tuple[str, str, str]] = set()
    quick: Counter[str] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("covering")) and (case := getattr(item, "callspec", None)):
            test = item.nodeid.partition("[")[0]
            values = {(test, name, repr(value)) for name, value in case.params.items()}
            if values <= seen or quick[test] == next(iter(mark.args), None):
                item.add_marker("slow")
            elif not item.get_closest_marker("slow"):
                quick[test] += 1
            seen |= values


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget the precision and devices that a test's Accelerator or Trainer chose for its whole process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save figures without drawing them, which takes most of a small study's time; `tests/studies` draws."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: file.write(b"<svg/>"))


def pytest_unconfigure() -> None:
    CACHES.cleanup()
