"""Masked heads and neurons against models whose weights are really zero, and against real generation."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from depass_lightning import Contrast, DePass, DePassError, Heads, Neurons, tasks
from depass_lightning.faithfulness import (
    ComponentMasking,
    MaskingCurves,
    TokenRemoval,
    answered_right,
    masking_curves,
)
from depass_lightning.methods import DePassMethod, make_method
from depass_lightning.modules.attribution_module import AttributionModule, Explained
from depass_lightning.modules.prompt_datamodule import PromptBatch
from depass_lightning.results.attribution import Attribution
from depass_lightning.storage import ATTRIBUTION_SCHEMA
from depass_lightning.tasks import Example
from tests.engine.test_untouched import in_the_middle_of_training, must_stay_untouched
from tests.methods.test_methods import OUTPUTS
from tests.reference import zoo
from tests.reference.models import build, prompt

pytestmark = pytest.mark.covering

PERCENTS = [0, 10, 50]
PROMPTS = [prompt(length, seed=length) for length in (4, 7, 5)]
ANSWERS = [[7], [11, 3], [5, 5, 9]]


def scored(depass: DePass, source: Any, prompts: list[Tensor] = PROMPTS) -> list[Attribution]:
    method = make_method("random", depass, source)
    return [method.attribute(input_ids=ids[None], target=7)[0] for ids in prompts]


def zeroed(model: Any, places: list[tuple[int, int]], path: str, count: int) -> Any:
    """A copy of the model whose maps have no weight where the masked heads or neurons would come in."""
    model = copy.deepcopy(model)
    for layer, number in places:
        behind = zoo.blocks_of(model)[layer].get_submodule(path)
        weight: Any = behind.weight
        size = (weight.shape[0] if type(behind).__name__ == "Conv1D" else weight.shape[1]) // count
        own = slice(number * size, (number + 1) * size)
        with torch.no_grad():
            if type(behind).__name__ == "Conv1D":
                weight[own] = 0
            else:
                weight[:, own] = 0
    return model


def greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    """What the model goes on with, token by token."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids[-count:].tolist()


def probability(model: Any, ids: Tensor, answer: list[int]) -> float:
    found = 1.0
    for token in answer:
        with torch.no_grad():
            found *= float(model(ids[None], use_cache=False).logits[0, -1].softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([token])])
    return found


FAMILIES = ("llama-biases", "gpt2", "gpt_neox", "phi3", "opt")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_mask_is_what_weights_of_zero_are(family: str, kind: str) -> None:
    """Every prompt has masks of its own, though all go through the model together.

    The answers are the model's own with the top masked, so that some are right.
    """
    model = zoo.build(family)
    depass = DePass(model)
    own = OUTPUTS.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    source, path = (Heads(), own[0]) if kind == "heads" else (Neurons(), own[1])
    assert path is not None
    found = scored(depass, source)
    count = len(found[0]) // 3
    answers, expected = [], []
    for attribution, ids, length in zip(found, PROMPTS, (1, 2, 3), strict=True):
        order = attribution.scores.argsort(descending=True, stable=True).tolist()
        masks = [
            order[: round(len(order) * percent / 100)]
            if top
            else order[len(order) - round(len(order) * percent / 100) :]
            for top in (True, False)
            for percent in PERCENTS
        ]
        models = [zeroed(model, [divmod(i, count) for i in mask], path, count) for mask in masks]
        answer = greedy(models[2], ids, length)
        answers.append(answer)
        exact = [float(greedy(own, ids, length) == answer) for own in models]
        chances = [probability(own, ids, answer) for own in models]
        expected.append((exact[:3], exact[3:], chances[:3], chances[3:]))
    curves = masking_curves(depass, found, answers, percents=PERCENTS, batch_size=7)
    for curve, (top, bottom, top_chance, bottom_chance) in zip(curves, expected, strict=True):
        assert curve.masked_percents == PERCENTS
        assert (curve.mask_top, curve.mask_bottom) == (top, bottom)
        assert curve.mask_top[2] == 1
        assert curve.mask_top_probability == pytest.approx(top_chance, rel=1e-4)
        assert curve.mask_bottom_probability == pytest.approx(bottom_chance, rel=1e-4)


