"""`python analyze.py experiment=paper_...`: every experiment's command, on one process and on two."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from depass_lightning.studies import read_experiment
from depass_lightning.utils.distributed import from_all, place
from tests.commands.test_analyze import ROOT, run

HANDFUL = {
    "paper_tokens": ("study.size=5", "study.pool=9", "study.methods=[depass,occlusion,random]"),
    "paper_heads": ("study.size=5", "study.pool=9"),
    "paper_neurons": ("study.size=5", "study.pool=9"),
    "paper_truthful": ("study.size=9", "study.draws=1", "study.layers=[1,2]", "study.counts=[0,1,4]"),
    "paper_language": ("study.size=8", "study.layers=[1]"),
    "circuits": ("study.size=3", "study.pool=9", "study.tasks=[ioi]", "study.ablations=[mean,resample]"),
}
TWO = ("trainer.devices=2", "trainer.strategy=ddp_fork")


def numbers(value: Any) -> Any:
    """Return a result's numbers, but for times."""
    if isinstance(value, dict):
        return {name: numbers(own) for name, own in value.items() if "seconds" not in name}
    if isinstance(value, list):
        return [numbers(own) for own in value]
    return value


def agree(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(agree(one[name], two[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(agree, one, two))
    if isinstance(one, float):
        return math.isclose(one, two, rel_tol=1e-4, abs_tol=1e-6)
    return one == two


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "name",
    [name if name == "paper_truthful" else pytest.param(name, marks=pytest.mark.slow) for name in HANDFUL],
)
def test_the_command_finds_the_same_on_two_processes(name: str, tmp_path: Path, capfd, monkeypatch) -> None:
    """Prompts are shared out; what is drawn, fitted and found is as on one, with the same seed."""
    folders, told = [tmp_path / "one", tmp_path / "two"], tmp_path / "told"

    def telling(work: Any) -> Any:
        with told.open("a") as file:
            file.write(f"{place()}\n")
        return from_all(work)

    monkeypatch.setattr("depass_lightning.utils.batching.from_all", telling)
    for folder, extra in zip(folders, ((), TWO), strict=True):
        assert run(folder, f"experiment={name}", *HANDFUL[name], *extra) == 0
        printed = capfd.readouterr().out
        assert printed.count(f"page     {folder / 'report.html'}") == 1, "the first process alone speaks"
        assert set(told.read_text().splitlines()) == ({"(0, 2)", "(1, 2)"} if extra else {"(0, 1)"})
        told.unlink()
    one, two = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert len(one["table"]) > 1
    assert one["panels"]
    for part in ("table", "panels", "settings", "prompts"):
        assert agree(numbers(one[part]), numbers(two[part])), part
    for folder in folders:
        assert read_experiment(folder).name == name


def test_a_wrong_setting_is_one_line(tmp_path: Path, capfd) -> None:
    assert run(tmp_path, "experiment=paper_heads", "study.size=3", "study.methods=[atp]", *TWO) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: the methods are held against depass; name it among atp"]


@pytest.mark.slow
def test_a_lost_process_costs_only_its_method(tmp_path: Path) -> None:
    """As typed: what is killed is named, the other process ends too, and the same command goes on."""
    typed = ["experiment=paper_neurons", "study.size=40", "study.methods=[depass,atp,random]"]
    typed += ["trainer=ddp", "trainer.accelerator=cpu", "print_config=false", f"hydra.run.dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "analyze.py"), *typed]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "rows" / "depass.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    (victim,) = [
        own for own in map(int, children) if b"analyze.py" in Path(f"/proc/{own}/cmdline").read_bytes()
    ]
    os.kill(victim, signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "was lost" in said
    assert "Traceback" not in said
    assert "depass" in said.rpartition("the same command goes on from there")[0].splitlines()[-1]
    written = (tmp_path / "rows" / "depass.parquet").stat().st_mtime_ns
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "rows" / "depass.parquet").stat().st_mtime_ns == written
    assert [row["method"] for row in read_experiment(tmp_path).table] == ["depass", "atp", "random"]
