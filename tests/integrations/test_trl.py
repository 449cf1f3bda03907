"""`DePassTrainerCallback` in TRL's trainers; their package stays out of the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from depass_lightning.integrations.transformers import DePassTrainerCallback
from tests.callbacks.test_callback import same
from tests.reference.training import PROMPTS, language_model, tokenizer

trl: Any = pytest.importorskip("trl", reason="run by `make trl`")

# TRL sets arguments that transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

ROWS = [
    {"prompt": "Paris is the capital of", "chosen": " France", "rejected": " Mary"},
    {"prompt": "Mary and John went to the", "chosen": " store", "rejected": " drink"},
] * 4


def trainer(kind: str, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    language_model().save_pretrained(folder / "model")  # DPO's trainer loads its reference model by name
    model, words = type(language_model()).from_pretrained(folder / "model"), tokenizer()
    words.pad_token = words.eos_token = "<s>"
    names = {"sft": ("SFTConfig", "SFTTrainer"), "dpo": ("DPOConfig", "DPOTrainer")}
    config, trained = (getattr(trl, name) for name in names[kind])
    rows = ROWS if kind == "dpo" else [{"text": row["prompt"] + row["chosen"]} for row in ROWS]
    arguments = config(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-2,
        seed=3,
        **options,
    )
    return trained(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_is_bit_identical(kind: str, tmp_path: Path) -> None:
    """DPO's reference model is not the one that is attributed."""
    without = trainer(kind, tmp_path / "without", [])
    without.train()
    callback = DePassTrainerCallback(list(PROMPTS), every_n_steps=2, faithfulness=0, on_error="raise")
    with_probes = trainer(kind, tmp_path / "with", [callback])
    with_probes.train()
    assert same(without.model.state_dict(), with_probes.model.state_dict())
    losses = [
        [row["loss"] for row in run.state.log_history if "loss" in row] for run in (without, with_probes)
    ]
    assert losses[0] == losses[1]
    history = callback.history["probes"]
    assert history.steps == [0, 2, 4]
    assert (tmp_path / "with/depass/probes/step-000004.html").is_file()
    key = "depass/probes/value"
    values = [row[key] for row in with_probes.state.log_history if key in row]
    assert len(values) == 3
    assert values[0] != values[-1]
    assert torch.tensor(values).isfinite().all()