def test_each_layers_own_components_are_masked() -> None:
    """One layer's heads, and some neurons of one layer, by their numbers."""
    model = build("llama")
    depass = DePass(model)
    for source, path, count in (
        (Heads(1), "self_attn.o_proj", 6),
        (Neurons(2, indices=[40, 3, 17, 8]), "mlp.down_proj", 44),
    ):
        (found,) = scored(depass, source, PROMPTS[:1])
        numbers = [int(name.split()[1]) for name in found.names]
        top = [numbers[i] for i in found.scores.argsort(descending=True).tolist()][: len(numbers) // 2]
        bare = zeroed(model, [(found.layer, number) for number in top], path, count)
        (curves,) = masking_curves(depass, [found], [[7]], percents=[50])
        assert curves.mask_top_probability == pytest.approx([probability(bare, PROMPTS[0], [7])], rel=1e-4)


def test_random_orders_depend_on_the_prompt_alone() -> None:
    depass = DePass(build("llama"))
    found = scored(depass, Heads())
    together = masking_curves(depass, found, ANSWERS, draws=3)
    apart = [masking_curves(depass, [own], [a], draws=3)[0] for own, a in zip(found, ANSWERS, strict=True)]
    for one, other in zip(together, apart, strict=True):
        assert one.mask_random_probability == pytest.approx(other.mask_random_probability, rel=1e-4)
    other = masking_curves(depass, found, ANSWERS, draws=3, seed=1)
    assert other[0].mask_random_probability != together[0].mask_random_probability
    none = masking_curves(depass, found, ANSWERS, draws=0)
    assert (none[0].mask_random, none[0].mask_random_probability) == (None, None)
    # Without a mask every curve begins at the model's own answer.
    first = together[0]
    assert first.mask_random_probability is not None
    own = probability(depass.model, PROMPTS[0], [7])
    starts = (first.mask_top_probability, first.mask_bottom_probability, first.mask_random_probability)
    assert [start[0] for start in starts] == pytest.approx([own] * 3, rel=1e-4)


def test_depasss_own_rest_and_bias_are_never_masked() -> None:
    model = build("llama-biases")
    depass = DePass(model)
    (found,) = depass.attribute(input_ids=PROMPTS[0][None], target=7, source=Heads())
    assert any(name.endswith("bias") for name in found.names)
    (curves,) = masking_curves(depass, [found], [[7]], percents=[100])
    bare = zeroed(model, [(layer, head) for layer in range(3) for head in range(6)], "self_attn.o_proj", 6)
    assert curves.mask_top_probability == pytest.approx([probability(bare, PROMPTS[0], [7])], rel=1e-4)


def test_a_model_in_training_is_left_as_it_was() -> None:
    model = build("llama", attention="sdpa")
    in_the_middle_of_training(model)
    depass = DePass(model)
    found = scored(depass, Heads())
    with must_stay_untouched(model):
        masking_curves(depass, found, ANSWERS)


def test_what_cannot_be_masked_is_refused() -> None:
    depass = DePass(build("llama"))
    heads = scored(depass, Heads(), PROMPTS[:1])
    tokens = scored(depass, None, PROMPTS[:1])
    with pytest.raises(DePassError, match="neither heads nor neurons"):
        masking_curves(depass, tokens, [[7]])
    with pytest.raises(DePassError, match="the same heads or neurons"):
        masking_curves(depass, heads + scored(depass, Heads(1), PROMPTS[:1]), [[7], [7]])
    with pytest.raises(DePassError, match="as many answers"):
        masking_curves(depass, heads, [])
    with pytest.raises(DePassError, match="no tokens"):
        masking_curves(depass, heads, [[]])
    with pytest.raises(DePassError, match="no tokenizer"):
        masking_curves(depass, heads, [" Mary"])
    with pytest.raises(DePassError, match="must rise"):
        masking_curves(depass, heads, [[7]], percents=[20, 10])
    with pytest.raises(DePassError, match="at least 1"):
        masking_curves(depass, heads, [[7]], batch_size=0)
    assert masking_curves(depass, [], []) == []
    mixture = DePass(zoo.build("mixtral"))
    neurons = mixture.attribute(input_ids=PROMPTS[0][None], target=7, source=Neurons(1), rule="taylor")
    with pytest.raises(DePassError, match="mixture of experts"):
        masking_curves(mixture, neurons, [[7]])


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def test_what_is_answered_right_is_what_generate_says(tiny: DePass) -> None:
    """Answers of one token and of several, right, half right and wrong; and a prompt that cannot be read."""
    examples = list(tasks.load("ioi", size=12))
    tokenizer: Any = tiny.tokenizer
    firsts, exacts = [], []
    given = []
    for number, example in enumerate(examples):
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        model: Any = tiny.model
        told = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :])
        answer = (str(example.answer), told, f"{told.split()[0]} Mary", " zebra")[number % 4]
        answer = answer if answer.startswith(" ") else f" {answer}"
        given.append(Example(example.id, example.prompt, answer))
        wanted = tokenizer.encode(answer, add_special_tokens=False)
        said = greedy(model, ids[0], len(wanted))
        firsts += [number] * (said[0] == wanted[0])
        exacts += [number] * (said == wanted)
    given.append(Example("empty", " ", " Mary"))
    assert answered_right(tiny, given, 5) == firsts
    assert answered_right(tiny, given, 5, exact=True) == exacts
    assert set(exacts) < set(firsts) < set(range(12))


