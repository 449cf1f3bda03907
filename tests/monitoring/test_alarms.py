"""Null bands, intervals, stable ranks and alarms of a training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from depass_lightning import DePassError
from depass_lightning.callbacks import DePassCallback
from depass_lightning.commands.timeline import write_timelines
from depass_lightning.monitoring.alarms import Alarm, AlarmEvent
from depass_lightning.monitoring.history import History
from depass_lightning.monitoring.monitor import ProbeMonitor
from depass_lightning.utils.bootstrap import bootstrap
from tests.reference.training import PROMPTS, OwnModule, fit, language_model, tokenizer, trainer

SETS: dict[str, Any] = {"mine": list(PROMPTS[:2]), "control": list(PROMPTS[2:])}


def moved(model: nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def test_the_null_band_is_what_control_prompts_change_by(tmp_path: Path) -> None:
    model = language_model()
    monitor = ProbeMonitor(model, tokenizer(), SETS, control="control", faithfulness=0, scalars="all")
    rows: list[Any] = []
    result = mine = None
    for step in range(3):
        result = monitor.run(step)
        monitor.publish(result, [], tmp_path)
        control, mine = result.results
        assert (control.name, mine.name) == ("control", "mine")
        rows.append([row["value"] for row in control.rows])
        mean = bootstrap([now - first for now, first in zip(rows[-1], rows[0], strict=True)])
        start = monitor.history["mine"].curves["value"][0]
        expected = (start + min(0, mean.low), start + max(0, mean.high))
        assert mine.bands["value"] == pytest.approx(expected)
        assert result.scalars["depass/mine/value_null_low"] == mine.bands["value"][0]
        interval = bootstrap([row["value"] for row in mine.rows])
        assert result.scalars["depass/mine/value_high"] == interval.high
        moved(model, 0.05)
        if step == 1:  # as from a checkpoint
            torch.save(monitor.state_dict(), tmp_path / "state.pt")
            monitor = ProbeMonitor(model, tokenizer(), SETS, control="control", faithfulness=0, scalars="all")
            monitor.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert result is not None
    assert mine is not None
    assert "depass/control/value_null_low" not in result.scalars
    history = json.loads((tmp_path / "depass/mine/history.json").read_text())
    assert history["null_bands"]["value"][2] == list(mine.bands["value"])
    page = next(page for page in write_timelines(tmp_path) if "mine" in str(page)).read_text()
    assert "all probes: value, null band" in page
    assert "all probes: probability, null band" in page


def test_ranks_are_stable_from_the_step_after_which_they_stay_so() -> None:
    history = History()
    for step, spearman in enumerate([1.0, 0.5, 0.97, 0.9, 0.98, 0.99]):
        history.add(step, {"spearman_previous": spearman}, {}, {}, {})
    assert history.stable_from() == history.as_json()["stable_from"] == 4
    assert history.stable_from(0.2) == 2
    history.add(6, {"spearman_previous": math.nan}, {}, {}, {})
    assert history.stable_from() is None


@pytest.mark.parametrize(
    ("condition", "curve", "raised"),
    [
        ("value above 2", [1, 3, 3, 1, 3], [1, 4]),
        ("value below 0.8 of the reference", [10, 9, 7, 7, 8.1, 7], [2, 5]),
        ("value below 0.8 of the reference", [-10, -11, -13], [2]),
        ("value above 2, twice in a row", [3, 3, 3, 1, 3, 3], [1, 5]),
        ("value above 2, 3 times in a row, beyond the null band", [3, 3, 3, 6, 6, 6], [5]),
        ("value above 2", [math.nan, math.nan, 3], [2]),
    ],
)
def test_when_an_alarm_is_raised(condition: str, curve: list[float], raised: list[int]) -> None:
    alarm = Alarm.parse(condition)
    events = [
        alarm.event("mine", range(end + 1), curve[: end + 1], [(-5.0, 5.0)] * (end + 1))
        for end in range(len(curve))
    ]
    assert [event.step for event in events if event is not None] == raised


def test_alarms_log_call_and_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    called: list[AlarmEvent] = []
    probes = DePassCallback(
        SETS,
        every_n_steps=1,
        faithfulness=0,
        control="control",
        alarms={"mine/rank above 0": called.append, "similarity_first below 0.9999, twice in a row": "stop"},
    )
    training = trainer(tmp_path, [probes], max_epochs=3)
    fit(training, OwnModule())
    steps = probes.history["mine"].steps
    assert steps[-1] == training.global_step == 2  # the second run after the first
    assert [(event.name, event.step) for event in called] == [("mine", 0)]
    assert any("alarm of 'mine': similarity_first below 0.9999" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alarms": "value"}, "'value' is no condition of an alarm; write it as in 'on_target below"),
        ({"alarms": ["value above x"]}, "is no condition"),
        ({"alarms": ["value above 1, sometimes"]}, "is no condition"),
        ({"alarms": ["loss above 1"]}, "reads the scalar 'loss'; there are value"),
        ({"alarms": ["other/value above 1"]}, "reads the set 'other'; there are mine, control"),
        ({"alarms": ["value above 1, beyond the null band"]}, "name the probe set whose prompts should not"),
        ({"alarms": {"value above 1": "end"}}, "the action of an alarm is 'log', 'stop' or a function"),
        ({"control": "ioi"}, "it must be one of several probe sets; there are mine, control"),
        ({"scalars": "few"}, "scalars must be 'main' or 'all'"),
    ],
)
def test_mistakes_are_named(options: Any, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        ProbeMonitor(None, None, SETS, **options)
