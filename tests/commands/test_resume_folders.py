"""A command that was interrupted finds its folder again when it is started again."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from depass_lightning.callbacks import AttributionWriter
from depass_lightning.commands import resume as runs
from depass_lightning.commands.attribute_task import manifest_of
from depass_lightning.commands.main import analyze as main
from depass_lightning.commands.resume import UNFINISHED, Resume, lock_run_folder
from depass_lightning.errors import DePassError
from depass_lightning.storage import RunStore, read_rows
from depass_lightning.tasks import Example, Task
from tests.commands.test_analyze import run, summary_of
from tests.commands.test_conf import composed
from tests.commands.test_resume import QUICK, SIZE, table
from tests.conftest import ROOT
from tests.reference.forked import start_script


def typed(folder, *overrides, kill_at=None, victim=""):
    """Run the command in a folder and return its output; it, or a process of it, is killed at a prompt."""
    script = start_script(ROOT / "analyze.py", [*QUICK, "print_config=false", *overrides], folder)
    if kill_at is not None:
        while sum(RunStore(run).counted() for run in folder.glob("logs/analyze/*/*")) < kill_at:
            assert script.process.is_alive(), script.wait()
            time.sleep(0.01)
        family = psutil.Process(script.process.pid).children(recursive=True) if victim else []
        for process in [one for one in family if victim in " ".join(one.cmdline())] or [script.process]:
            process.kill()
    ended = script.wait()
    return ended.stdout + ended.stderr


def test_the_same_command_goes_on_by_itself(tmp_path):
    """No folder is given: the one of the run that was killed is found by what was typed."""
    typed(tmp_path, "trainer.accelerator=cpu", kill_at=6)
    (interrupted,) = (tmp_path / "logs" / "analyze" / "runs").iterdir()
    printed = typed(tmp_path, "trainer.accelerator=cpu")
    assert "goes on with" in printed
    assert "prompts have been attributed before" in printed
    assert list(interrupted.parent.iterdir()) == [interrupted]
    assert len(RunStore(interrupted).done()) == 24
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


def test_a_folder_whose_mark_is_removed_meanwhile_is_claimed_once(tmp_path, monkeypatch):
    """One waits while another ends; what it has locked then may be a file that has no name any more."""
    monkeypatch.setattr(runs, "PATIENCE", 0.3)
    real = runs._locked
    mark, held = tmp_path / UNFINISHED, []

    def locked(file):
        """Lock, but let the other end, and a third come in, between opening and locking."""
        if not held:
            mark.unlink()
            held.append(mark.open("a+"))
            assert real(held[0].fileno())
        return real(file)

    monkeypatch.setattr(runs, "_locked", locked)
    with pytest.raises(DePassError, match="another process is at work"), lock_run_folder(tmp_path):
        pass
    held[0].close()
    with lock_run_folder(tmp_path):
        assert mark.exists()
    assert not mark.exists()


def test_a_refused_command_leaves_a_finished_run_as_it_is(tmp_path, monkeypatch, capsys):
    """The files that say what was asked, and that the run has ended."""

    for module in ("hydra.core.utils", "hydra._internal.hydra"):  # what other tests log stays as it is
        monkeypatch.setattr(f"{module}.configure_log", lambda *_: None)

    def typed_here(*overrides):
        quick = ["task.size=2", "faithfulness=none", "report.figures=0", "print_config=false"]
        words = [f"hydra.run.dir={tmp_path / 'mine'}", "trainer.accelerator=cpu", *quick, *overrides]
        monkeypatch.setattr(sys, "argv", ["analyze.py", *words])
        main()

    def written():
        return {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}

    typed_here()
    before = written()
    assert {"config.yaml", "overrides.yaml"} <= {path.name for path in before}
    for mark in (None, '["task.size=3"]'):
        if mark is not None:
            (tmp_path / "mine" / UNFINISHED).write_text(mark)
            before = written()
        with pytest.raises(SystemExit):
            typed_here("source.layer=1")
        assert "source.layer was 0 and is 1" in capsys.readouterr().err
        assert written() == before
    typed_here("batch_size=1")
    assert "batch_size: 1" in (tmp_path / "mine" / "config.yaml").read_text()


def test_two_sweeps_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    config = configured("task.size=3", f"hydra.sweep.dir={tmp_path}", mode="MULTIRUN")
    first = Resume()
    first.on_multirun_start(config)
    with pytest.raises(SystemExit):
        Resume().on_multirun_start(config)
    assert "another sweep is at work" in capsys.readouterr().err
    first.on_multirun_end(config)


STARTERS = {
    "ddp": ([], [{}]),
    "torchrun": (["-m", "torch.distributed.run", "--nproc-per-node", "2"], [{}]),
    "srun": (
        [],
        [
            {
                "SLURM_JOB_ID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_NODELIST": "localhost",
                "SLURM_NODEID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29611",
            }
            for rank in range(2)
        ],
    ),
}


@pytest.mark.slow  # real processes; that the first tells the others what is done is tested without
@pytest.mark.parametrize("starter", STARTERS)
def test_all_processes_go_on_from_the_same_prompts(tmp_path, starter):
    """However they are started: each prompt that was left is done once, and none that was done."""
    folder = tmp_path / "mine"
    assert run(folder, *QUICK, "+trainer.limit_predict_batches=3") == 0
    before, environments = STARTERS[starter]
    two = ["trainer.strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "log_every=0"]
    words = [*QUICK, *two, f"hydra.run.dir={folder}", "print_config=false"]
    processes = [
        subprocess.Popen(
            [sys.executable, *before, str(ROOT / "analyze.py"), *words],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert f"6 of {SIZE} prompts have been attributed before" in said[0]
    told = "".join(said) + "".join(path.read_text() for path in folder.glob("*.log"))
    shares = set(re.findall(r"process (\d) of 2: (\d+) of \2 prompts", told))
    assert sorted(rank for rank, _ in shares) == ["1", "2"]
    assert sum(int(share) for _, share in shares) == SIZE - 6
    assert len(RunStore(folder).done()) == SIZE


def test_the_first_process_says_what_is_done(tmp_path):
    """Another would find what one that is quicker has added since."""
    done = {0, 3}
    for first in (True, False):
        strategy = SimpleNamespace(broadcast=lambda found, first=first: found if first else done)
        writer = AttributionWriter(tmp_path, resume=first)
        writer.done = done if first else None
        writer.setup(SimpleNamespace(is_global_zero=first, strategy=strategy), None, "predict")  # type: ignore[arg-type]
        assert writer.done == done


@pytest.mark.parametrize("group", ["rule", "source"])
def test_a_file_that_was_written_again_makes_it_another_run(group, tmp_path):
    choice = {"rule": "rule=calibrated", "source": "source=subspace"}[group]
    file = tmp_path / ("rule.json" if group == "rule" else "directions.npy")
    config = composed("analyze", [choice, f"{group}.path={file}"], tmp_path)
    task = Task("one", [Example(id="0", prompt="a", answer="b")])
    manifests = []
    for content in ("one", "two"):
        file.write_text(content)
        manifests.append(manifest_of(config, "weights", task))
    (difference,) = manifests[0].differences(manifests[1])
    assert difference.startswith(f"{group}.file was ")


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["source=heads"], {"name": "shap", "score_weight": 0.5}),
        (["source=heads", "states=end"], {"name": "half"}),
    ],
)
def test_runs_record_the_rule_that_auto_takes(tmp_path, overrides, rule):
    """In every file, so that naming it goes on with the same run."""
    chosen = [f"rule={rule['name']}", *overrides]
    for number, typed in enumerate((overrides, chosen)):
        assert run(tmp_path, "task.size=2", "faithfulness=none", *typed) == 0
        summary = summary_of(tmp_path)
        assert summary["rule"] == OmegaConf.load(tmp_path / "config.yaml").rule == rule
        assert summary.get("attributed_before", 0) == 2 * number
    manifest = json.loads((tmp_path / "attributions" / "manifest.json").read_text())
    assert manifest["settings"]["rule"] == rule
    assert {row["rule"] for row in read_rows(tmp_path / "attributions")} == {rule["name"]}
