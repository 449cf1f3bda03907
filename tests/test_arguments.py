"""Arguments of a wrong type: each an error that names the argument, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from depass_lightning import DePass, DePassError, Tokens

PROMPT = "The capital of Norway is"
COMMON: dict[str, list[Any]] = {
    "prompt": [3, 1.5, {"a": 1}, b"x"],
    "source": [3, Tokens],
    "rule": [3, None, ["max"]],
    "temperature": ["warm", None, True, [0.1]],
    "bias": [3, True, None],
    "batch_size": ["big", 1.5, None, True, 0, -1],
    "input_ids": ["x", 3, 1.5],
    "attention_mask": ["x", 3],
}
CHOICES: dict[str, list[Any]] = {"compat": [3, True], "engine": [3, None], "path": [3, None]}
WRONG: dict[str, dict[str, list[Any]]] = {
    "attribute": COMMON | CHOICES,
    "estimate": COMMON | CHOICES,
    "decompose": COMMON | {"compat": [3], "to_layer": [1.5, "last", [1], True]},
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
