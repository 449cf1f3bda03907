"""A small training run for the callback's tests: a user's own LightningModule around a random model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "Mary", "John", "gave", "a", "drink", "to", "store", "went", "the", "When", "and", "Paris"]
WORDS += ["France", "is", "capital", "of", ",", "."]
PROMPTS = (
    ("When Mary and John went to the store , John gave a drink to", " Mary"),
    ("Paris is the capital of", " France"),
    ("the capital of France is", " Paris"),
    ("Mary went to", " the"),
    ("John and Mary gave a drink to the", " store"),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word, and a space before each."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    words.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def vocabulary() -> list[str]:
    return [WORDS[0], *("▁" + word for word in WORDS[1:])]


def language_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return a random model whose training is random, too: it drops out attention."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "attention_dropout": 0.2,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


class Inside(torch.nn.Module):
    def __init__(self, lm: LlamaForCausalLM) -> None:
        super().__init__()
        self.lm = lm


class OwnModule(pl.LightningModule):
    """A user's module: the language model somewhere inside, and the tokenizer as an attribute."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.inside = Inside(language_model(**changes))
        self.tokenizer = tokenizer()
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.inside.lm(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.inside.lm(input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(batches: int = 8, seed: int = 0) -> DataLoader:
    ids = torch.randint(1, len(WORDS), (batches * 2, 6), generator=torch.Generator().manual_seed(seed))
    return DataLoader(list(ids), batch_size=2)  # type: ignore[arg-type]


def trainer(folder: Path, callbacks: Sequence[Callback] = (), **options: Any) -> pl.Trainer:
    """Return a quiet trainer on the CPU: 6 steps, with a validation after each second."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def fit(trainer: pl.Trainer, module: pl.LightningModule, batches: int = 8, **options: Any) -> None:
    """Train on epochs of so many batches."""
    pl.seed_everything(1, verbose=False)
    trainer.fit(module, loader(batches), loader(1, seed=9), **options)
