"""Broken folders of models, by the table: each is refused by an error with the reason."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from depass_lightning import DePass, DePassError
from depass_lightning.models.load import load_model

Change = Callable[[Path], object]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 536223056\n"
CONFIG, WEIGHTS, TOKENS, BINARY = "config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin"
SETTINGS, GENERATION, INDEX = (
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
)


def written(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def cut(name: str, count: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def instead(old: str, name: str, content: str | bytes) -> Change:
    return lambda folder: (without(old)(folder), written(name, content)(folder))


def a_folder(name: str) -> Change:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def having(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def having_model(**values: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENS).read_text())
        having(TOKENS, model=content["model"] | values)(folder)

    return change


def index(content: Any) -> Change:
    return instead(WEIGHTS, INDEX, content if isinstance(content, str) else json.dumps(content))


def weights(**changes: Any) -> Change:
    """Change weights, dots in their names written as double underscores."""

    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        for name, value in changes.items():
            key = name.replace("__", ".")
            if value is None:
                del held[key]
            else:
                held[key] = value
        save_file(held, folder / WEIGHTS, {"format": "pt"})

    return change


def foreign_pickle() -> bytes:
    class Foreign:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("it was run",)

    buffer = io.BytesIO()
    torch.save({"a": Foreign()}, buffer)
    return buffer.getvalue()


def adapter(**values: Any) -> Change:
    return lambda folder: (
        [path.unlink() for path in folder.iterdir()],
        written("adapter_config.json", json.dumps(values))(folder),
    )


FOLDERS: list[tuple[Change, str]] = [
    *((cut(name, 30), f"{name} is cut or damaged") for name in (CONFIG, TOKENS, SETTINGS)),
    *((written(name, ""), f"{name} is empty") for name in (CONFIG, TOKENS, SETTINGS, WEIGHTS)),
    *((written(name, POINTER), f"{name} is a Git LFS pointer") for name in (CONFIG, TOKENS, WEIGHTS)),
    *((written(name, "[]"), f"{name} holds a list") for name in (CONFIG, TOKENS, SETTINGS, GENERATION)),
    *((written(name, "3"), f"{name} holds a int") for name in (CONFIG, TOKENS, SETTINGS, GENERATION)),
    *((written(name, "[" * 100_000), f"{name} is cut or damaged") for name in (CONFIG, TOKENS, SETTINGS)),
    (written(CONFIG, b'{"a": "\xff\xfe"}'), "config.json is cut or damaged"),
    (written(CONFIG, "{}"), "model_type"),
    (written(TOKENS, "{}"), "cannot be loaded"),
    (without(CONFIG), "there is no config.json"),
    (a_folder(CONFIG), "there is no config.json"),
    (without(TOKENS, SETTINGS), "there is no tokenizer"),
    (without(WEIGHTS), "there are no weights"),
    (a_folder(WEIGHTS), "there are no weights"),
    (without(CONFIG, TOKENS, SETTINGS, WEIGHTS, GENERATION), "is empty"),
    (cut(WEIGHTS, 2000), "model.safetensors is cut or damaged"),
    (written(WEIGHTS, "<html>not found</html>"), "model.safetensors is cut or damaged"),
    (written(WEIGHTS, b"\xff" * 64), "model.safetensors is cut or damaged"),
    (having(CONFIG, intermediate_size=40), r"down_proj.weight is \[64, 128\], not \[64, 40\]"),
    (having(CONFIG, vocab_size=10), r"embed_tokens.weight is \[514, 64\], not \[10, 64\]"),
    (having(CONFIG, hidden_size=32), r"embed_tokens.weight is \[514, 64\], not \[514, 32\]"),
    (having(CONFIG, num_key_value_heads=2), r"k_proj.weight is \[64, 64\], not \[32, 64\]"),
    (having(CONFIG, num_hidden_layers=5), r"it has no model\.layers\.3.*and 15 more"),
    (having(CONFIG, num_hidden_layers=2), r"does not have: model\.layers\.2"),
    (having(CONFIG, num_hidden_layers=0), r"does not have: model\.layers\.0"),
    (having(CONFIG, num_hidden_layers=-1), r"does not have: model\.layers\.0"),
    (having(CONFIG, num_hidden_layers="three"), "num_hidden_layers"),
    (having(CONFIG, num_hidden_layers=1.5), "num_hidden_layers"),
    (having(CONFIG, num_hidden_layers=None), "num_hidden_layers"),
    (having(CONFIG, num_attention_heads=0), "cannot be loaded"),
    (having(CONFIG, num_attention_heads=3), "number of attention heads|num_attention_heads"),
    (having(CONFIG, hidden_size=-4), "negative dimension"),
    (having(CONFIG, hidden_size="big"), "hidden_size"),
    (having(CONFIG, vocab_size=-1), "cannot be loaded"),
    (having(CONFIG, model_type="nonsense"), "nonsense"),
    (having(CONFIG, model_type=7), "model type"),
    (having(CONFIG, model_type="gpt2"), r"does not hold the weights of GPT2LMHeadModel"),
    (having(CONFIG, hidden_act="nonsense"), "nonsense"),
    (having(CONFIG, rms_norm_eps="x"), "rms_norm_eps"),
    (having(CONFIG, rope_parameters={"rope_type": "bad"}), "bad"),
    (having(CONFIG, rope_parameters={"rope_theta": "x", "rope_type": "default"}), "cannot be loaded"),
    (having(CONFIG, dtype="float99"), "float99"),
    (having(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ|gptq|optimum"),
    (having(CONFIG, quantization_config="x"), "cannot be loaded"),
    (having(CONFIG, tie_word_embeddings=False), r"it has no lm_head\.weight"),
    (having(CONFIG, attention_bias=True), r"it has no .*k_proj\.bias"),
    (weights(model__norm__weight=None), r"it has no model\.norm\.weight"),
    (weights(model__layers__0__mlp__up_proj__bias=torch.ones(128)), r"does not have: .*up_proj\.bias"),
    (weights(lm_head__bias=torch.ones(514)), r"does not have: lm_head\.bias"),
    (index({"weight_map": {"a": "model-00001-of-00002.safetensors"}}), "names model-00001-of-00002"),
    (index('{"metadata'), f"{INDEX} is cut or damaged"),
    (index([]), f"{INDEX} holds a list"),
    (index({}), f"{INDEX} has no weight_map"),
    (index({"weight_map": {}}), f"{INDEX} has no weight_map"),
    (index({"weight_map": {"a": None}}), f"{INDEX} has no weight_map"),
    (index({"weight_map": {"a": "../../../etc/passwd"}}), "cannot be loaded"),
    (instead(WEIGHTS, BINARY, ""), f"{BINARY} is empty"),
    (instead(WEIGHTS, BINARY, POINTER), f"{BINARY} is a Git LFS pointer"),
    (instead(WEIGHTS, BINARY, "junk" * 100), f"{BINARY} is cut or damaged"),
    (instead(WEIGHTS, BINARY, b"PK\x03\x04" + b"junk" * 100), f"{BINARY} is cut or damaged"),
    (instead(WEIGHTS, BINARY, foreign_pickle()), "Weights only load failed"),
    (having(SETTINGS, tokenizer_class=3), "cannot be loaded"),
    (having(SETTINGS, bos_token=7), "bos_token"),
    (having(SETTINGS, added_tokens_decoder="x"), "cannot be loaded"),
    (having(SETTINGS, model_max_length="x"), "cannot be loaded"),
    (having(SETTINGS, padding_side="up"), "up"),
    (having(SETTINGS, extra_special_tokens=3), "extra_special_tokens"),
    (having_model(vocab={}), "Missing"),
    (having_model(type="Nope"), "cannot be loaded"),
    (adapter(peft_type="LORA", base_model_name_or_path="base"), "holds an adapter, not a model"),
    (adapter(), "holds an adapter, not a model"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, saved."""
    model, tokenizer = load_model("tiny")
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", range(len(FOLDERS)))
def test_a_broken_folder_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: int
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    change, said = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(DePassError, match=said):
        load_model(str(folder))
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        without(SETTINGS),
        written(GENERATION, ""),
        weights(v_head__summary__weight=torch.ones(1, 64)),
        weights(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)),
    ],
)
def test_what_changes_no_logit_is_no_fault(whole: Path, tmp_path: Path, change: Change) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    value = DePass.from_pretrained(str(folder)).attribute("The capital of Norway is", " Oslo").value
    assert value == pytest.approx(
        DePass.from_pretrained("tiny").attribute("The capital of Norway is", " Oslo").value
    )


def test_a_file_of_weights_is_no_model(whole: Path) -> None:
    with pytest.raises(DePassError, match="is a file; pass the folder that it is in"):
        load_model(str(whole / WEIGHTS))
