"""Write a trained model as Hugging Face writes them."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model and its tokenizer to a folder, which `DePass.from_pretrained` then loads.

    Args:
        model: the model; it stays as it is.
        tokenizer: its tokenizer.
        folder: made if missing; files of the same names are replaced.
        dtype: the precision of the written weights; None keeps the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if dtype not in (None, model.dtype):
        model = copy.deepcopy(model)
        nn.Module.to(model, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # they are written for the owner alone
    return folder
