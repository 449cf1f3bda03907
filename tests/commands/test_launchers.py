"""What may start a sweep's jobs: every launcher's settings, what is refused, and sweeps through each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from depass_lightning.commands.launchers import CheckLaunch, check_launch
from depass_lightning.errors import DePassError
from depass_lightning.storage import read_rows
from tests.conftest import ROOT

LAUNCHERS = sorted(path.stem for path in (ROOT / "conf/hydra/launcher").glob("*.yaml"))
OF_PLUGINS = ("joblib", "submitit_local", "submitit_slurm")
DDP = ("trainer.devices=2", "trainer.strategy=ddp")
STARTERS = {
    "": {},
    "torchrun": {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    "srun": {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "sweep", "SLURM_PROCID": "0"},
}


@cache
def base(launcher: str) -> DictConfig:
    """Compose the command's configuration with a launcher, and Hydra's own."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        return compose("analyze", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)


def composed(overrides: tuple[str, ...], sweep: bool) -> Any:
    """Return the configuration of a run, or of the first job of a sweep, with Hydra's own."""
    settings = dict(own.split("=", 1) for own in overrides)
    config = base(settings.pop("hydra/launcher", "basic")).copy()
    with open_dict(config):
        for key, value in settings.items():
            OmegaConf.update(config, key, OmegaConf.create(f"value: {value}").value)
        config.hydra.mode = RunMode.MULTIRUN if sweep else RunMode.RUN
    return config


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {name for own in STARTERS.values() for name in own}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_composes_under_a_name_of_its_own(name: str) -> None:
    assert name not in OF_PLUGINS
    hydra = composed((f"hydra/launcher={name}", "hydra.sweep.dir=mine"), sweep=True).hydra
    launcher = {key: hydra.launcher[key] for key in hydra.launcher if key not in ("submitit_folder", "name")}
    assert launcher["_target_"].startswith("hydra_plugins.")
    if "gpus_per_node" in launcher:
        assert launcher["tasks_per_node"] == (launcher["gpus_per_node"] or 1)
        assert 0 < launcher["timeout_min"] <= 24 * 60
    assert (ROOT / f"conf/hydra/launcher/{name}.yaml").read_text().startswith("# ")


WORK = [
    ("", False, ()),
    ("", False, DDP),
    ("", False, ("trainer.devices=2", "trainer.strategy=ddp_fork")),
    ("", True, ()),
    ("", True, (*DDP, "hydra.sweep.dir=mine")),
    ("", True, ("trainer.devices=2", "trainer.strategy=ddp_fork")),
    ("", True, ("hydra/launcher=workers",)),
    ("", True, ("hydra/launcher=local",)),
    ("", True, ("hydra/launcher=local", "trainer.devices=2", "trainer.strategy=ddp_fork")),
    ("", True, ("hydra/launcher=workers", "trainer.devices=2", "trainer.strategy=ddp_fork")),
    ("", True, ("hydra/launcher=slurm",)),
    ("", True, ("hydra/launcher=slurm_cpu",)),
    ("", True, ("hydra/launcher=slurm_node", "trainer.devices=4", "trainer.strategy=ddp")),
    (
        "srun",
        True,
        ("hydra/launcher=slurm_node", "hydra.launcher.tasks_per_node=2", *DDP),
    ),  # within such a job
    ("torchrun", False, (*DDP, "hydra.run.dir=mine")),
    ("torchrun", True, (*DDP, "hydra.sweep.dir=mine")),
    ("srun", False, (*DDP, "hydra.run.dir=mine")),
]
REFUSED = [
    ("", True, DDP, "give hydra.sweep.dir="),
    ("", True, ("trainer.devices=2",), "trainer.strategy=ddp would make .* give hydra.sweep.dir="),
    ("", True, ("trainer.devices=[0,1]", "hydra/launcher=workers"), "joblib .* trainer.devices=1"),
    (
        "",
        True,
        (*DDP, "hydra/launcher=joblib", "hydra.sweep.dir=mine"),
        "joblib .* trainer.strategy=ddp_fork",
    ),
    (
        "",
        True,
        (*DDP, "hydra/launcher=local", "hydra.sweep.dir=mine"),
        "submitit_local .* leave out hydra/launcher=",
    ),
    ("", True, (*DDP, "hydra/launcher=slurm"), "hydra/launcher=slurm_node hydra.launcher.tasks_per_node=2"),
    ("", True, ("hydra/launcher=slurm_node",), "4 of them, but the trainer wants 1"),
    ("", False, ("trainer.devices=2", "trainer.strategy=ddp_spawn"), "take ddp, or ddp_fork"),
    ("", True, ("serve=true",), "serve=true serves one page .* leave out -m"),
    ("torchrun", False, DDP, "give hydra.run.dir="),
    ("torchrun", True, DDP, "give hydra.sweep.dir="),
    ("torchrun", False, ("hydra.run.dir=mine",), "give trainer.devices=2 trainer.strategy=ddp"),
    ("torchrun", True, (*DDP, "hydra.sweep.dir=mine", "hydra/launcher=workers"), "leave out one of them"),
    ("srun", False, DDP, "srun starts .* give hydra.run.dir="),
    ("", False, (*DDP, "model.device_map=auto"), "model.device_map=auto .* in each of 2 processes"),
]


def begun(monkeypatch: pytest.MonkeyPatch, starter: str, overrides: tuple[str, ...], sweep: bool) -> Any:
    for name, value in STARTERS[starter].items():
        monkeypatch.setenv(name, value)
    config = composed(overrides, sweep)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": config.hydra}))
    return config


