"""Models that choose rotary frequencies by a batch's longest row: each prompt gets those of itself alone."""

from typing import Any

import pytest
import torch

from depass_lightning import Attribution, DePass, DePassError, Token
from depass_lightning.errors import DePassWarning
from depass_lightning.faithfulness import removal_curves
from depass_lightning.faithfulness.component_masking import MaskedPrompt, check_answers
from depass_lightning.linear_probes import hidden_states
from depass_lightning.methods import make_method
from tests.engine.test_untouched import must_stay_untouched
from tests.reference.models import padded, prompt
from tests.reference.zoo import build as from_zoo

ORIGINAL = 8
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
}
SHORT, LONG = prompt(6), prompt(12, seed=1)


def build(kind: str) -> Any:
    """A model that changes its frequencies after eight tokens."""
    if kind == "dynamic":
        scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        return from_zoo("llama", max_position_embeddings=ORIGINAL, rope_parameters=scaled).eval()
    config = from_zoo("phi3").config
    half = config.hidden_size // config.num_attention_heads // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [1.0 + 4 * i for i in range(half)]}
    return from_zoo(
        "phi3",
        max_position_embeddings=64,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=LONGROPE | factors,
    ).eval()


@pytest.fixture(params=["longrope", "dynamic"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def alone(model: Any, ids: torch.Tensor, position: int = -1) -> torch.Tensor:
    """The logits of a model that has read nothing before."""
    kind = "dynamic" if model.config.model_type == "llama" else "longrope"
    with torch.no_grad():
        return build(kind)(input_ids=ids[None]).logits[0, position]


def both() -> dict[str, Any]:
    ids, mask = padded([SHORT, LONG], "right")
    return {"input_ids": ids, "attention_mask": mask}


def test_a_short_prompt_in_a_batch_with_a_long_one(model: Any) -> None:
    depass = DePass(model, max_positions=64)
    for explain in (depass.attribute, make_method("occlusion", depass).attribute):
        for ids, found in zip((SHORT, LONG), explain(**both(), target=5), strict=True):
            assert found.value == pytest.approx(alone(model, ids)[5].item(), abs=1e-4)
    states = hidden_states(depass, **both())
    for row, ids in enumerate((SHORT, LONG)):
        torch.testing.assert_close(states[:, row], hidden_states(depass, input_ids=ids[None])[:, 0])
    answers = [MaskedPrompt(ids.tolist(), [5]) for ids in (SHORT, LONG)]
    for ids, found in zip((SHORT, LONG), check_answers(depass.decoder, answers), strict=True):
        assert found.probability == pytest.approx(alone(model, ids).softmax(-1)[5].item(), abs=1e-5)
    for part in depass.decompose(**both()):
        ids = SHORT if part.states.shape[1] == len(SHORT) else LONG
        own = depass.decompose(input_ids=ids[None])[0]
        torch.testing.assert_close(part.states, own.states)


def test_frequencies_do_not_depend_on_what_was_read_before_and_stay_as_they_were(model: Any) -> None:
    expected = DePass(model, max_positions=64).attribute(input_ids=SHORT[None], target=5)[0].value
    with torch.no_grad():
        model(input_ids=LONG[None])  # the caller's own pass leaves its frequencies
    middle = prompt(10)
    values = {len(ids): alone(model, ids)[5].item() for ids in (LONG, middle)}
    found = [own.clone() for own in model.buffers()]
    with must_stay_untouched(model):
        depass = DePass(model, max_positions=64)
        assert depass.attribute(input_ids=SHORT[None], target=5)[0].value == expected
        for ids in (LONG, middle):
            value = depass.attribute(input_ids=ids[None], target=5)[0].value
            assert value == pytest.approx(values[len(ids)], abs=1e-4)
    for now, before in zip(model.buffers(), found, strict=True):
        assert torch.equal(now, before)


def test_a_target_in_the_middle_is_read_in_the_whole_prompt(model: Any) -> None:
    depass = DePass(model, max_positions=64)
    expected = alone(model, LONG, 3)
    assert abs(expected[5] - alone(model, LONG[:4])[5]) > 1e-3
    alone_and_together: list[Any] = [[Token(5, position=3)], [[Token(5, position=3)]]]
    for targets in alone_and_together:
        given: Any = depass.attribute(input_ids=LONG[None], target=targets)[0]
        value = given.value if isinstance(given, Attribution) else given[0].value
        assert value == pytest.approx(expected[5].item(), abs=1e-4)
    (found,) = make_method("occlusion", depass).attribute(input_ids=LONG[None], target=Token(5, position=3))
    assert found.value == pytest.approx(expected[5].item(), abs=1e-4)


def test_removal_curves_across_the_border(model: Any) -> None:
    found = DePass(model, max_positions=64).attribute(input_ids=LONG[None], target=5)
    (together,) = removal_curves(model, found, [5], zeroed=True)
    (one_by_one,) = removal_curves(model, found, [5], zeroed=True, batch_size=1)
    assert together.patch_top == pytest.approx(one_by_one.patch_top, abs=1e-6)
    assert together.zero_patch_top == pytest.approx(one_by_one.zero_patch_top, abs=1e-6)
    ranked = found[0].scores.sort(descending=True).indices[:5]
    kept = torch.tensor([token for i, token in enumerate(LONG.tolist()) if i not in ranked])
    at = together.percents.index(40)
    assert together.patch_top[at] == pytest.approx(alone(model, kept).softmax(-1)[5].item(), abs=1e-5)


def test_a_generation_across_the_border_says_so(model: Any) -> None:
    depass = DePass(model, max_positions=64)
    with pytest.warns(DePassWarning, match=f"past {ORIGINAL} tokens"):
        depass.attribute_generation(input_ids=SHORT[None], max_new_tokens=6, eos_token_id=None)
    depass.attribute_generation(input_ids=SHORT[None], max_new_tokens=2, eos_token_id=None)


def test_more_positions_than_the_configuration_states_are_asked_for_by_name() -> None:
    with pytest.raises(DePassError, match="context of 8"):
        DePass(build("dynamic")).attribute(input_ids=LONG[None], target=5)
    with pytest.raises(DePassError, match="table of 64 positions"):
        DePass(from_zoo("gpt2"), max_positions=65)
    with pytest.raises(DePassError, match="max_positions is 0"):
        DePass(from_zoo("llama"), max_positions=0)
