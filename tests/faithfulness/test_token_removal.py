"""Patch top, recover top and known evidence, against cases worked out by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from depass_lightning import DePass, Token
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import (
    TokenRemoval,
    area,
    evidence_found,
    removal_curves,
    summarise,
    text_components,
)
from depass_lightning.faithfulness.evaluate import Case
from depass_lightning.methods import Random, RandomLastFirst
from depass_lightning.results.attribution import Attribution
from depass_lightning.storage import ATTRIBUTION_SCHEMA
from tests.reference.attributions import spans
from tests.reference.models import build, prompt

BOS, KEY, ANSWER = 1, 5, 7


class KeyModel(torch.nn.Module):
    """Gives the answer a probability of 0.9 while the key token is in the prompt, else 0.1.

    It insists on the beginning-of-sequence token in front, and notes what it was asked.
    """

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.asked = []

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        probabilities = torch.full((len(input_ids), logits_to_keep, 10), 0.0)
        for i, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            prompt = ids[mask].tolist()
            self.asked.append(prompt)
            assert position_ids[i][mask].tolist() == list(range(len(prompt)))
            answer = 0.9 if KEY in prompt else 0.1
            probabilities[i] = (1 - answer) / 9
            probabilities[i, :, ANSWER] = answer
        return SimpleNamespace(logits=probabilities.log())


def attribution(scores, *, bos=True, ids=(2, 3, 4, KEY, 6)):
    """A prompt "a b c d e" whose "d" is the key; the bias must never count as text."""
    letters = "abcde"[: len(ids)]
    tokens = ["<s>"] * bos + [f" {letter}" for letter in letters]
    offsets = [(0, 0)] * bos + [(2 * i, 2 * i + 1) for i in range(len(letters))]
    return Attribution(
        scores=torch.tensor([*([9.0] * bos), *scores, 99.0]),
        components=spans([*tokens, "bias"], [*((i, i + 1) for i in range(len(tokens))), None]),
        value=1.0,
        target="x",
        text=" ".join(letters),
        tokens=tokens,
        token_ids=[BOS] * bos + list(ids),
        offsets=offsets,
        source="tokens",
        rule="softmax",
        layer=0,
        position=len(tokens) - 1,
        prediction=" y",
    )


def test_the_answer_leaves_with_the_key_and_comes_back_with_it():
    """With the key ranked second of five, removing 40% or keeping 40% reaches it, and 20% does not."""
    model = KeyModel().train()
    percents = [0, 20, 40, 60, 80, 100]
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    (curves,) = removal_curves(model, [scored], [ANSWER], percents=percents, draws=3, batch_size=4)
    assert curves.percents == percents
    assert curves.patch_top == pytest.approx([0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    assert curves.recover_top == pytest.approx([0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    assert model.training, "the model's mode is put back"
    assert all(prompt[0] == BOS for prompt in model.asked), "special tokens stay"
    assert [BOS, 3, KEY] in model.asked, "what is kept stays in the prompt's order"
    assert len(model.asked) == len(set(map(tuple, model.asked))), "no prompt is run twice"


def test_random_orders_begin_and_end_where_the_scores_do():
    """Each draw loses the key once, so the mean steps down in parts; and both curves mirror each other."""
    percents = [0, 20, 40, 60, 80, 100]
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    (curves,) = removal_curves(KeyModel(), [scored], [ANSWER], percents=percents, draws=40)
    assert curves.patch_random[0] == curves.recover_random[-1] == pytest.approx(0.9)
    assert curves.patch_random[-1] == curves.recover_random[0] == pytest.approx(0.1)
    assert curves.patch_random == pytest.approx(curves.recover_random[::-1])
    assert area(percents, curves.patch_random) == pytest.approx(0.5, abs=0.08)
    again = removal_curves(KeyModel(), [scored], [ANSWER], percents=percents, draws=40)
    other = removal_curves(KeyModel(), [scored], [ANSWER], percents=percents, draws=40, seed=1)
    assert again == [curves]
    assert other != [curves]


class SeeingModel(torch.nn.Module):
    """As `KeyModel`, but what it looks for is the key's embedding; all tokens stay in their places."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(10))
        self.inner = torch.nn.Linear(1, 1)
        self.lengths = set()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        self.lengths |= set(attention_mask.sum(1).tolist())
        seen = (self.embedding(input_ids)[..., KEY] * attention_mask).amax(1)
        logits = torch.zeros(len(input_ids), logits_to_keep, 10)
        logits[..., ANSWER] = 2.0 * seen[:, None]
        return SimpleNamespace(logits=logits)


