"""Adapters and compiled models: found, attributed, left alone, and resumed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from depass_lightning import DePass, DePassError
from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring.discovery import find_model
from depass_lightning.storage import read_attributions
from tests.callbacks.test_callback import Witness, assert_same_trainings, history_of, watching
from tests.reference.training import PROMPTS, OwnModule, fit, language_model, tokenizer, trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "without": {},
    "softmax": {"rule": "softmax", "every_n_steps": 3},
    "taylor": {"rule": "taylor", "every_n_steps": 3, "source": ["tokens", "heads"]},
}


class Wrapped(OwnModule):
    """The language model as `peft` or `torch.compile` returns it."""

    def __init__(self, kind: str, dropout: float = 0.3) -> None:
        super().__init__()
        model: Any = language_model(attention_dropout=dropout)
        if kind == "lora":
            peft = pytest.importorskip("peft")
            torch.manual_seed(5)
            config = peft.LoraConfig(
                r=2, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "up_proj"]
            )
            model = peft.get_peft_model(model, config)
            model.base_model.model.model.embed_tokens.eval()  # a part that its owner keeps in evaluation
        elif kind == "compiled":
            model = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
        self.inside.lm = model


# Lightning warns of the part in evaluation mode
pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module")

KINDS = ("lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("compiled", "compiled in place")))


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


def train(folder: Path, kind: str, callbacks: Sequence[Callback], **options: Any) -> pl.Trainer:
    folder.mkdir(exist_ok=True)
    run = trainer(folder, callbacks, **options)
    fit(run, Wrapped(kind))
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical(tmp_path: Path, kind: str) -> None:
    for name, settings in SETTINGS.items():
        train(tmp_path / name, kind, watching(tmp_path / name, settings))
    assert_same_trainings(tmp_path)
    history = history_of(tmp_path / "softmax")
    assert history["steps"] == [0, 2, 3, 4, 6]
    assert history["curves"]["failed"] == [0.0] * 5
    assert max(history["curves"]["completeness"]) < 1e-5
    assert history["curves"]["value"][0] != history["curves"]["value"][-1]


def test_another_librarys_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    """With which every probe of every run would fail."""
    module = OwnModule()
    module.tokenizer = module.tokenizer.backend_tokenizer  # type: ignore[assignment]
    with pytest.raises(DePassError, match=r"is a tokenizers\.Tokenizer.*PreTrainedTokenizerFast"):
        fit(trainer(tmp_path, [DePassCallback(list(PROMPTS))]), module)


def test_two_callbacks_need_probe_sets_of_different_names(tmp_path: Path) -> None:
    """The same probes under two rules: said by name, and each keeps a history where the names differ."""
    one = DePassCallback({"probes": PROMPTS[:1]}, folder=tmp_path)
    with pytest.raises(DePassError, match=r"a probe set called 'probes'.*probes={'probes_2': ...}"):
        fit(trainer(tmp_path, [one, DePassCallback({"probes": PROMPTS[:1]}, rule="taylor")]), OwnModule())
    other = DePassCallback({"probes_2": PROMPTS[:1]}, rule="taylor", folder=tmp_path)
    fit(trainer(tmp_path, [one, other], max_steps=1), OwnModule())
    assert one.history["probes"].steps == other.history["probes_2"].steps


def test_adapters_count_in_what_is_attributed(tmp_path: Path) -> None:
    """Against the model with its trained adapters merged into the weights."""
    callback = DePassCallback(list(PROMPTS))
    run = train(tmp_path, "lora", [callback])
    module: Any = run.lightning_module
    model = find_model(module)
    assert model is module.inside.lm.base_model.model
    merged = module.inside.lm.merge_and_unload().eval()
    prompts, targets = zip(*PROMPTS, strict=True)
    wanted = DePass(merged, tokenizer()).attribute(list(prompts), list(targets), rule="half")
    found = read_attributions(tmp_path / "depass/probes/step-000006.parquet")
    for own, other in zip(found, wanted, strict=True):
        assert own.scores.tolist() == pytest.approx(other.scores.tolist(), rel=1e-3, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_run_with_adapters_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    class Kill(Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("killed")

    def callbacks(folder: Path) -> list[Callback]:
        kept = ModelCheckpoint(folder / "kept", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        return [DePassCallback(list(PROMPTS)), kept, Witness(folder)]

    options = {"max_steps": 8, "val_check_interval": 3, "enable_checkpointing": True}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()

    def module() -> Wrapped:
        """Without dropout: Lightning's checkpoints do not hold the random state."""
        return Wrapped("lora", dropout=0.0)

    fit(trainer(whole, callbacks(whole), **options), module(), 4)
    with pytest.raises(RuntimeError, match="killed"):
        fit(trainer(broken, [*callbacks(broken), Kill()], **options), module(), 4)
    fit(trainer(broken, callbacks(broken), **options), module(), 4, ckpt_path=broken / "kept/step=4.ckpt")
    assert history_of(broken)["steps"] == [0, 3, 4, 6, 8]
    assert history_of(broken) == history_of(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_validating_alone_works_on_them(tmp_path: Path, kind: str) -> None:
    callback = DePassCallback(list(PROMPTS))
    run = train(tmp_path, kind, [callback], max_steps=2)
    [reported] = run.validate(run.lightning_module, run.val_dataloaders, verbose=False)
    assert reported["depass/probes/value"] == pytest.approx(callback.history["probes"].curves["value"][-1])
    fresh = DePassCallback(list(PROMPTS))
    other = trainer(tmp_path / "fresh", [fresh])
    [reported] = other.validate(run.lightning_module, run.val_dataloaders, verbose=False)
    assert reported["depass/probes/value"] == pytest.approx(callback.history["probes"].curves["value"][-1])
    assert fresh.history == {}
