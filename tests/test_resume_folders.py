"""A command that was interrupted finds its folder again when it is started again."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_module

from depass_lightning.commands.runs import UNFINISHED, Resume
from depass_lightning.storage import Journal
from tests.conftest import ROOT
from tests.test_resume import QUICK, table


def typed(folder, *overrides, kill_at=None, victim=""):
    """Type the command in a folder, and kill it, or a process of it, after so many prompts; return what it
    says."""
    command = [sys.executable, str(ROOT / "analyze.py"), *QUICK, "print_config=false", *overrides]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if kill_at is not None:
        while sum(Journal(own).counted() for own in folder.glob("logs/analyze/*/*")) < kill_at:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True) if victim else []
        for own in [one for one in family if victim in " ".join(one.cmdline())] or [process]:
            own.kill()
    return process.communicate(timeout=120)[0]


def test_the_same_command_goes_on_by_itself(tmp_path):
    """No folder is given: the one of the run that was killed is found by what was typed."""
    typed(tmp_path, "trainer.accelerator=cpu", kill_at=6)
    (interrupted,) = (tmp_path / "logs" / "analyze" / "runs").iterdir()
    printed = typed(tmp_path, "trainer.accelerator=cpu")
    assert "goes on with" in printed
    assert "prompts have been attributed before" in printed
    assert list(interrupted.parent.iterdir()) == [interrupted]
    assert len(Journal(interrupted).done()) == 24
    # A run that has ended is not gone on with.
    printed = typed(tmp_path, "trainer.accelerator=cpu", f"hydra.run.dir={interrupted}", "resume=false")
    assert "goes on with" not in printed
    assert table(interrupted.with_name(f"{interrupted.name}-2")) == table(interrupted)


@pytest.mark.slow  # three starts of the command
def test_a_process_that_lightning_has_started_is_lost(tmp_path):
    """As typed, with `ddp`: the one that is lost is named, the other ends, and both go on."""
    two = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "task.size=200"]
    printed = typed(tmp_path, *two, kill_at=6, victim="train_ddp_process_1")
    assert "error: process 2 of 2 was lost (signal 9)" in printed
    assert "told to by SIGTERM" not in printed
    assert "prompts are kept in" in printed
    printed = typed(tmp_path, *two)
    assert "prompts have been attributed before" in printed
    assert len(list(tmp_path.glob("logs/analyze/runs/*/summary.json"))) == 1


def configured(*overrides, mode="RUN"):
    """A command's configuration, Hydra's own included."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        return compose("analyze", overrides=[*overrides, f"hydra.mode={mode}"], return_hydra_config=True)


def test_only_the_same_command_is_gone_on_with(tmp_path, monkeypatch):
    """A run that has ended, one that another process works on, and one of another command are left alone."""
    monkeypatch.chdir(tmp_path)
    config = configured("task.size=3")
    runs = Path(config.hydra.run.dir).parent
    typed_then = {
        "1-same": ["task.size=3"],
        "2-other": ["task.size=4"],
        "3-same": ["task.size=3"],
        "4-held": ["task.size=3"],
    }
    for name, overrides in typed_then.items():
        (runs / name).mkdir(parents=True)
        (runs / name / UNFINISHED).write_text(json.dumps(overrides))
    (runs / "5-ended").mkdir()
    with (runs / "4-held" / UNFINISHED).open() as held:
        fcntl.flock(held.fileno(), fcntl.LOCK_EX)
        Resume().on_run_start(config)
    assert Path(config.hydra.run.dir) == runs / "3-same"
    for overrides in (["task.size=5"], ["task.size=3", "resume=false"]):
        config = configured(*overrides)
        before = config.hydra.run.dir
        Resume().on_run_start(config)
        assert config.hydra.run.dir == before


def test_a_sweep_goes_on_in_its_folder(tmp_path, monkeypatch):
    """What is composed for each of its jobs has the folder too; the mark goes when the sweep has ended."""
    monkeypatch.chdir(tmp_path)
    first = configured("task.size=3", mode="MULTIRUN")
    interrupted = Resume()
    interrupted.on_multirun_start(first)
    folder = first.hydra.sweep.dir
    assert (Path(folder) / UNFINISHED).exists()
    assert interrupted.mark is not None
    interrupted.mark.close()  # as the system does for a process that is killed
    second = configured("task.size=3", "hydra.sweep.dir=elsewhere-by-default", mode="MULTIRUN")
    second.hydra.overrides.hydra = ["hydra.mode=MULTIRUN"]
    second.hydra.sweep.dir = f"{Path(folder).parent}/later"
    resumed = Resume()
    resumed.on_multirun_start(second)
    assert second.hydra.sweep.dir == folder
    assert f"hydra.sweep.dir={folder}" in second.hydra.overrides.hydra
    resumed.on_multirun_end(second)
    assert not (Path(folder) / UNFINISHED).exists()


def test_resume_false_begins_anew_beside_a_folder_that_was_given(tmp_path):
    run_folder = tmp_path / "mine"
    (run_folder / "attributions").mkdir(parents=True)
    (run_folder / "attributions" / "manifest.json").write_text("{}")
    config = configured(f"hydra.run.dir={run_folder}", "resume=false")
    Resume().on_run_start(config)
    assert Path(config.hydra.run.dir) == tmp_path / "mine-2"
    config = configured(f"hydra.run.dir={run_folder}")
    Resume().on_run_start(config)
    assert Path(config.hydra.run.dir) == run_folder