def test_embeddings_are_zeroed_where_they_stand():
    """The key is ranked second of five; the answer's logit is 2 while its embedding is there, else 0."""
    percents = [0, 20, 40, 100]
    model = SeeingModel()
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    (curves,) = removal_curves(model, [scored], [ANSWER], percents=percents, zeroed=True)
    assert 6 in model.lengths
    assert curves.zero_patch_top_logit == curves.patch_top_logit == pytest.approx([2, 2, 0, 0])
    assert curves.zero_recover_top_logit == curves.recover_top_logit == pytest.approx([0, 0, 2, 2])
    there = math.e**2 / (math.e**2 + 9)
    assert curves.zero_patch_top == pytest.approx([there, there, 0.1, 0.1])
    assert curves.zero_recover_top == pytest.approx([0.1, 0.1, there, there])
    assert curves.zero_patch_random_logit == curves.patch_random_logit
    model.lengths.clear()
    (apart,) = removal_curves(model, [scored], [ANSWER], percents=percents)
    assert (apart.zero_patch_top, apart.zero_recover_random_logit) == (None, None)
    assert apart.patch_top == curves.patch_top


def test_zeroed_embeddings_are_the_models_own_inputs_of_zero():
    """In a batch of two lengths, against `inputs_embeds` of one prompt at a time."""
    model = build("llama")
    found = []
    for length in (4, 6):
        ids = prompt(length, seed=length)
        (own,) = DePass(model).attribute(input_ids=ids[None], target=7)
        found.append(own)
    curves = removal_curves(model, found, [7, 7], percents=[0, 50, 100], zeroed=True, batch_size=3)
    for own, curve in zip(found, curves, strict=True):
        assert curve.zero_recover_top is not None
        for percent, value in zip(curve.percents, curve.zero_recover_top, strict=True):
            # Where nothing would be left, the last token is.
            kept = own.scores.argsort(descending=True)[: round(len(own) * percent / 100)] if percent else [-1]
            states = torch.zeros(1, len(own), 36)
            states[0, kept] = model.get_input_embeddings()(torch.tensor(own.token_ids))[kept].detach()
            with torch.no_grad():
                expected = model(inputs_embeds=states).logits[0, -1].softmax(-1)[7]
            assert value == pytest.approx(float(expected), rel=1e-4)


def test_comprehensiveness_and_sufficiency_by_hand():
    """1% and 20% of five tokens are one, which is not the key; 40% are two, with the key."""
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    (curves,) = removal_curves(KeyModel(), [scored], [ANSWER], percents=[50], rationales=[1, 20, 40])
    assert curves.comprehensiveness == pytest.approx(0.9 - (0.9 + 0.9 + 0.1) / 3)
    assert curves.sufficiency == pytest.approx(0.9 - (0.1 + 0.1 + 0.9) / 3)
    (many,) = removal_curves(KeyModel(), [scored], [ANSWER], rationales=[20, 40], draws=400)
    assert many.comprehensiveness_random == pytest.approx(0.8 * (0.2 + 0.4) / 2, abs=0.05)
    assert many.sufficiency_random == pytest.approx(0.8 * (0.8 + 0.6) / 2, abs=0.05)
    (ranked,) = removal_curves(KeyModel(), [scored], [ANSWER], rationales=[20], draws=0)
    assert (ranked.patch_random, ranked.recover_random, ranked.comprehensiveness_random) == ([], [], None)
    assert (ranked.comprehensiveness, ranked.sufficiency) == pytest.approx((0.0, 0.8))
    (without,) = removal_curves(KeyModel(), [scored], [ANSWER])
    assert (without.comprehensiveness, without.sufficiency_random) == (None, None)


def test_each_module_has_its_own_mode_back():
    model = SeeingModel().train()
    model.inner.eval()
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    removal_curves(model, [scored], [ANSWER])
    assert [module.training for module in model.modules()] == [True, True, False]


def test_prompts_do_not_disturb_each_other():
    """Together or alone, in any batch: the same curves."""
    together = [attribution([0.1, 0.5, 0.2, 0.4, 0.3]), attribution([3.0, 2.0], ids=(KEY, 4), bos=False)]
    apart = [removal_curves(KeyModel(), [a], [ANSWER])[0] for a in together]
    assert removal_curves(KeyModel(), together, [ANSWER] * 2, batch_size=3) == apart


def test_one_token_always_remains():
    """Without a special token in front, removing everything leaves the last token, in any order."""
    model = KeyModel()
    scored = attribution([1.0, 2.0], ids=(KEY, 4), bos=False)
    (curves,) = removal_curves(model, [scored], [ANSWER], percents=[0, 100])
    assert curves.patch_top == pytest.approx([0.9, 0.1])
    assert [4] in model.asked


