"""Arguments of a wrong type: each an error that names the argument, before anything is computed."""

# Wrong types are what is tested.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from depass_lightning import (
    Components,
    Contrast,
    DePass,
    DePassError,
    Direction,
    Heads,
    Module,
    Neurons,
    ProbeLogit,
    Spans,
    Subspace,
    Token,
    Tokens,
)
from depass_lightning.sources import Source

PROMPT = "The capital of Norway is"
COMMON: dict[str, list[Any]] = {
    "prompt": [3, 1.5, {"a": 1}, b"x"],
    "source": [3, Tokens, [Tokens()]],
    "rule": [3, None, ["max"]],
    "temperature": ["warm", None, True, [0.1]],
    "bias": [3, True, None],
    "batch_size": ["big", 1.5, None, True, 0, -1],
    "input_ids": ["x", 3, 1.5],
    "attention_mask": ["x", 3],
}
CHOICES: dict[str, list[Any]] = {"compat": [3, True], "engine": [3, None], "attention_path": [3, None]}
WRONG: dict[str, dict[str, list[Any]]] = {
    "attribute": COMMON | CHOICES | {"progress": ["x", 3, None]},
    "estimate": COMMON | CHOICES,
    "decompose": COMMON | {"compat": [3], "to_layer": [1.5, "last", "all", [1], True]},
    "attribute_generation": {
        "prompt": [3, 1.5],
        "source": [3, Tokens],
        "rule": [3],
        "rule_temperature": ["warm", None],
        "max_new_tokens": ["x", 1.5, None, 0],
        "input_ids": [3],
    },
    "from_pretrained": {
        "name": [3, None],
        "revision": [3],
        "dtype": [3, [1], None],
        "compute_dtype": [3, [1]],
        "memory_budget": ["big", 1.5, 0],
        "max_positions": ["x", 1.5, 0],
        "device": [3.5, [1]],
        "trust_remote_code": ["no", None],
    },
}
CASES = [(call, name, value) for call, own in WRONG.items() for name, some in own.items() for value in some]


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.mark.parametrize(("call", "name", "value"), CASES)
def test_a_wrong_type_is_named(depass: DePass, call: str, name: str, value: object) -> None:
    given = {} if call == "from_pretrained" or name == "input_ids" else {"prompt": PROMPT}
    with pytest.raises(DePassError, match=rf"^{name} is .*; it must be "):
        getattr(depass, call)(**{**given, name: value})


PARTS: list[tuple[Callable[[], Any], str]] = [
    *((lambda layer=layer: Tokens(layer), "layer is") for layer in ("x", 1.5, None, True)),
    *((lambda layer=layer: Heads(layer), "layer is") for layer in ("x", 1.5, [1], True)),
    *((lambda layer=layer: Neurons(layer), "layer is") for layer in ("x", 1.5, True)),
    *((lambda layer=layer: Module("mlp", layer), "layer is") for layer in ("x", 1.5)),
    *((lambda layer=layer: Subspace(layer, torch.ones(64)), "layer is") for layer in ("x", 1.5, None)),
    *((lambda layer=layer: Components(layer, torch.ones(1, 6, 64)), "layer is") for layer in ("x", 1.5)),
    *((lambda layer=layer: Direction(torch.ones(64), layer), "layer is") for layer in ("x", 1.5)),
    *((lambda top=top: Neurons(0, top=top), "top is") for top in ("x", 1.5, 0, True)),
    *((lambda by=by: Spans(by), "by is") for by in (3, None, [3], [(1,)], [("a", "b")], [(1.5, 2)])),
    *((lambda kind=kind: Module(kind), "Module") for kind in (3, "x", None)),
    *((lambda basis=basis: Subspace(1, basis), "a basis is") for basis in ("x", None, object())),
    *((lambda held=held: Components(1, held), "tensor is a") for held in ("x", None, 3, [3])),
    *((lambda vector=vector: Direction(vector), "Direction") for vector in ("x", None, 3, ["a"])),
    *((lambda probe=probe: ProbeLogit(probe), "ProbeLogit") for probe in (3, None, "x")),
    *((lambda place=place: Token(3, place), "position") for place in ("x", 1.5, None, 99)),
    *((lambda token=token: Token(token), "target") for token in (1.5, b"x", [], object())),
    *((lambda foil=foil: Contrast(3, foil), "target") for foil in (1.5, None, [])),
]


@pytest.mark.parametrize("case", range(len(PARTS)))
def test_a_wrong_part_of_a_source_or_target_is_named(depass: DePass, case: int) -> None:
    make, told = PARTS[case]

    def ask() -> None:
        part = make()
        asked: dict[str, Any] = {"source": part} if isinstance(part, Source) else {"target": part}
        depass.attribute(PROMPT, **asked)

    with pytest.raises(DePassError, match=told):
        ask()


def test_a_positional_argument_is_named(depass: DePass) -> None:
    with pytest.raises(DePassError, match=r"^prompt is 3, a int"):
        depass.attribute(3)  # type: ignore[call-overload]
    with pytest.raises(DePassError, match=r"^tokenizer is 3, a int"):
        DePass(depass.model, 3)  # type: ignore[arg-type]


def test_numbers_of_other_libraries_fit(depass: DePass) -> None:
    numpy = pytest.importorskip("numpy")
    found = depass.attribute([PROMPT], batch_size=numpy.int64(2), temperature=numpy.float32(0.1))
    assert torch.equal(
        found[0].scores, depass.attribute(PROMPT, temperature=float(numpy.float32(0.1))).scores
    )
