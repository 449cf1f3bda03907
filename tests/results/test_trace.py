"""An answer's scores, passed on through the model's own words: by hand, and on the bundled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from depass_lightning import Attribution, DePass, DePassError, Generation, Token
from depass_lightning.results.component import Component, constant

pytestmark = pytest.mark.covering

TOKENS = ["a", "b", "c", "d", "e"]  # a prompt of two, and three generated tokens
ROWS = [
    [3.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    [-1.0, 0.0, 4.0, 0.0, 0.0, 1.0],
    [2.0, 0.0, -3.0, 5.0, 0.0, 0.0],
]
TEXT = "When Mary and John went to the store, John gave a drink to"


def generation_of(rows: list[list[float]], **changes: Any) -> Generation:
    components = [Component("token", text, index=i, span=(i, i + 1)) for i, text in enumerate(TOKENS)]
    common: dict[str, Any] = {
        "components": [*components, constant("bias")],
        "text": "abcde",
        "tokens": TOKENS,
        "token_ids": [0, 1, 2, 3, 4],
        "offsets": None,
        "source": "tokens",
        "rule": "half",
        "layer": 0,
        "prediction": "?",
    }
    return Generation(
        [
            Attribution(
                scores=torch.tensor(row),
                value=sum(row),
                target=TOKENS[2 + i],
                position=1 + i,
                **common,
                **changes,
            )
            for i, row in enumerate(rows)
        ]
    )


def test_every_hop_by_hand() -> None:
    generation = generation_of(ROWS)
    answer = slice(2, None)
    # The last token rests on a (2), opposes c (-3), rests on d (5). d rests on c (4/5) and constants (1/5).
    hops = [
        ([2, 0, -3, 5, 0, 0], []),
        ([2 - 3 * 3 / 4, -3 / 4, 4, 0, 0, 1], [8]),
        ([2 - 9 / 4 + 3, -3 / 4 + 1, 0, 0, 0, 1], [8, 4]),
    ]
    for count, (scores, moved) in enumerate(hops):
        traced = generation.trace(answer, hops=count)
        assert traced.scores.tolist() == pytest.approx(scores)
        assert traced.metadata["hops"] == pytest.approx(moved)
        assert traced.value == 4
        assert traced.completeness < 1e-6
    whole = generation.trace(answer)
    assert whole.scores.tolist() == pytest.approx(hops[-1][0])
    assert whole.metadata["hops"] == pytest.approx([8, 4])
    assert whole.target == "e"


def test_all_tokens_are_the_answer_by_default() -> None:
    traced = generation_of(ROWS, remainder=-0.5).trace()
    assert traced.value == 12
    assert traced.scores[2:5].tolist() == [0, 0, 0]
    assert float(traced.scores.sum()) == pytest.approx(12)
    assert traced.target == "c, d, e"
    assert traced.remainder == -1.5


def test_a_token_that_nothing_supports_keeps_its_score() -> None:
    traced = generation_of([[-1.0, -2.0, 0, 0, 0, 0], *ROWS[1:]]).trace(slice(1, 2))
    assert traced.scores.tolist() == [-1, 0, 4, 0, 0, 1]
    assert traced.metadata["hops"] == []


@pytest.mark.parametrize("rule", ["softmax", "half"])
@pytest.mark.parametrize("target", ["logit", "logprob"])
def test_a_real_generation_is_traced_to_its_prompt(rule: Any, target: Any) -> None:
    depass = DePass.from_pretrained("tiny")
    generation = depass.attribute_generation(TEXT, max_new_tokens=6, rule=rule, target=target)
    direct, traced = generation.trace(slice(-2, None), hops=0), generation.trace(slice(-2, None))
    start = generation.first_generated
    torch.testing.assert_close(direct.scores, generation.scores[-2:].sum(0))
    assert not traced.scores[start:].any()
    assert traced.value == direct.value
    assert float(traced.scores.sum()) == pytest.approx(traced.value, abs=1e-3)
    assert len(traced.metadata["hops"]) >= 2
    assert traced.words().completeness < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": slice(5, None)}, r"tokens=slice\(5, None, None\) selects none of the 3 generated tokens"),
        ({"hops": -1}, "hops is -1; it must be a whole number of at least 0"),
        ({"hops": True}, "hops is True"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DePassError, match=message):
        generation_of(ROWS).trace(**arguments)


def test_an_answer_of_one_token_equals_its_target() -> None:
    depass = DePass.from_pretrained("tiny")
    generation = depass.attribute_generation(TEXT, max_new_tokens=3)
    ids = generation[0].token_ids
    (alone,) = depass.attribute(input_ids=[ids], target=Token(ids[-1], position=-2))
    torch.testing.assert_close(
        generation.trace(slice(-1, None), hops=0).scores, alone.scores, rtol=1e-4, atol=1e-5
    )
