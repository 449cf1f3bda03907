"""The probes keep to their share of the time, on a clock that the tests turn."""

import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import distributed

from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring.runner import ProbeRunner
from depass_lightning.monitoring.throttle import Throttle
from tests.callbacks.test_callback import history_of
from tests.reference.training import PROMPTS, OwnModule, fit, trainer


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def occasions(
    limit: float | None, cost: float, between: float, count: int
) -> tuple[Throttle, list[int], float]:
    """Offer a run every `between` seconds; return those that were used, and the largest share after one."""
    clock = Clock()
    pace = Throttle(limit, clock)
    clock.now += cost
    pace.spend(cost)  # the first, which is never skipped
    used, worst = [], 0.0
    for i in range(count):
        clock.now += between
        if pace.has_room():
            clock.now += cost
            pace.spend(cost)
            used.append(i)
            worst = max(worst, pace.share)
    return pace, used, worst


def test_without_a_limit_every_occasion_is_used() -> None:
    assert occasions(None, 5.0, 1.0, 20)[1] == list(range(20))


def test_cheap_runs_are_not_thinned(caplog: pytest.LogCaptureFixture) -> None:
    pace, used, _ = occasions(0.05, 0.01, 1.0, 50)
    assert used == list(range(50))
    assert pace.every == 1
    assert not caplog.records