def test_the_module_measures_what_its_components_are(tiny: DePass) -> None:
    """Tokens are removed, heads and neurons masked, by any method, and rows have columns for all of it."""
    examples = list(tasks.load("ioi", size=3))
    batch = PromptBatch([0, 1, 2], examples)
    measures = [TokenRemoval(percents=(0, 50, 100), zeroed=True), ComponentMasking(percents=(0, 20))]
    for name, source in (
        ("input_gradient", None),
        ("atp", Heads()),
        ("norm", Neurons(1)),
        ("depass", Heads()),
    ):
        method = make_method(name, tiny, source)
        module = AttributionModule(method, measures=measures)
        rows = module.predict_step(batch).rows
        assert all(set(row) <= set(ATTRIBUTION_SCHEMA.names) for row in rows)
        if source is None:
            assert [len(row["zero_patch_top_logit"]) for row in rows] == [3, 3, 3]
            assert all(row["comprehensiveness"] is not None and "mask_top" not in row for row in rows)
            assert all(0 <= row["evidence_auroc"] <= 1 for row in rows)
            continue
        attributions = method.attribute([own.prompt for own in examples], [own.target() for own in examples])
        answers = [str(own.answer) for own in examples]
        expected = masking_curves(tiny, attributions, answers, percents=(0, 20))
        fields = MaskingCurves.__dataclass_fields__
        for row, curve in zip(rows, expected, strict=True):
            assert "patch_top" not in row
            assert row["rule"] == attributions[0].rule
            for field in fields:
                assert row[field] == pytest.approx(getattr(curve, field), rel=1e-3)
    measures = [ComponentMasking((0,))]
    own = AttributionModule(make_method("atp", tiny), explained=Explained("own"), measures=measures)
    assert [row["mask_top"] for row in own.predict_step(batch).rows] == [[1.0]] * 3


def test_a_module_takes_settings_or_a_method(tiny: DePass) -> None:
    method = make_method("input_gradient", tiny)
    with pytest.raises(DePassError, match="explains no generated tokens"):
        AttributionModule(method, explained=Explained("generation"))
    targets = "contrast, token, centred, log_odds, logprob, own, generation"
    with pytest.raises(DePassError, match=f"target must be one of {targets}"):
        Explained("mine")  # type: ignore[arg-type]
    settings = DePassMethod(tiny, Heads(), rule="taylor").settings
    assert settings == {"rule": "taylor", "source": Heads()}
    with pytest.raises(DePassError, match="must rise"):
        ComponentMasking((20, 10))
    rows = (
        AttributionModule(method)
        .predict_step(
            PromptBatch(
                [0], [Example("a", "When Mary and John went to the store, John gave it to", " Mary", " John")]
            )
        )
        .rows
    )
    expected = method.attribute(
        "When Mary and John went to the store, John gave it to", Contrast(" Mary", " John")
    )
    assert rows[0]["scores"] == pytest.approx(expected.scores.tolist())
