"""The package is whole however it is reached: installed for development, a wheel, or a bare checkout."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import depass_lightning
from tests.conftest import ROOT

MAPPED = {
    "depass_lightning/": "depass_lightning/",
    "callbacks/": "depass_lightning/callbacks/",
    "conf/": "depass_lightning/conf/",
}

# Prints where the two mapped folders were found, after composing every command's configuration from there.
PROBE = """
import json
from importlib.resources import files
from hydra import compose, initialize_config_module
import depass_lightning, depass_lightning.callbacks, depass_lightning.conf

names = [path.name for path in files("depass_lightning.conf").iterdir() if path.name.endswith(".yaml")]
assert names, "no configuration in depass_lightning.conf"
with initialize_config_module("depass_lightning.conf", version_base="1.3"):
    for name in names:
        compose(name)
print(json.dumps([m.__file__ for m in (depass_lightning, depass_lightning.callbacks, depass_lightning.conf)]))
"""


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run a command away from the repository and return what it printed, or fail with it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def found_by(cwd: Path, path: Path | None = None) -> list[Path]:
    """Where a fresh Python finds the package, its callbacks and its configuration."""
    return [
        Path(file)
        for file in json.loads(run(sys.executable, "-c", PROBE, cwd=cwd, path=path).splitlines()[-1])
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that are tracked, or new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path_factory.mktemp("checkout")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of that copy."""
    source = shutil.copytree(checkout, tmp_path_factory.mktemp("source"), dirs_exist_ok=True)
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
        cwd=folder,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is unpacked into."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_the_tree(checkout: Path, wheel: Path) -> None:
    expected = {
        inside + path.relative_to(checkout / folder).as_posix()
        for folder, inside in MAPPED.items()
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    forgotten, foreign = sorted(expected - names), sorted(names - expected)
    assert not forgotten, f"name their packages or files in pyproject.toml's [tool.setuptools]: {forgotten}"
    assert not foreign


@pytest.mark.slow
def test_wheel_imports_and_has_its_commands(site: Path, tmp_path: Path) -> None:
    script = """
from importlib.metadata import distribution
for entry in distribution("depass-lightning").entry_points:
    print(entry.name, entry.load().__name__)
"""
    *commands, found = run(sys.executable, "-c", script + PROBE, cwd=tmp_path, path=site).splitlines()
    assert sorted(commands) == ["depass-analyze analyze", "depass-train train"]
    package = site / "depass_lightning"
    assert [Path(file) for file in json.loads(found)] == [
        package / sub / "__init__.py" for sub in ("", "callbacks", "conf")
    ]


@pytest.mark.slow
def test_the_commands_run_from_a_wheel_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    script = "import sys; from depass_lightning.commands.main import {0}; sys.argv[0] = 'depass-{0}'; {0}()"
    analyze = [sys.executable, "-c", script.format("analyze")]
    prompt = ["prompt=The capital of France is", "target= Paris", "foil= London"]
    assert "' Paris' − ' London' = +" in run(*analyze, *prompt, cwd=tmp_path, path=site)
    assert len(list(tmp_path.glob("logs/analyze/runs/*/report.html"))) == 1
    small = ["logger=csv", "trainer.max_epochs=1", "+trainer.limit_train_batches=2"]
    run(sys.executable, "-c", script.format("train"), *small, cwd=tmp_path, path=site)
    assert len(list(tmp_path.glob("logs/train/runs/*/depass/facts/timeline.html"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.slow
def test_bare_checkout_imports(checkout: Path, tmp_path: Path) -> None:
    folders = ("depass_lightning", "callbacks", "conf")
    assert found_by(tmp_path, checkout) == [checkout / folder / "__init__.py" for folder in folders]


@pytest.mark.slow
def test_editable_install_imports(tmp_path: Path) -> None:
    # Run from another folder: in the checkout its own build metadata would be found first.
    script = """
from importlib.metadata import distributions
for found in distributions(name="depass-lightning"):
    print(found.read_text("direct_url.json") or "")
"""
    printed = run(sys.executable, "-c", script, cwd=tmp_path)
    if '"editable"' not in printed or ROOT.as_uri() not in printed:
        pytest.skip("this checkout is not installed for development: `make setup` does it")
    assert found_by(tmp_path) == [
        ROOT / folder / "__init__.py" for folder in ("depass_lightning", "callbacks", "conf")
    ]


def test_tested_versions_are_in_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_citation_and_the_extra_of_everything_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == depass_lightning.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    extras = project["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert canonicalize_name(everything.name) == project["name"]
    assert everything.extras == extras.keys() - {"all", "dev"}


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.stem
)
def test_issue_forms_are_read(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids))
    assert all(
        field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in content["body"]
    )
