"""CPR, CMD, the linear datamodeling score and soft removal, against cases worked out by hand."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from depass_lightning import Contrast, DePass, DePassError, Heads, Module, Token, Tokens
from depass_lightning.faithfulness import LinearDatamodeling, SoftRemoval, circuit_scores, circuit_values
from depass_lightning.faithfulness.circuits import CircuitValues
from depass_lightning.faithfulness.evaluate import Case
from depass_lightning.faithfulness.soft_removal import retentions
from tests.faithfulness.test_token_removal import ANSWER, attribution
from tests.reference.models import build, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama-biases", dtype=torch.float64)


def test_areas_by_hand() -> None:
    """The mean of the values gives f = 0, 0.5, 1.5, 1 at the fractions 0, 0.5, 0.75, 1."""
    fractions = [0.0, 0.5, 0.75, 1.0]
    values = [
        CircuitValues(fractions, [1.0, 2.0, 4.0, 3.0], whole=3.0, empty=1.0),
        CircuitValues(fractions, [1.0, 2.0, 4.0, 3.0], whole=3.0, empty=1.0),
    ]
    scores = circuit_scores(values, draws=20)
    assert scores.faithfulness == pytest.approx([0, 0.5, 1.5, 1])
    assert scores.cpr.value == pytest.approx(0.5 * 0.25 + 0.25 * 1 + 0.25 * 1.25)
    assert scores.cmd.value == pytest.approx(0.5 * 0.75 + 0.25 * 0.5 + 0.25 * 0.25)
    assert scores.cpr.low == scores.cpr.high == pytest.approx(scores.cpr.value)
    # Ratios are of means, not means of ratios: these two prompts have f = 1 and -1, their means 2 / 3.
    uneven = [
        CircuitValues([0.5, 1.0], [5.0, 5.0], whole=5.0, empty=0.0),
        CircuitValues([0.5, 1.0], [-1.0, 1.0], whole=1.0, empty=0.0),
    ]
    assert circuit_scores(uneven).faithfulness == pytest.approx([4 / 6, 1])
    with pytest.raises(DePassError, match="one prompt at least"):
        circuit_scores([])
    with pytest.raises(DePassError, match="nothing to recover"):
        circuit_scores([CircuitValues([0.5, 1.0], [1.0, 1.0], whole=1.0, empty=1.0)])


def test_a_circuit_is_all_that_is_not_zero(model: Any) -> None:
    """Of three MLPs the one with the highest mean score is kept; the others' maps are set to zero."""
    depass = DePass(model)
    ids = torch.stack([prompt(6), prompt(6, seed=2)])
    found = depass.attribute(input_ids=ids, target=Contrast(7, 11), source=Module("mlp"), rule="max")
    mean = torch.stack([own.scores for own in found]).mean(0)
    scores = {name: float(mean[found[0].names.index(name)]) for name in found[0].names if "mlp" in name}
    best = max(scores, key=scores.__getitem__)
    results = circuit_values(depass.decoder, found, fractions=[0.2, 0.5, 1.0])
    for row, result in zip(ids, results, strict=True):

        def value(kept: set[str], row: torch.Tensor = row) -> float:
            ablated = copy.deepcopy(model)
            with torch.no_grad():
                for layer, block in enumerate(ablated.model.layers):
                    if f"layer {layer} mlp" not in kept:
                        block.mlp.down_proj.weight.zero_()
                        block.mlp.down_proj.bias.zero_()
            logits = ablated(row[None], use_cache=False).logits[0, -1].detach()
            return float(logits[7] - logits[11])

        expected = [value(set()), value({best}), value(set(scores))]
        assert result.values == pytest.approx(expected, abs=1e-9)
        assert (result.empty, result.whole) == (result.values[0], result.values[2])
    tokens = depass.attribute(input_ids=ids, target=Contrast(7, 11), source=Tokens(), rule="max")
    with pytest.raises(DePassError, match="same heads, neurons or modules"):
        circuit_values(depass.decoder, tokens)


def test_the_whole_and_the_empty_circuit_are_the_two_prompts(model: Any) -> None:
    """Resampled: nothing ablated is the prompt's run, everything is the reference's, embeddings included."""
    depass, ids, other = DePass(model), prompt(6), prompt(6, seed=2)
    parts = [
        depass.attribute(input_ids=ids[None], target=Contrast(7, 11), source=source, rule="half")[0]
        for source in (Heads(), Module("mlp"))
    ]
    nodes = replace(
        parts[0],
        scores=torch.cat([part.scores for part in parts]),
        components=[component for part in parts for component in part.components],
        groups=1,
    )
    (values,) = circuit_values(
        depass.decoder, [nodes], "resample", references=[other.tolist()], fractions=[0.5, 1.0]
    )
    clean, corrupted = (
        float((logits[7] - logits[11]).detach())
        for logits in (model(row[None], use_cache=False).logits[0, -1] for row in (ids, other))
    )
    assert [values.values[1], values.whole, values.empty] == pytest.approx(
        [clean, clean, corrupted], abs=1e-9
    )
    assert values.values[0] not in (pytest.approx(clean), pytest.approx(corrupted))


