"""What loads and what does not: tied and untied heads, left-over weights, GGUF files, foreign code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from depass_lightning import DePass, DePassError
from depass_lightning.models.load import TINY, load_model
from depass_lightning.models.weights import inside

WEIGHTS = "model.safetensors"
PROMPT = "The capital of Norway is"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model whose output embedding has a weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model, tokenizer = load_model("tiny")
    config = LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": False})
    other = LlamaForCausalLM(config)
    weights = model.state_dict()
    other.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    other.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 536223056\n"
LAYER = "model.layers.1.self_attn.q_proj.weight"


def test_a_folder_without_its_head_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(untied, tmp_path / "model")
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(DePassError, match=r"it has no lm_head\.weight"):
        load_model(str(folder))


def test_a_whole_folder_is_loaded(untied: Path) -> None:
    right = DePass.from_pretrained("tiny").attribute(PROMPT, " Oslo")
    assert DePass.from_pretrained(str(untied)).attribute(PROMPT, " Oslo").value == pytest.approx(right.value)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    weights = load_file(TINY / WEIGHTS)
    assert "lm_head.weight" not in weights
    DePass.from_pretrained(str(shutil.copytree(TINY, tmp_path / "model")))


def test_saved_constants_and_other_heads_may_be_left_over() -> None:
    model, _ = load_model("tiny")
    harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision.patch.weight", "score.weight"]
    assert inside(model, [*harmless, LAYER[:-6] + "bias"]) == [LAYER[:-6] + "bias"]


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    for name, content, told in (
        ("text.gguf", b"GGML" * 20, "no GGUF file, or cut"),
        ("pointer.gguf", POINTER, "Git LFS pointer"),
        ("empty.gguf", b"", "is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DePassError, match=told):
            DePass.from_pretrained(str(tmp_path / name))


FOREIGN = """
import os, pathlib
pathlib.Path(os.environ["DEPASS_TEST_MARK"]).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokens
"""


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_foreign_code_is_neither_run_nor_asked_for(
    part: str, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = shutil.copytree(untied, tmp_path / "model"), tmp_path / "run"
    monkeypatch.setenv("DEPASS_TEST_MARK", str(mark))
    (folder / "foreign.py").write_text(FOREIGN)
    if part == "model":
        classes = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
        change_config(folder, auto_map=classes, model_type="nonesuch")
    else:
        path = folder / "tokenizer_config.json"
        told = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["foreign.Tokens", None]}}
        path.write_text(json.dumps({**told, "tokenizer_class": "Tokens"}))
        change_config(folder, model_type="nonesuch")

    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(DePassError):
        DePass.from_pretrained(str(folder))
    assert not mark.exists()
    assert os.environ["DEPASS_TEST_MARK"] == str(mark)


def test_the_error_says_how_to_trust_foreign_code(untied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(untied, tmp_path / "model")
    (folder / "foreign.py").write_text(FOREIGN)
    classes = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    change_config(folder, auto_map=classes, model_type="nonesuch")
    with pytest.raises(DePassError, match="trust_remote_code=True"):
        load_model(str(folder))
