"""`analyze.py watch.folder=`: the checkpoints of any training, as they appear."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from depass_lightning import DePass
from depass_lightning.commands import watch as watching
from depass_lightning.commands.watch import checkpoints, stamp_of, step_of
from depass_lightning.storage import read_attributions
from tests.commands.test_analyze import run

FEW = ("task=known", "task.size=3", "faithfulness=none", "watch.poll=0.02")


@pytest.fixture
def models() -> list[DePass]:
    """The bundled model at three steps of a training."""
    trained = [DePass.from_pretrained("tiny") for _ in range(3)]
    for step, depass in enumerate(trained):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in depass.model.parameters():
                parameter += 0.01 * step * torch.randn(parameter.shape, generator=generator)
    return trained


def save(depass: DePass, folder: Path) -> None:
    model: Any = depass.model
    tokenizer: Any = depass.tokenizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def history(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "depass/known/history.json").read_text())


def test_checkpoints_of_every_kind_are_attributed_as_they_appear(
    tmp_path: Path, models: list[DePass], capsys: pytest.CaptureFixture[str]
) -> None:
    watched, folder = tmp_path / "training", tmp_path / "run"
    save(models[0], watched / "checkpoint-10")
    (watched / "checkpoint-15").mkdir()
    (watched / "checkpoint-15/config.json").write_text("{")  # a checkpoint that is broken
    (watched / "checkpoint-15/model.safetensors").write_bytes(b"half")

    def train() -> None:
        while not (folder / "depass").exists():
            time.sleep(0.01)
        torch.save({"state_dict": models[1].model.state_dict()}, watched / "epoch=1-step=20.ckpt")
        peft = pytest.importorskip("peft")
        model: Any = DePass.from_pretrained("tiny").model
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, lora).save_pretrained(watched / "checkpoint-30")

    training = threading.Thread(target=train)
    training.start()
    assert run(folder, f"watch.folder={watched}", "watch.until=30", *FEW) == 0
    training.join()
    assert history(folder)["steps"] == [10, 20, 30]
    output = capsys.readouterr()
    assert "checkpoint-15 is left out: " in " ".join((output.out + output.err).split())
    assert (folder / "depass/known/timeline.html").is_file()
    [first, *_] = read_attributions(folder / "depass/known/step-000020.parquet")
    wanted = models[1].attribute(first.text, first.target_ids[0], batch_size=1, rule="half")
    assert first.scores.tolist() == pytest.approx(wanted.scores.tolist(), rel=1e-4, abs=1e-5)


def test_it_goes_on_after_a_kill(
    tmp_path: Path, models: list[DePass], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = tmp_path / "training"
    for step, depass in enumerate(models):
        save(depass, watched / f"checkpoint-{step}")
    overrides = [f"watch.folder={watched}", "watch.until=2", *FEW]
    assert run(tmp_path / "whole", *overrides) == 0
    attribute = watching.load_entry

    def killed(entry: str, *arguments: Any) -> DePass:
        if entry.endswith("-2"):
            raise KeyboardInterrupt
        return attribute(entry, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(watching, "load_entry", killed)
        assert run(tmp_path / "run", *overrides) == 130
    assert history(tmp_path / "run")["steps"] == [0, 1]
    loaded: list[str] = []
    monkeypatch.setattr(
        watching, "load_entry", lambda entry, *rest: loaded.append(entry) or attribute(entry, *rest)
    )
    assert run(tmp_path / "run", *overrides) == 0
    assert loaded == [str(watched / "checkpoint-2")]
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_which_folders_and_files_are_checkpoints(tmp_path: Path) -> None:
    names = {
        "checkpoint-120": 120,
        "epoch=1-step=240.ckpt": 240,
        "global_step7": 7,
        "last.ckpt": -1,
        "v2.1.pt": 1,
    }
    assert {name: step_of(Path(name)) for name in names} == names
    for name in ("checkpoint-120", "a/checkpoint-3", "final"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "checkpoint-120/optimizer.pt").write_bytes(b"1")
    (tmp_path / "step=4.ckpt").write_bytes(b"1")
    found = {str(path.relative_to(tmp_path)) for path in checkpoints(tmp_path)}
    assert found == {"checkpoint-120", "a/checkpoint-3", "step=4.ckpt"}
    assert stamp_of(tmp_path / "checkpoint-120") == ()  # its weights are not there yet
    before = stamp_of(tmp_path / "step=4.ckpt")
    (tmp_path / "step=4.ckpt").write_bytes(b"12")
    assert stamp_of(tmp_path / "step=4.ckpt") != before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("watch.folder=nowhere", "there is no folder nowhere"),
        ("target=generation", "target='generation' cannot be explained for probes"),
        ("watch.poll=0", "watch.poll"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run(tmp_path / "run", f"watch.folder={tmp_path}", *FEW, override) == 1
    output = capsys.readouterr()
    assert message in " ".join((output.out + output.err).split())
