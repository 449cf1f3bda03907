"""Checkpoints of trainings of every kind: read without running what they name, or said what they are."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from depass_lightning import DePassError
from depass_lightning.models.checkpoint import is_checkpoint, load_checkpoint, read_weights
from depass_lightning.models.load import load_model

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def trained() -> State:
    """The bundled model's weights, each of them moved."""
    model, _ = load_model("tiny")
    torch.manual_seed(0)
    moved = {name: value + 0.1 * torch.randn_like(value) for name, value in model.named_parameters()}
    model.load_state_dict(moved, strict=False)
    return {name: value.clone() for name, value in model.state_dict().items()}


def loaded(entry: Path | str) -> State:
    model, _ = load_model("tiny")
    load_checkpoint(model, entry)
    return model.state_dict()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def within(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def untied(state: State) -> State:
    return {name: value for name, value in state.items() if name != "lm_head.weight"}


HYPER = {
    "omegaconf": OmegaConf.create({"rate": 1e-3, "layers": [1, 2], "inner": {"name": "x"}}),
    "namespace": argparse.Namespace(rate=1e-3, folder=Path("data")),
    "path": Path("data"),
}
GOOD: dict[str, Callable[[State], Any]] = {
    **{
        name: lambda state, value=value: {
            "state_dict": within("model.", state),
            "hyper_parameters": {"value": value},
            "epoch": 3,
        }
        for name, value in HYPER.items()
    },
    "bare": lambda state: state,
    "tied": untied,
    "nested": lambda state: {"model": state, "iteration": 7, "config": {"layers": 3}},
    "compiled": lambda state: {"state_dict": within("net._orig_mod.", state)},
    "compiled by block": lambda state: {
        name.replace(".layers.1.", ".layers.1._orig_mod."): value for name, value in state.items()
    },
    "wrapped": lambda state: within("module.", state),
}


@pytest.mark.parametrize("kind", GOOD)
def test_weights_are_found(kind: str, trained: State, tmp_path: Path) -> None:
    torch.save(GOOD[kind](trained), tmp_path / "last.ckpt")
    assert same(loaded(tmp_path / "last.ckpt"), trained)


def test_a_file_of_an_early_torch(trained: State, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(loaded(tmp_path / "old.pt"), trained)


def test_a_safetensors_file(trained: State, tmp_path: Path) -> None:
    save_file(untied(trained), tmp_path / "model.safetensors")
    assert same(loaded(tmp_path / "model.safetensors"), trained)


def test_two_models_are_told_apart(trained: State, tmp_path: Path) -> None:
    """A teacher and a student, a policy and its reference, weights and their average."""
    teacher = {name: value + 1 for name, value in trained.items()}
    both = within("teacher.", teacher) | within("student.net.", trained)
    torch.save({"state_dict": both}, tmp_path / "two.ckpt")
    with pytest.raises(DePassError) as raised:
        loaded(tmp_path / "two.ckpt")
    assert "'teacher.', 'student.net.'" in str(raised.value)
    assert "two.ckpt#student.net'" in str(raised.value)
    assert same(loaded(f"{tmp_path / 'two.ckpt'}#student"), trained)
    assert same(loaded(f"{tmp_path / 'two.ckpt'}#student.net"), trained)
    assert same(loaded(f"{tmp_path / 'two.ckpt'}#teacher"), teacher)
    with pytest.raises(DePassError, match=r"no part 'other'.* begin with student, teacher"):
        loaded(f"{tmp_path / 'two.ckpt'}#other")


class Mischief:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_is_run(trained: State, tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"state_dict": trained, "extra": Mischief(made)}, tmp_path / "evil.ckpt")
    with pytest.raises(DePassError, match="cannot be read safely"):
        loaded(tmp_path / "evil.ckpt")
    torch.save({"state_dict": trained, "extra": nn.Linear(2, 2)}, tmp_path / "module.ckpt")
    assert same(loaded(tmp_path / "module.ckpt"), trained)
    assert not made.exists()


def resized(state: State) -> State:
    grown = torch.cat([state["lm_head.weight"], torch.ones(3, 64)])
    return state | {"lm_head.weight": grown, "model.embed_tokens.weight": grown}


def with_adapter(state: State) -> State:
    return {name.replace("q_proj.", "q_proj.base_layer."): value for name, value in state.items()} | LORA


LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)}
BAD: dict[str, tuple[Callable[[State], Any], str]] = {
    "resized": (resized, "weights of other sizes.*embed_tokens.*were tokens added"),
    "a block too many": (
        lambda state: within("model.", state | {"model.layers.3.mlp.up_proj.weight": torch.ones(128, 64)}),
        r"does not have: model\.layers\.3.*model=",
    ),
    "a head that is not tied": (
        lambda state: state | {"lm_head.weight": state["lm_head.weight"] + 1},
        "which are one in LlamaForCausalLM",
    ),
    "an adapter": (lambda _: LORA, "holds an adapter alone; save it with peft"),
    "a model with an adapter": (with_adapter, "holds a model with an adapter"),
    "an optimiser": (
        lambda _: {"optimizer": {"state": {}}, "step": 3},
        "keys 'optimizer', 'step', not weights",
    ),
    "a list": (lambda _: [1, 2], "a list, not weights"),
    "a whole module": (lambda _: nn.Linear(2, 2), "a whole pickled object, not weights"),
    "another model": (lambda _: nn.Linear(2, 2).state_dict(), "it has no .* model="),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_model_is_named(kind: str, trained: State, tmp_path: Path) -> None:
    content, told = BAD[kind]
    torch.save(content(trained), tmp_path / "last.ckpt")
    with pytest.raises(DePassError, match=told) as raised:
        loaded(tmp_path / "last.ckpt")
    assert str(tmp_path / "last.ckpt") in str(raised.value)


def test_a_broken_file_is_named(trained: State, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-3000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    (tmp_path / "folder.ckpt").mkdir()
    save_file(untied(trained), tmp_path / "cut.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    for name, told in {
        "cut.ckpt": "cut",
        "empty.pt": "cut",
        "pointer.ckpt": "Git LFS pointer",
        "folder.ckpt": "is a folder",
        "missing.ckpt": "there is no checkpoint",
        "cut.safetensors": "cut or damaged",
    }.items():
        with pytest.raises(DePassError, match=told):
            read_weights(tmp_path / name)


def test_an_offloaded_model_is_refused(trained: State, tmp_path: Path) -> None:
    """Its weights would stay as they are."""
    torch.save(trained, tmp_path / "last.ckpt")
    model, _ = load_model("tiny")
    model.model.layers[1].to("meta")
    with pytest.raises(DePassError, match="offloaded"):
        load_checkpoint(model, tmp_path / "last.ckpt")


def test_what_names_a_checkpoint() -> None:
    assert all(map(is_checkpoint, ("a.ckpt", "b/c.pt#student", "weights.safetensors")))
    assert not any(map(is_checkpoint, ("org/model", "org/model@step1", "folder#1", "x.gguf")))