def test_expensive_runs_stay_below_the_limit_and_are_spread(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pace, used, worst = occasions(0.05, 1.0, 2.0, 2000)
    assert worst <= 0.05
    # 1 s in 20 s is the limit: a run in ten occasions, and a power of two is used
    assert pace.share > 0.02
    gaps = {b - a for a, b in zip(used[-20:], used[-19:], strict=False)}
    assert len(gaps) == 1
    assert gaps <= {10, 16}
    said = [record.getMessage() for record in caplog.records]
    changes = [int(found.group(1)) for text in said if (found := re.search(r"one occasion in (\d+)", text))]
    assert all(a != b for a, b in itertools.pairwise(changes))  # once a change
    assert changes[-1] == pace.every
    assert len(said) < 12
    assert "above max_overhead=5%" in said[0]


def test_the_limit_is_enforced_once_the_free_seconds_are_spent() -> None:
    clock = Clock()
    pace = Throttle(0.05, clock, free=3.0)
    used = []
    for i in range(6):
        clock.now += 1.0
        if pace.has_room():
            clock.now += 1.0
            pace.spend(1.0)
            used.append(i)
    assert used == [0, 1, 2]
    assert pace.every > 1
    pace.start()
    assert pace.every == 1
    clock.now += 60.0
    pace.spend(3.0)
    assert pace.has_room(), "the free seconds are not counted: (6 - 3) of 60 seconds, not 6 of 63"


def test_a_monitor_has_a_limit_by_default() -> None:
    throttle = DePassCallback(list(PROMPTS)).monitor.throttle
    assert (throttle.limit, throttle.free) == (0.05, 60.0)


def test_it_comes_back_where_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    pace = Throttle(0.1, clock)

    def offer(cost: float, between: float, count: int) -> int:
        used = 0
        for _ in range(count):
            clock.now += between
            if pace.has_room():
                clock.now += cost
                pace.spend(cost)
                used += 1
        return used

    offer(1.0, 1.0, 100)
    thinned = pace.every
    assert thinned > 4
    with caplog.at_level(logging.WARNING):
        assert offer(0.001, 1.0, 400) > 200
    assert pace.every == 1
    assert "well below max_overhead=10%: they run at every occasion now" in caplog.records[-1].getMessage()


def test_every_decision_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    pace = Throttle(0.5, clock)
    assert pace.share == 0
    pace.spend(0.25)
    clock.now = 0.5
    assert pace.share == 0.5
    clock.now = 0.0
    pace.start()
    clock.now = 10.0
    pace.spend(2.5)
    assert pace.share == 0.25
    pace.start()
    assert pace.share == 0
    pace.spend(1.0)
    clock.now = 13.0
    assert pace.has_room()  # (1 + 1) / (3 + 1) is the limit itself
    assert pace.has_room()  # nor does an occasion that was not used close the next
    pace.spend(1.0)
    # (2 + 1) / (3 + 1) is above it: refused at the 1st, 2nd and 4th occasion, passed over at the 3rd
    assert [(pace.has_room(), pace.every) for _ in range(4)] == [
        (False, 2),
        (False, 4),
        (False, 4),
        (False, 8),
    ]
    clock.now = 110.0
    assert [(pace.has_room(), pace.every) for _ in range(4)] == [(False, 8)] * 3 + [(True, 4)]
    pace.spend(20.0)
    clock.now = 158.0
    # (22 + 20) / (148 + 20) is half of the limit: not less
    assert [(pace.has_room(), pace.every) for _ in range(4)] == [(False, 4)] * 3 + [(True, 4)]
    told = "another run of the probes would bring their share of the time to"
    assert [record.getMessage() for record in caplog.records] == [
        f"{told} 75.0%, above max_overhead=50%: they run at one occasion in 2 now",
        f"{told} 75.0%, above max_overhead=50%: they run at one occasion in 4 now",
        f"{told} 75.0%, above max_overhead=50%: they run at one occasion in 8 now",
        f"{told} 3.0%, well below max_overhead=50%: they run at one occasion in 4 now",
    ]


@contextmanager
def turned(monkeypatch: pytest.MonkeyPatch, *, cost: float, step: float) -> Iterator[tuple[Clock, Callback]]:
    """A clock that a probe set's attribution turns by `cost`, and a training step by `step`."""
    clock, outcomes = Clock(), ProbeRunner.outcomes

    def slow(self: ProbeRunner, *arguments: Any) -> Any:
        clock.now += cost
        return outcomes(self, *arguments)

    class Steps(Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            # ranks are not equally fast: only the first one's clock may decide
            clock.now += step * (1 + 5 * trainer.global_rank)

    monkeypatch.setattr(ProbeRunner, "outcomes", slow)
    yield clock, Steps()


def test_training_skips_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with turned(monkeypatch, cost=1.0, step=1.0) as (clock, steps):
        callback = DePassCallback(list(PROMPTS), every_n_steps=1, max_overhead=0.25)
        callback.monitor.throttle = Throttle(0.25, clock)
        kept = ModelCheckpoint(
            tmp_path / "kept",
            monitor="depass/probes/value",
            every_n_train_steps=1,
            save_top_k=-1,
            filename="{step}",
        )
        seen = {}

        class Watch(Callback):
            def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if not trainer.sanity_checking:
                    seen[trainer.global_step] = trainer.callback_metrics["depass/probes/value"].item()

        logger = CSVLogger(tmp_path, "csv", "")
        run = trainer(
            tmp_path,
            [callback, steps, Watch(), kept],
            logger=logger,
            max_steps=40,
            max_epochs=-1,
            enable_checkpointing=True,
        )
        with caplog.at_level(logging.WARNING):
            fit(run, OwnModule())
    history = callback.history["probes"]
    assert (history.steps[0], history.steps[-1]) == (0, 40)
    assert 5 < len(history.steps) < 14
    values = dict(zip(history.steps, history.curves["value"], strict=True))
    # between runs, what watches a scalar finds the last one's
    for step, value in seen.items():
        last = max(known for known in history.steps if known <= step)
        assert value == pytest.approx(values[last], rel=1e-5)
    assert len(kept.best_k_models) == 40
    # but a log has no value where nothing was measured
    assert len(
        [line for line in _column(tmp_path / "csv/metrics.csv", "depass/probes/value") if line]
    ) == len(history.steps)
    overhead = history_overhead(tmp_path / "csv/metrics.csv")
    assert all(share <= 0.25 for share in overhead[:-1])  # the last is never skipped
    said = [record.getMessage() for record in caplog.records if "max_overhead" in record.getMessage()]
    assert said
    assert all(a.rpartition(":")[2] != b.rpartition(":")[2] for a, b in itertools.pairwise(said))


def _column(path: Path, name: str) -> list[str]:
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    return [row[header.index(name)] for row in rows]


def history_overhead(path: Path) -> list[float]:
    return [float(value) for value in _column(path, "depass/overhead") if value]


def test_a_checkpoint_without_a_run_carries_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with turned(monkeypatch, cost=1.0, step=0.1) as (clock, steps):
        callback = DePassCallback(list(PROMPTS), max_overhead=0.01)
        callback.monitor.throttle = Throttle(0.01, clock)
        kept = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        fit(trainer(tmp_path, [callback, steps, kept], enable_checkpointing=True), OwnModule())
    assert callback.history["probes"].steps == [0, 6]
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert (saved["step"], saved["history"]["probes"]["steps"]) == (0, [0])
    assert saved["scalars"]["depass/probes/value"] == callback.history["probes"].curves["value"][0]


def test_ranks_decide_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clocks differ by a factor of six: a rank that ran alone would wait for ever."""
    with turned(monkeypatch, cost=1.0, step=1.0) as (clock, steps):
        callback = DePassCallback(list(PROMPTS), every_n_steps=1, max_overhead=0.25)
        callback.monitor.throttle = Throttle(0.25, clock)

        class Write(Callback):
            def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                found = [callback.history["probes"].steps, float(trainer.callback_metrics["depass/overhead"])]
                torch.save(found, tmp_path / f"rank{distributed.get_rank()}.pt")

        callbacks = [callback, steps, Write()]
        options = {"devices": 2, "strategy": "ddp_fork", "max_steps": 20, "max_epochs": -1}
        fit(trainer(tmp_path, callbacks, **options), OwnModule())
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one == other
    assert 2 < len(history_of(tmp_path)["steps"]) < 10
