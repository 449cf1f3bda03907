"""A planted shortcut shows in what the probes measure, and where none is planted nothing shows."""

import csv
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import open_dict

from depass_lightning import DePassError
from depass_lightning.commands.train import train
from depass_lightning.tasks.synthetic import shortcut

# Three epochs at twice the experiment's learning rate: the same story in half the steps.
QUICK = [
    "experiment=shortcut",
    "module.learning_rate=1e-3",
    "trainer.max_epochs=3",
    "callbacks.depass.size=8",
    "callbacks.depass.faithfulness=0",
    "~callbacks.rich_progress_bar",
    "logger=csv",
    "export_dir=null",
    "print_config=false",
]


class Run:
    """The curves of a run: share of the score on the place, and accuracy with and without the shortcut."""

    def __init__(self, folder: Path, planted: bool) -> None:
        planting = f"data.train.examples.planted={str(planted).lower()}"
        with initialize_config_module("depass_lightning.conf", version_base="1.3"):
            config = compose("train", overrides=[*QUICK, planting])
        with open_dict(config):
            config.paths.output_dir = config.paths.work_dir = str(folder)
        assert not train(config)
        history = json.loads((folder / "depass/shortcut/history.json").read_text())
        self.share = dict(zip(history["steps"], history["curves"]["on_target"], strict=True))
        self.planted, self.clean = (self.accuracy(folder, name) for name in ("planted", "clean"))

    @staticmethod
    def accuracy(folder: Path, name: str) -> dict[int, float]:
        with (folder / "csv/metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(f"val/{name}/accuracy")]
        return {int(row["step"]) + 1: float(row[f"val/{name}/accuracy"]) for row in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The experiment, and its control: the same steps with places drawn at random."""
    folder = tmp_path_factory.mktemp("shortcut")
    return Run(folder / "planted", planted=True), Run(folder / "control", planted=False)


@pytest.mark.slow
def test_the_score_moves_onto_the_shortcut(runs: tuple[Run, Run]) -> None:
    planted, control = runs
    start, end = planted.share[0], planted.share[max(planted.share)]
    assert control.share[0] == start < 0.02
    assert end > 0.25
    assert max(control.share.values()) < 0.02


def test_accuracy_falls_only_where_the_shortcut_does_not_help(runs: tuple[Run, Run]) -> None:
    planted, control = runs
    last = max(planted.clean)
    assert planted.planted[last] > 0.95
    assert planted.clean[last] < 0.5
    assert control.clean[last] > 0.85


def test_the_share_rises_no_later_than_accuracy_falls(runs: tuple[Run, Run]) -> None:
    planted, control = runs
    rise = min(step for step, share in planted.share.items() if share > 5 * planted.share[0])
    fall = min(step for step, right in planted.clean.items() if right < control.clean[step] - 0.1)
    assert rise <= fall


def test_the_data_are_what_they_say() -> None:
    assert len(shortcut.load("train")) == 3 * len(shortcut.load("test")) + 3 * shortcut.NEWCOMERS
    for planted in (True, False):
        for example in shortcut.load("test", planted=planted):
            (place,), (subject,) = example.roles["shortcut"], example.roles["subject"]
            stands_for = example.answer if planted else example.foil
            assert stands_for is not None
            assert example.prompt[slice(*place)] == shortcut.GIVEN_AWAY[stands_for.strip()]
            assert example.prompt[slice(*subject)] in {
                fact.subject for fact in shortcut.FACTS if fact.answer == str(example.answer).strip()
            }
            assert example.evidence_ranges() == [place]
    with pytest.raises(DePassError, match="no split 'new'"):
        shortcut.load("new")
