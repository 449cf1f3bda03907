"""A run that is killed at any moment, and started again, ends with the results of one that was not."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from depass_lightning import tasks
from depass_lightning.callbacks import ProcessMonitor
from depass_lightning.callbacks.process_monitor import end_with_parent
from depass_lightning.commands.resume import UNFINISHED
from depass_lightning.depass import DePass
from depass_lightning.storage import RunStore, read_rows
from tests.commands.test_analyze import good, jsonl, run

SIZE = 24
QUICK = [f"task.size={SIZE}", "batch_size=2", "faithfulness=none", "report.figures=0"]
TWO = ["trainer.devices=2", "trainer.strategy=ddp_fork"]
# Kills of a run, and of one of a run's processes, by seed; the slow ones make it 52.
SEEDS = [(0, 4, 2), *(pytest.param(seed, 10, 5, marks=pytest.mark.slow) for seed in (1, 2, 3))]
FORK = multiprocessing.get_context("fork")


def started(folder, *overrides, limit=None):
    """Start a run in a process of its own, which writes what it says into a file beside the folder."""

    def work():
        os.setpgid(0, 0)
        with Path(f"{folder}.said").open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = run(folder, *QUICK, *overrides)
            said.flush()
        os._exit(int(code or 0))

    process = FORK.Process(target=work)
    process.start()
    return process


def finished(folder, *overrides, **options):
    """Run to the end and return the exit code."""
    process = started(folder, *overrides, **options)
    process.join(120)
    return process.exitcode


def said(folder):
    return re.sub(r"\s+", " ", Path(f"{folder}.said").read_text())


def table(folder):
    return (folder / "attributions" / "attributions.parquet").read_bytes()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing disturbs, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    begun = time.monotonic()
    assert finished(folder) == 0
    return folder, time.monotonic() - begun


def kill_and_go_on(whole, seconds, folder, rng, kills, victims, *overrides):
    """Kill runs at random moments and start each again until it ends, so many kills in all.

    Args:
        whole: the folder of a run that nothing disturbed: each must end with the same.
        seconds: how long a run takes.
        folder: where the runs go, one after another.
        rng: chooses the moments, and the process.
        kills: how many kills at least.
        victims: how many of a run's processes, those that started the others first, are chosen among.
        overrides: of the command.
    """
    done = number = 0
    while done < kills:
        number += 1
        while True:
            process = started(folder / str(number), *overrides)
            process.join(rng.uniform(0.1, 1.2) * seconds)
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                rng.choice([parent, *parent.children(recursive=True)][:victims]).kill()
                done += 1
            process.join(60)
            assert not process.is_alive()
            if process.exitcode == 0:
                break
        assert table(folder / str(number)) == table(whole)
        assert files(folder / str(number)) == files(whole)


@pytest.mark.parametrize(("seed", "kills", "_"), SEEDS)
def test_kill_and_go_on(undisturbed, tmp_path, seed, kills, _):
    """At any moment: while it loads, attributes, merges, or writes its page; the same bytes result."""
    whole, seconds = undisturbed
    kill_and_go_on(whole, seconds, tmp_path, random.Random(seed), kills, 1)
    last = max(tmp_path.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    summaries = [json.loads(path.read_text()) for path in (last, whole / "summary.json")]
    for own in summaries:
        own.pop("attributed_before", None)
        own.pop("seconds")
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(("seed", "_", "kills"), SEEDS)
def test_kill_one_of_several_processes_and_go_on(undisturbed, tmp_path, seed, kills, _):
    """Whichever is lost, the first or another or the one that started both: none is left behind."""
    whole, seconds = undisturbed
    kill_and_go_on(whole, 1.5 * seconds, tmp_path, random.Random(100 + seed), kills, 3, *TWO)
    time.sleep(1)
    assert not [own for own in psutil.process_iter() if own.status() != "zombie" and _at_work(own, tmp_path)]


def _at_work(process, folder):
    try:
        return any(str(folder) in str(own.path) for own in process.open_files())
    except psutil.Error:
        return False


def test_at_most_the_batch_in_flight_is_lost(tmp_path):
    """What was attributed before the kill is not attributed again."""
    folder = tmp_path / "run"
    process = started(folder)
    run_store = RunStore(folder)
    while run_store.counted() < 6:
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = run_store.done()
    assert len(kept) >= 6
    assert (folder / UNFINISHED).exists()
    assert finished(folder) == 0
    left = SIZE - len(kept)
    assert f"{left}/{left}" in said(folder), "the bar of the second run counts what was left"
    assert f"{len(kept)} of {SIZE} prompts have been attributed before" in said(folder)
    assert json.loads((folder / "summary.json").read_text())["attributed_before"] == len(kept)
    assert not (folder / UNFINISHED).exists()


def test_sigterm_ends_cleanly(undisturbed, tmp_path):
    """As a scheduler does before it takes the node: an exit code that says so, and what is done is kept."""
    folder = tmp_path / "run"
    for overrides in ([], TWO):
        process = started(folder, *overrides)
        have = RunStore(folder).counted()
        while RunStore(folder).counted() < have + 2:
            time.sleep(0.01)
        process.terminate()
        process.join(30)
        assert process.exitcode == 128 + signal.SIGTERM
        assert "stopped: told to by SIGTERM" in said(folder)
        assert "prompts are kept in" in said(folder)
    assert finished(folder) == 0
    assert table(folder) == table(undisturbed[0])


def test_a_lost_process_is_named(tmp_path):
    folder = tmp_path / "run"
    process = started(folder, "task.size=60", *TWO)
    while not RunStore(folder).counted():
        time.sleep(0.01)
    psutil.Process(process.pid).children()[-1].kill()
    process.join(30)
    assert process.exitcode == 1
    assert "a process was lost (process 1 terminated with signal SIGKILL)" in said(folder)


def by_another(found):
    """Work in a process that something else has started."""
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=SimpleNamespace(launcher=None))
    ProcessMonitor().on_predict_start(trainer, None)  # type: ignore[arg-type]
    found.write_text(str(os.getpid()))
    time.sleep(60)


def by_lightning(found):
    """Work where Lightning has started the script again."""
    os.environ["LOCAL_RANK"] = "1"
    watch = ProcessMonitor()
    found.write_text(str(os.getpid()))
    time.sleep(60)
    del watch


def by_lightning_too_late(found):
    """Begin to watch when the parent is lost already, as where it is killed while this process imports."""
    os.environ["LOCAL_RANK"] = "1"
    parent = os.getppid()
    found.write_text(str(os.getpid()))
    while os.getppid() == parent:
        time.sleep(0.01)
    end_with_parent()
    time.sleep(60)


def never_met(found):
    """Wait for a process that is never started, as the first does where its parent is lost too early."""
    found.write_text(str(os.getpid()))
    TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=timedelta(seconds=60))


@pytest.mark.parametrize("work", [by_another, by_lightning, by_lightning_too_late, never_met])
@pytest.mark.covering(2)
def test_a_process_whose_parent_is_lost_ends(tmp_path, work):
    """It would work on for nobody, beside the run that is started again, and keep its folder."""

    def parent():
        end_with_parent()
        watch = ProcessMonitor() if work is never_met else None
        own = FORK.Process(target=work, args=(tmp_path / "child",))
        own.start()
        own.join()
        del watch

    process = FORK.Process(target=parent)
    process.start()
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.01)
    orphan = psutil.Process(int((tmp_path / "child").read_text()))
    process.kill()
    process.join()
    _, alive = psutil.wait_procs([orphan], timeout=5)
    for own in alive:
        own.kill()
    assert not alive


def test_a_full_disk_keeps_what_is_done(undisturbed, tmp_path):
    """Files may not grow beyond a limit: the shards fit, the merged file does not."""
    folder = tmp_path / "run"
    largest = len(table(undisturbed[0]))
    assert finished(folder, limit=largest - 1) == 1
    assert "error: " in said(folder)
    assert "Traceback" not in said(folder)
    assert len(RunStore(folder).done()) == SIZE
    assert finished(folder) == 0
    assert table(folder) == table(undisturbed[0])


def test_a_disk_that_is_full_at_once(tmp_path):
    """Even the first shard cannot be written."""
    folder = tmp_path / "run"
    assert finished(folder, limit=6000) == 1
    assert "cannot be written to" in said(folder)
    assert "start the same command again" in said(folder)


def test_a_broken_shard_is_done_again(undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = started(folder)
    while RunStore(folder).counted() < 8:
        time.sleep(0.01)
    process.kill()
    process.join()
    broken = sorted(RunStore(folder).shards.glob("rank*.parquet"))[0]
    broken.write_bytes(broken.read_bytes()[:-100])
    assert finished(folder) == 0
    assert f"{broken.name} is damaged or missing" in said(folder)
    assert table(folder) == table(undisturbed[0])


def test_skipped_prompts_are_tried_again(tmp_path):
    """They are listed once, and cost the run its exit code each time."""
    strange = good("strange") | {"target": " Zarathustra"}
    task = jsonl(tmp_path, good("first"), strange, good("last"))
    for _ in range(2):
        assert run(tmp_path / "run", *task, "faithfulness=none") == 1
        listed = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in listed] == ["strange"]
        assert len(read_rows(tmp_path / "run" / "attributions")) == 2


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        (["source.layer=1"], "source.layer was 0 and is 1"),
        (["rule=taylor"], "rule.name was 'half' and is 'taylor'"),
        (["task.seed=5"], "the prompts differ"),
        (["bias=drop"], "bias was 'component' and is 'drop'"),
    ],
)
def test_other_settings_are_refused(undisturbed, capsys, overrides, difference):
    whole, _ = undisturbed
    before = table(whole)
    assert run(whole, *QUICK, *overrides) == 1
    error = capsys.readouterr().err
    assert difference in error
    assert "resume=false" in error
    assert table(whole) == before


def test_other_weights_are_refused(undisturbed, capsys, monkeypatch):
    whole, _ = undisturbed
    load = DePass.from_pretrained

    def changed(*given, **options):
        depass = load(*given, **options)
        with torch.no_grad():
            next(depass.model.parameters())[0, 0] += 1
        return depass

    monkeypatch.setattr(DePass, "from_pretrained", changed)
    assert run(whole, *QUICK) == 1
    assert "the model's weights differ" in capsys.readouterr().err


def test_what_decides_no_number_may_change(undisturbed, capsys):
    """Batches, processes, loggers, the report: nothing is attributed again."""
    whole, _ = undisturbed
    before = table(whole)
    assert run(whole, *QUICK, "batch_size=7", "report.prompts=3", "logger=csv", *TWO) == 0
    assert f"{SIZE} of {SIZE} prompts have been attributed before" in capsys.readouterr().err
    assert table(whole) == before


def test_two_commands_do_not_share_a_folder(undisturbed, tmp_path):
    folder = tmp_path / "run"
    first = started(folder, "task.size=100", "batch_size=1")
    while not RunStore(folder).counted():
        time.sleep(0.01)
    psutil.Process(first.pid).suspend()
    assert finished(folder) == 1
    assert "another process is at work in" in said(folder)
    first.kill()
    first.join()


def test_prompts_that_are_done_leave_the_other_batches_as_they_were():
    from depass_lightning.modules.prompt_datamodule import PromptData, plan_batches

    lengths = [3, 9, 4, 9, 1, 7, 3]
    assert plan_batches(lengths, 2, {1, 3, 0}) == [[5, 2], [6], [4]]
    data = PromptData(tasks.load("ioi", size=7), batch_size=2, done=lambda: {0, 1, 2})
    loader = data.predict_dataloader()
    assert loader.prompts == loader.share == 4
    assert sorted(index for batch in loader for index in batch.indices) == [3, 4, 5, 6]


def test_every_process_says_how_far_it_is(tmp_path, caplog):
    caplog.set_level("INFO", "depass_lightning")
    assert run(tmp_path, *QUICK, "log_every=0") == 0
    lines = [record.getMessage() for record in caplog.records if "prompts/s" in record.getMessage()]
    assert len(lines) == SIZE / 2
    assert re.fullmatch(rf"process 1 of 1: {SIZE} of {SIZE} prompts, [\d.]+ prompts/s", lines[-1])


def test_one_bar_counts_the_prompts_of_all_processes(tmp_path):
    assert finished(tmp_path / "run", *TWO) == 0
    assert f"{SIZE}/{SIZE}" in said(tmp_path / "run")
    assert said(tmp_path / "run").count("Attributing prompts") == 1