class LinearModel(torch.nn.Module):
    """The answer's log-odds are a sum over the tokens in the prompt: 2 to 6 count 1, -2, 3, -4 and 0.5."""

    weights = torch.tensor([0.0, 0, 1, -2, 3, -4, 0.5, 0, 0, 0])

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, input_ids: Any, attention_mask: Any, logits_to_keep: int, **_: Any) -> Any:
        logits = torch.zeros(len(input_ids), logits_to_keep, 10)
        odds = (self.weights[input_ids] * attention_mask).sum(1)
        logits[..., ANSWER] = odds[:, None] + math.log(9)
        return SimpleNamespace(logits=logits)


def test_the_true_weights_predict_every_ablation() -> None:
    """Those of the last token do not matter: it always stays."""
    depass: Any = SimpleNamespace(model=LinearModel())
    true, opposite = attribution([1, -2, 3, -4, 99]), attribution([-1, 2, -3, 4, -99])
    unrelated = attribution([1, 1, 1, 1, 1])
    single = attribution([1, 1], ids=(2, 3))
    cases = []
    for scored in (true, opposite, unrelated, single):
        scored.target_ids = [ANSWER]
        cases.append(Case(scored))
    measure = LinearDatamodeling(samples=40)
    columns = measure.columns(cases, depass)
    assert columns[0] == {"lds": pytest.approx(1)}
    assert columns[1] == {"lds": pytest.approx(-1)}
    assert -1 < columns[2]["lds"] < 1
    assert columns[3] == {}, "one candidate is no correlation"
    unused: Any = SimpleNamespace(model=None)
    assert measure.columns(cases, unused) == columns, "the model is asked once"
    assert LinearDatamodeling(samples=40, seed=1).columns(cases, depass)[2] != columns[2]
    with pytest.raises(DePassError, match="two samples"):
        LinearDatamodeling(samples=1)


def test_the_expected_retention_is_equal() -> None:
    assert retentions(torch.tensor([0.0, 1.0, 2.0]), 0.5).tolist() == [0, 0.5, 1]
    assert retentions(torch.tensor([5.0, 6.0, 7.0]), 0.25).tolist() == [0, 0.25, 0.5]
    assert retentions(torch.tensor([0.0, 0.0, 0.0, 8.0]), 0.5).tolist() == pytest.approx([1 / 3] * 3 + [1])
    assert retentions(torch.ones(3), 0.3).tolist() == pytest.approx([0.3] * 3)
    generator = torch.Generator().manual_seed(0)
    for mean in (0.1, 0.5, 0.9):
        kept = retentions(torch.randn(20, generator=generator), mean)
        assert float(kept.mean()) == pytest.approx(mean)
        assert 0 <= float(kept.min()) <= float(kept.max()) <= 1
    for mean in (0.0, 1.0):
        with pytest.raises(DePassError, match="between 0 and 1"):
            retentions(torch.ones(2), mean)


def test_soft_removal_of_all_or_nothing(model: Any) -> None:
    """With two candidates and half kept, one is kept whole and the other dropped whole: nothing is random."""
    depass = DePass(model)
    ids = prompt(3)
    states = model.get_input_embeddings()(ids[None]).detach()

    def probability(token: int, *zeroed: int) -> float:
        changed = states.clone()
        changed[0, list(zeroed)] = 0
        return float(model(inputs_embeds=changed, use_cache=False).logits[0, -1].softmax(-1)[token].detach())

    measured = 0
    for token in range(20):
        (found,) = depass.attribute(input_ids=ids[None], target=Token(token), source=Tokens(), rule="max")
        high, low = (0, 1) if found.scores[0] > found.scores[1] else (1, 0)
        (columns,) = SoftRemoval(samples=2).columns([Case(found)], depass)
        whole = probability(token)
        lost = max(0.0, whole - probability(token, 0, 1))
        if not lost:
            assert columns == {}
            continue
        measured += 1
        missing, taken = max(0.0, whole - probability(token, low)), max(0.0, whole - probability(token, high))
        assert columns["soft_sufficiency"] == pytest.approx(1 - missing / lost, abs=1e-6)
        assert columns["soft_comprehensiveness"] == pytest.approx(taken / lost, abs=1e-6)
    assert measured
    for options in ({"retention": 1.0}, {"samples": 0}):
        with pytest.raises(DePassError):
            SoftRemoval(**options)  # type: ignore[arg-type]
