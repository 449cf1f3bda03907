"""A padded batch gives what its prompts give one by one, whatever side is padded and however it is cut."""

import pytest
import torch
from torch import Tensor

from depass_lightning import Attribution, Contrast, DePass, Token, Tokens
from depass_lightning.errors import DePassError
from tests.reference.models import ALL, ONE_OF_EACH, build, distance, padded, prompt
from tests.reference.twin import RULES, Rule

pytestmark = pytest.mark.covering

# On both sides of the 8 and 16 numbers that a processor's vector holds: narrower rows are summed otherwise.
LENGTHS = (5, 9, 1, 17, 9)
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-10}


def prompts() -> list[Tensor]:
    return [prompt(length, seed=index) for index, length in enumerate(LENGTHS)]


def assert_same(given: Attribution, expected: Attribution) -> None:
    assert distance(given.scores, expected.scores) < 1e-5
    assert given.value == pytest.approx(expected.value, rel=1e-5, abs=1e-5)
    assert given.names == expected.names
    assert given.token_ids == expected.token_ids
    assert given.positions == expected.positions
    assert given.position == expected.position
    assert given.prediction == expected.prediction
    assert given.rank == expected.rank


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.covering(6)
def test_states_of_a_padded_batch(name: str, dtype: torch.dtype) -> None:
    depass = DePass(build(name, dtype=dtype))
    rules: tuple[Rule, ...] = RULES if name in ONE_OF_EACH else ("softmax", "linear")
    for rule in rules:
        alone = [depass.decompose(input_ids=ids[None], rule=rule)[0] for ids in prompts()]
        for side in ("left", "right"):
            input_ids, attention_mask = padded(prompts(), side)
            together = depass.decompose(input_ids=input_ids, attention_mask=attention_mask, rule=rule)
            for given, expected in zip(together, alone, strict=True):
                assert given.names == expected.names
                assert given.states.shape == expected.states.shape
                assert distance(given.states, expected.states) < PRECISION[dtype]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_scores_of_a_padded_batch(name: str, side: str, rule: Rule) -> None:
    depass = DePass(build(name))
    input_ids, attention_mask = padded(prompts(), side)
    source = Tokens(layer=1)
    targets = [Token(7, position=2), Contrast(3, 9), Token(None), Contrast(11, 5, position=-3), Token(4)]
    together = depass.attribute(
        input_ids=input_ids, attention_mask=attention_mask, target=targets, source=source, rule=rule
    )
    for ids, target, given in zip(prompts(), targets, together, strict=True):
        expected = depass.attribute(input_ids=ids[None], target=target, source=source, rule=rule)[0]
        assert given.token_ids == ids.tolist()
        assert_same(given, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_the_size_of_batches_does_not_matter(batch_size: int) -> None:
    depass = DePass(build("qwen2"))
    input_ids, attention_mask = padded(prompts(), "left")
    given = depass.attribute(
        input_ids=input_ids, attention_mask=attention_mask, target=6, batch_size=batch_size
    )
    for ids, attribution in zip(prompts(), given, strict=True):
        assert_same(attribution, depass.attribute(input_ids=ids[None], target=6)[0])


def test_rows_may_be_padded_on_different_sides() -> None:
    depass = DePass(build("qwen2", dtype=torch.float64))
    ids, width = prompts(), max(LENGTHS)
    input_ids = torch.full((len(ids), width), 2)
    attention_mask = torch.zeros_like(input_ids)
    for row, one in enumerate(ids):
        start = (width - len(one)) * row // (len(ids) - 1)
        input_ids[row, start : start + len(one)] = one
        attention_mask[row, start : start + len(one)] = 1
    together = depass.decompose(input_ids=input_ids, attention_mask=attention_mask)
    for one, given in zip(ids, together, strict=True):
        assert distance(given.states, depass.decompose(input_ids=one[None])[0].states) < 1e-10


def test_what_the_padding_holds_does_not_matter() -> None:
    depass = DePass(build("llama"))
    for side in ("left", "right"):
        input_ids, attention_mask = padded(prompts(), side)
        other = input_ids.masked_fill(attention_mask == 0, 40)
        first = depass.decompose(input_ids=input_ids, attention_mask=attention_mask)
        second = depass.decompose(input_ids=other, attention_mask=attention_mask)
        for one, two in zip(first, second, strict=True):
            assert torch.equal(one.states, two.states)


def test_a_boolean_mask_and_no_mask_are_understood() -> None:
    depass = DePass(build("llama"))
    input_ids, attention_mask = padded(prompts(), "right")
    as_integers = depass.decompose(input_ids=input_ids, attention_mask=attention_mask)
    as_booleans = depass.decompose(input_ids=input_ids, attention_mask=attention_mask.bool())
    for one, two in zip(as_integers, as_booleans, strict=True):
        assert torch.equal(one.states, two.states)
    full = torch.stack([prompt(6, seed=1), prompt(6, seed=2)])
    for one, two in zip(
        depass.decompose(input_ids=full),
        depass.decompose(input_ids=full, attention_mask=torch.ones_like(full)),
        strict=True,
    ):
        assert torch.equal(one.states, two.states)


def test_a_mask_with_a_hole_is_refused() -> None:
    depass = DePass(build("llama"))
    input_ids, attention_mask = padded([prompt(8), prompt(6), prompt(8)], "left")
    attention_mask[2, 3] = 0
    for call in (depass.attribute, depass.decompose):
        with pytest.raises(DePassError, match=r"row 2 .* hole"):
            call(input_ids=input_ids, attention_mask=attention_mask)


def test_an_empty_row_is_refused() -> None:
    depass = DePass(build("llama"))
    input_ids, attention_mask = padded([prompt(8), prompt(6)], "left")
    attention_mask[1] = 0
    with pytest.raises(DePassError, match=r"1.*(empty|no token)|(empty|no token).*1"):
        depass.attribute(input_ids=input_ids, attention_mask=attention_mask)


def test_a_mask_of_another_shape_is_refused() -> None:
    depass = DePass(build("llama"))
    with pytest.raises(DePassError, match="attention_mask"):
        depass.attribute(input_ids=prompt(8)[None], attention_mask=torch.ones(1, 7, dtype=torch.long))


def test_a_position_outside_its_own_prompt_is_refused() -> None:
    depass = DePass(build("llama"))
    input_ids, attention_mask = padded([prompt(8), prompt(5)], "right")
    for position in (6, -6):
        with pytest.raises(DePassError, match=str(position)):
            depass.attribute(
                input_ids=input_ids, attention_mask=attention_mask, target=Token(4, position=position)
            )