def test_what_cannot_be_measured_is_refused():
    for percents in ([0, 120], [-1, 50], [50, 20], []):
        with pytest.raises(DePassError, match="must rise from 0"):
            removal_curves(KeyModel(), [], [], percents=percents)
    with pytest.raises(DePassError, match="as many answers"):
        removal_curves(KeyModel(), [attribution([1.0] * 5)], [])
    with pytest.raises(DePassError, match="two points"):
        area([50], [0.5])


def test_area_is_a_mean_height():
    assert area([0, 100], [1.0, 0.0]) == pytest.approx(0.5)
    assert area([0, 50, 100], [1.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert area([0, 10, 100], [0.3, 0.3, 0.3]) == pytest.approx(0.3)


def test_evidence_is_compared_among_text_alone():
    """The bias and the special token score highest here, and are no candidates."""
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    assert text_components(scored) == [1, 2, 3, 4, 5]
    found = evidence_found(scored, [(2, 3)])  # "b", the highest
    assert found is not None
    assert (found.first, found.chance) == (True, pytest.approx(1 / 5))
    missed = evidence_found(scored, [(0, 1), (6, 7)])  # "a" and "d"
    assert missed is not None
    assert (missed.first, missed.chance) == (False, pytest.approx(2 / 5))
    assert evidence_found(scored, []) is None
    scored = attribution([0.1, 0.2, 0.5, 0.4, 0.9])  # the last token is the highest
    for ranges in ([(4, 5)], [(4, 5), (8, 9)]):
        all_tokens, others = (evidence_found(scored, ranges, keep_last=keep) for keep in (False, True))
        assert all_tokens is not None
        assert others is not None
        assert (others.first, others.chance, others.auroc) == (True, pytest.approx(1 / 4), 1)
        assert all_tokens.first == (len(ranges) == 2)
    assert evidence_found(scored, [(8, 9)], keep_last=True) is None


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    """Evidence "b" (0.5) and "e" (0.3) against 0.1, 0.2 and 0.4: five of six pairs; large scores too."""
    for scale in (1, 1000):
        scored = attribution([scale * score for score in (0.1, 0.5, 0.2, 0.4, 0.3)])
        found = evidence_found(scored, [(2, 3), (8, 9)])
        assert found is not None
        assert found.auroc == pytest.approx(5 / 6)
    level = evidence_found(attribution([1.0] * 5), [(2, 3)])
    everything = evidence_found(attribution([1.0] * 5), [(0, 9)])
    assert level is not None
    assert everything is not None
    assert (level.auroc, everything.auroc) == (0.5, None)


def test_tokens_behind_the_target_do_not_count():
    scored = attribution([0.1, 0.5, 0.2, 0.4, 0.3])
    scored.position = 3
    assert text_components(scored) == [1, 2, 3]


def test_a_summary_is_the_mean_over_what_rows_know():
    """Two rows by hand; the second knows neither evidence nor curves."""
    known = {
        "correct": True,
        "completeness": 1e-7,
        "evidence_first": True,
        "evidence_chance": 0.2,
        "percents": [0.0, 100.0],
        "patch_top": [1.0, 0.0],
        "recover_top": [0.0, 1.0],
        "patch_random": [1.0, 0.5],
        "recover_random": [0.5, 1.0],
    }
    unknown = dict.fromkeys(known) | {"correct": False, "completeness": 3e-7}
    summary = summarise([known, unknown])
    assert summary["prompts"] == 2
    assert summary["correct"] == 0.5
    assert summary["completeness_max"] == 3e-7
    assert summary["completeness_mean"] == pytest.approx(2e-7)
    found = {"value": 1.0, "low": 1.0, "high": 1.0, "chance": 0.2, "note": "known for 1 of 2 prompts"}
    assert summary["evidence_first"] == found
    assert summary["curves"]["patch_top"] == {"fraction": [0, 1], "depass": [1, 0], "random": [1, 0.5]}
    assert summary["curves"]["recover_top"] == {"fraction": [0, 1], "depass": [0, 1], "random": [0.5, 1]}
    assert summary["patch_top_area"]["value"] == pytest.approx(0.5)
    assert summary["patch_top_area"]["chance"] == pytest.approx(0.75)
    assert summary["recover_top_area"]["chance"] == pytest.approx(0.75)


def test_what_no_row_knows_is_left_out():
    row = dict.fromkeys(["correct", "evidence_first", "evidence_chance", "patch_top"]) | {"completeness": 0.0}
    assert summarise([row]) == {"prompts": 1, "completeness_max": 0.0, "completeness_mean": 0.0}
    assert summarise([]) == {"prompts": 0}


class LastModel(torch.nn.Module):
    """Gives the answer log-odds of 2 after the last token "e", and 1 more with the key in the prompt."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        logits = torch.zeros(len(input_ids), logits_to_keep, 10)
        for i, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            prompt = ids[mask].tolist()
            odds = 2.0 * (prompt[-1] == 6) + (KEY in prompt)
            logits[i, :, ANSWER] = odds + math.log(9)  # against nine tokens with a logit of zero
            logits[i, :, 8] = 3.0
            logits[i, :, ANSWER] += math.log((8 + math.exp(3.0)) / 9)
        return SimpleNamespace(logits=logits)


def test_the_last_token_can_be_kept():
    """It ranks first here: removing it alone takes 2 of the log-odds; kept, the key's 1 is what is left."""
    scored = attribution([0.1, 0.2, 0.3, 0.4, 9.0])
    percents = [0, 20, 40, 100]
    options = {"percents": percents, "draws": 30, "rationales": [20]}
    (whole,) = removal_curves(LastModel(), [scored], [ANSWER], **options)
    (kept,) = removal_curves(LastModel(), [scored], [ANSWER], keep_last=True, **options)
    assert whole.patch_top_log_odds == pytest.approx([3, 1, 0, 0], abs=1e-5)
    assert whole.recover_top_log_odds == pytest.approx([0, 2, 3, 3], abs=1e-5)
    # One and two of the four others: the key is the first of them.
    assert kept.patch_top_log_odds == pytest.approx([3, 2, 2, 2], abs=1e-5)
    assert kept.recover_top_log_odds == pytest.approx([2, 3, 3, 3], abs=1e-5)
    assert kept.patch_top == pytest.approx([1 / (1 + math.exp(-odds)) for odds in (3, 2, 2, 2)])
    assert whole.patch_top_rank == [1, 1, 1, 1]
    assert min(kept.patch_random_log_odds) == pytest.approx(2, abs=1e-5), "in no order is it removed"
    assert 2 < kept.patch_random_log_odds[1] < 3
    assert whole.comprehensiveness_log_odds == pytest.approx(2, abs=1e-5)
    assert whole.sufficiency_log_odds == pytest.approx(1, abs=1e-5)
    assert kept.comprehensiveness_log_odds == pytest.approx(1, abs=1e-5)
    assert kept.sufficiency_log_odds == pytest.approx(0, abs=1e-5)
    # A difference of two float32 probabilities has their absolute error.
    lost = 1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(-2))
    assert kept.comprehensiveness == pytest.approx(lost, abs=1e-6)


def test_the_rank_counts_the_tokens_that_are_more_likely():
    scored = attribution([0.1, 0.5, 0.2, 0.9, 0.3])
    (curves,) = removal_curves(KeyModel(), [scored], [2], percents=[0], draws=0)
    assert curves.patch_top_rank == [2], "the key's answer is ahead"
    odds = 0.1 / 9 / (1 - 0.1 / 9)
    assert curves.patch_top_log_odds == pytest.approx([math.log(odds)], abs=1e-5)


def test_one_measure_gives_both():
    model = LastModel()
    scored = attribution([0.1, 0.2, 0.3, 0.4, 9.0])
    scored.target_ids = [ANSWER]
    measure = TokenRemoval([0, 50, 100], keep_last=True, draws=2)
    depass: Any = SimpleNamespace(model=model)
    (columns,) = measure.columns([Case(scored)], depass)
    (plain,) = TokenRemoval([0, 50, 100], draws=2).columns([Case(scored)], depass)
    assert {name: values for name, values in columns.items() if not name.startswith("kept_")} == plain
    assert {name for name in columns if name.startswith("kept_")} == {
        f"kept_{name}" for name in plain if name != "percents"
    }
    assert set(columns) <= set(ATTRIBUTION_SCHEMA.names)
    summary = summarise([columns])
    assert summary["kept_patch_top_area"]["value"] == area([0, 50, 100], columns["kept_patch_top"])
    assert summary["kept_log_odds_curves"]["kept_recover_top_log_odds"]["depass"] == pytest.approx([2, 3, 3])
    assert summary["kept_comprehensiveness"]["value"] == columns["kept_comprehensiveness"]


def test_the_control_ranks_the_last_token_first():
    depass = DePass(build("llama"))
    ids = prompt(8)[None]
    for position in (-1, 4):
        (control,) = RandomLastFirst(depass).attribute(input_ids=ids, target=Token(3, position=position))
        (plain,) = Random(depass).attribute(input_ids=ids, target=Token(3, position=position))
        assert int(control.scores.argmax()) == position % 8
        rest = torch.arange(8) != position % 8
        assert torch.equal(control.scores[rest], plain.scores[rest])
