"""Write a trained model in Hugging Face's format."""

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
        model: the model; it is not changed.
        tokenizer: its tokenizer.
        folder: created if missing; files of the same names are replaced.
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
        path.chmod(0o644)  # they are written readable by their owner only
    return folder
