"""`analyze.py compare=[...]`: several models on the same prompts, or finished runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from depass_lightning import DePass
from depass_lightning.commands.compare import labelled, load_entry
from depass_lightning.errors import DePassError
from depass_lightning.models.checkpoint import load_checkpoint
from depass_lightning.storage import read_attributions, read_rows
from tests.commands.test_analyze import run
from tests.commands.test_timeline import data_of

FEW = ("task=known", "task.size=4", "faithfulness=none", "report.figures=0")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model with other weights: as a folder, and as a checkpoint of a training of it."""
    depass, folder = DePass.from_pretrained("tiny"), tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in depass.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    depass.model.save_pretrained(folder / "moved")  # type: ignore[operator]
    assert depass.tokenizer is not None
    depass.tokenizer.save_pretrained(folder / "moved")
    state = {f"net.lm.{name}": value for name, value in depass.model.state_dict().items()}
    torch.save({"state_dict": state | {"net.scale": torch.ones(1)}}, folder / "moved.ckpt")
    return {"folder": folder / "moved", "checkpoint": folder / "moved.ckpt"}


def test_models_are_compared_on_the_same_prompts(
    tmp_path: Path, changed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = f"compare=[tiny,{changed['folder']},{changed['checkpoint']}]"
    assert run(tmp_path, models, *FEW) == 0
    assert re.search(r"\n tiny +100% ", capsys.readouterr().out)
    first, second, third = json.loads((tmp_path / "compare.json").read_text())["models"]
    assert [own["model"] for own in (first, second, third)] == ["tiny", "moved", "moved.ckpt"]
    assert second["from"] == str(changed["folder"])
    assert first["cosine"] == pytest.approx(1)
    assert second["cosine"] < 0.9999
    assert {**second, "model": "", "from": "", "seconds": 0} == pytest.approx(
        {**third, "model": "", "from": "", "seconds": 0}
    )
    prompts = data_of((tmp_path / "compare.html").read_text(encoding="utf-8"))["prompts"]
    changes = [prompt["change"] for prompt in prompts]
    assert changes == sorted(changes, reverse=True)
    first_id = read_rows(tmp_path / "tiny" / "attributions")[0]["id"]
    prompt = next(prompt for prompt in prompts if prompt["id"] == first_id)
    assert [row["label"] for row in prompt["rows"]] == ["tiny", "moved", "moved.ckpt"]
    before, after = (read_attributions(tmp_path / label / "attributions")[0] for label in ("tiny", "moved"))
    view = prompt["rows"][1]["views"]["tokens"]
    assert view["scores"] == pytest.approx(after.scores.tolist(), rel=1e-3, abs=1e-4)
    assert view["change"] == pytest.approx((after.scores - before.scores).tolist(), rel=1e-3, abs=1e-4)


def test_finished_runs_are_compared_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rule in ("half", "softmax"):
        assert run(tmp_path / rule, f"rule={rule}", *FEW) == 0
    assert run(tmp_path / "heads", "source=modules", *FEW) == 0
    monkeypatch.setattr(DePass, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    half, softmax, heads = (tmp_path / name for name in ("half", "softmax", "heads"))
    (tmp_path / "both").mkdir()
    assert run(tmp_path / "both", f"compare=[{half},{softmax}]", "report.prompts=2") == 0
    assert re.search(r"\n softmax +100% ", capsys.readouterr().out)
    page = (tmp_path / "both" / "compare.html").read_text(encoding="utf-8")
    assert "What changed from half to softmax" in page
    assert "the 2 of 4 prompts that changed most" in page
    assert len(data_of(page)["prompts"]) == 2
    rows = json.loads((tmp_path / "both" / "compare.json").read_text())["models"]
    pairs = list(zip(*(read_attributions(run / "attributions") for run in (half, softmax)), strict=True))
    cosines = [before.compare(after).cosine for before, after in pairs]
    assert rows[1]["cosine"] == pytest.approx(sum(cosines) / 4)
    assert rows[1]["mean_value"] == pytest.approx(sum(after.value for _, after in pairs) / 4)
    capsys.readouterr()
    for second, message in (
        (heads, "scores of tokens cannot be compared with scores of modules"),
        ("tiny", "give models alone, or folders of finished runs alone"),
    ):
        assert run(tmp_path / "both", f"compare=[{half},{second}]") == 1
        assert message in capsys.readouterr().err
    (half / "summary.json").unlink()
    assert run(tmp_path / "both", f"compare=[{half},{softmax}]") == 1
    assert "it is unfinished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("compare=[tiny]", "two different models or more"),
        ("compare=[tiny,tiny]", "two different models or more"),
        ("compare=[tiny,missing.ckpt]", "no checkpoint at missing.ckpt"),
        ("timeline=nowhere", "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    assert run(tmp_path, given, *FEW) == 1
    assert said in capsys.readouterr().err


def test_one_process_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "compare=[tiny,other]", "trainer.devices=2", *FEW) == 1
    assert "runs on one process" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(DePassError, match="does not hold the weights of LlamaForCausalLM"):
        load_checkpoint(DePass.from_pretrained("tiny").model, str(tmp_path / "other.ckpt"))


def test_labels_are_distinct_and_fit_for_folders() -> None:
    assert labelled(["a/model", "b/model", "org/name@step10"]) == ["1-model", "2-model", "name@step10"]


ADAPTER = "adapter_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: (folder / ADAPTER).write_bytes(b"\x00" * 20), f"{ADAPTER} is cut or damaged"),
    "no weights": (lambda folder: save_file({}, folder / ADAPTER), "missing adapter keys"),
    "no settings": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_named(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    depass = DePass.from_pretrained("tiny")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(depass.model, settings).save_pretrained(tmp_path)
    change, said = BROKEN[kind]
    change(tmp_path)
    config = OmegaConf.create({"compute_dtype": None})
    with pytest.raises(DePassError, match=f"the adapter {tmp_path} cannot be loaded: .*{said}"):
        load_entry(str(tmp_path), config, lambda _: DePass.from_pretrained("tiny"))