@pytest.mark.parametrize(("starter", "sweep", "overrides"), WORK)
def test_what_works_is_let_through(
    monkeypatch: pytest.MonkeyPatch, starter: str, sweep: bool, overrides: tuple[str, ...]
) -> None:
    check_launch(begun(monkeypatch, starter, overrides, sweep))


@pytest.mark.parametrize(("starter", "sweep", "overrides", "message"), REFUSED)
def test_what_does_not_work_is_refused_with_what_does(
    monkeypatch: pytest.MonkeyPatch, starter: str, sweep: bool, overrides: tuple[str, ...], message: str
) -> None:
    config = begun(monkeypatch, starter, overrides, sweep)
    with pytest.raises(DePassError, match=message):
        check_launch(config)


def test_a_sweep_is_refused_before_its_first_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = begun(monkeypatch, "", DDP, sweep=True)
    with pytest.raises(SystemExit) as stop:
        CheckLaunch().on_multirun_start(config)
    assert stop.value.code == 1
    assert "error: with -m" in capsys.readouterr().err
    CheckLaunch().on_multirun_start(begun(monkeypatch, "", (), sweep=True))


# Whole sweeps, in processes of their own

QUICK = (
    "task.size=2",
    "faithfulness=none",
    "print_config=false",
    "report.figures=0",
    "trainer.accelerator=cpu",
)
SWEEP = ("-m", "task=ioi,known", "source=tokens,heads", "hydra.sweep.dir=sweep", *QUICK)


def command(folder: Path, *overrides: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `analyze.py` in a folder."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *before, str(ROOT / "analyze.py"), *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def scores_of(folder: Path) -> dict[tuple[str, str], list[list[float]]]:
    """Return every run's scores, by its task and source."""
    found = {}
    for path in sorted(folder.glob("*/config.yaml")):
        config = OmegaConf.load(path)
        rows = read_rows(path.parent / "attributions")
        found[config.task.name, config.source._target_] = [row["scores"] for row in rows]
    return found


@pytest.mark.slow  # what is refused is told by the tests above, without a process
def test_ddp_in_a_sweep_is_refused_at_the_command(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "rule=softmax,taylor", *DDP, *QUICK)
    assert done.returncode == 1
    assert "give hydra.sweep.dir=" in done.stderr
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.slow
def test_the_same_sweep_through_every_launcher(tmp_path: Path) -> None:
    """On the bundled model: two tasks and two sources, sequentially and in parallel."""
    assert command(tmp_path / "basic", *SWEEP).returncode == 0
    wanted = scores_of(tmp_path / "basic/sweep")
    assert len(wanted) == 4
    for launcher in ("workers", "local"):
        done = command(tmp_path / launcher, *SWEEP, f"hydra/launcher={launcher}")
        assert done.returncode == 0, done.stderr
        assert scores_of(tmp_path / launcher / "sweep") == wanted


@pytest.mark.slow
def test_two_processes_in_a_sweep_and_under_torchrun(tmp_path: Path) -> None:
    many = ("task.size=12", "batch_size=2", *QUICK[1:])
    assert command(tmp_path / "one", *many, "hydra.run.dir=run").returncode == 0
    wanted = read_rows(tmp_path / "one/run/attributions")
    done = command(tmp_path / "sweep", "-m", "seed=0,0", *many, *DDP, "hydra.sweep.dir=run")
    assert done.returncode == 0, done.stderr
    starter = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = command(tmp_path / "torchrun", *many, *DDP, "hydra.run.dir=run", before=starter)
    assert done.returncode == 0, done.stderr
    for run in ("sweep/run/0", "sweep/run/1", "torchrun/run"):
        rows = read_rows(tmp_path / run / "attributions")
        assert [row["id"] for row in rows] == [row["id"] for row in wanted]
        for row, one in zip(rows, wanted, strict=True):
            assert row["scores"] == pytest.approx(one["scores"], abs=1e-5)


# The guide

GUIDE = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()
]
ROWS = re.findall(
    r"^\| (.*?) \| `(.*?)`", GUIDE.split("### Several processes")[1].split("##")[0], re.MULTILINE
)


def jobs_of(words: list[str]) -> list[tuple[str, ...]]:
    """Return the jobs of a command line, each as its overrides."""
    parsed = OverridesParser.create().parse_overrides(words)
    return list(product(*(_choices(own) for own in parsed)))


def _choices(own: Override) -> list[str]:
    if not own.is_sweep_override():
        return [str(own.input_line)]
    return [f"{own.get_key_element()}={value}" for value in own.sweep_string_iterator()]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_guide_composes(line: str) -> None:
    program, script, *words = line.split()
    assert (program, script) == ("python", "analyze.py")
    sweep = words[0] == "-m"
    jobs = jobs_of(words[sweep:])
    assert len(jobs) == {True: max(2, len(jobs)), False: 1}[sweep]
    for job in (jobs[0], jobs[-1]):
        with initialize_config_module("depass_lightning.conf", version_base="1.3"):
            config = compose("analyze", overrides=list(job))
        assert config.checkpoint is None or "/" in config.checkpoint


def test_every_launcher_is_in_the_guide_and_its_ways_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(re.findall(r"^\| `hydra/launcher=(\w+)`", GUIDE, re.MULTILINE)) == set(LAUNCHERS)
    assert len(ROWS) == 4
    for how, settings in ROWS:
        torchrun = "torchrun" in how
        words = tuple(word for word in settings.split() if "=" in word and word != "trainer=gpu")
        check_launch(begun(monkeypatch, "torchrun" if torchrun else "", words, sweep=not torchrun))
