"""The methods to compare with, on encoders: what is read stays, and no text is padded."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

from depass_lightning import Continuation, DePass, DePassError, Direction, Heads, Label, Masked, Module, Spans
from depass_lightning.logit_lens import PageLens, layer_scores
from depass_lightning.methods import make_method
from depass_lightning.sources import Neurons, Tokens
from tests.models.test_encoders import encoder, masked_model, real_logits
from tests.reference.models import build, prompt


@pytest.mark.parametrize(
    ("make", "target", "read", "output"),
    [
        (lambda: masked_model("distilbert"), Masked(3, 5), 3, 5),
        (lambda: encoder("bert"), Label(1), None, 1),
        (lambda: encoder("bert", AutoModelForTokenClassification), Label(2, position=4), 4, 2),
    ],
    ids=["masked", "text", "token"],
)
def test_occlusion_reads_where_the_target_is_read(
    make: Any, target: Any, read: int | None, output: int
) -> None:
    model, texts = make(), torch.stack([prompt(7), prompt(7).flip(0)])
    for ids, scored in zip(
        texts, make_method("occlusion", DePass(model)).attribute(input_ids=texts, target=target), strict=True
    ):
        whole = real_logits(model, ids)
        value = whole[output] if read is None else whole[read, output]
        kept_always = 0 if read is None else read
        for i, score in enumerate(scored.scores.tolist()):
            if i == kept_always:
                assert score == 0
                continue
            left = real_logits(model, torch.cat([ids[:i], ids[i + 1 :]]))
            without = left[output] if read is None else left[read - (i < read), output]
            assert score == pytest.approx(float(value - without), abs=1e-7)


@pytest.mark.parametrize("method", ["lime", "context_cite", "shapley"])
def test_subsets_keep_what_is_read(method: str) -> None:
    model = masked_model("bert")
    depass = DePass(model)
    texts = torch.stack([prompt(6), prompt(6).flip(0)])
    options: Any = {} if method == "shapley" else {"alpha": 1e-5}
    first, second = make_method(method, depass, **options).attribute(input_ids=texts, target=Masked(3, 5))
    (alone,) = make_method(method, depass, **options).attribute(input_ids=texts[1:], target=Masked(3, 5))
    assert torch.equal(second.scores, alone.scores)
    for scored in (first, second):
        assert scored.scores[3] == 0
        assert scored.scores.count_nonzero() > 0
    if method == "shapley":
        only = float(real_logits(model, texts[0, 3:4])[0, 5])
        assert float(first.scores.sum()) == pytest.approx(first.value - only, abs=1e-8)


def test_sizes_and_patching_of_one_block() -> None:
    depass = DePass(masked_model("bert"))
    texts = torch.stack([prompt(6), prompt(6).flip(0)])
    for method, source in (
        ("norm", Heads(1)),
        ("activation", Neurons(1)),
        ("atp", Heads(1)),
        ("atp", Module("mlp")),
    ):
        together = make_method(method, depass, source).attribute(input_ids=texts, target=Masked(3, 5))
        for ids, scored in zip(texts, together, strict=True):
            (alone,) = make_method(method, depass, source).attribute(input_ids=ids[None], target=Masked(3, 5))
            assert torch.allclose(scored.scores, alone.scores, atol=1e-10)
            assert bool((scored.scores != 0).any())


def test_what_an_encoder_lacks_is_named() -> None:
    depass = DePass(masked_model("bert"))
    for method in ("atp", "norm"):
        with pytest.raises(
            DePassError, match="block 3 of BertForMaskedLM has no attention that could be read"
        ):
            make_method(method, depass, Heads())
    for model, target in ((depass, Masked(3, 5)), (DePass(encoder("bert")), Label(1))):
        with pytest.raises(DePassError, match="replaces tokens by a language model's next tokens"):
            make_method("reagent", model).attribute(input_ids=prompt(6)[None], target=target)


def test_pages_have_no_layers_or_next_tokens_of_encoders() -> None:
    depass = DePass(masked_model("bert"))
    (scored,) = depass.attribute(input_ids=prompt(6)[None], target=Masked(3, 5), rule="half")
    assert layer_scores(depass, scored) is None
    assert PageLens(depass, Tokens()).prompt(scored) == {"likely": None, "layers": None}


def test_layers_end_with_the_scores_or_are_left_out() -> None:
    depass = DePass(build("llama"))
    ids = prompt(6)[None]
    for rule in ("softmax", "half"):
        for source in (Tokens(), Tokens(exclude_first=False), Spans([(0, 2), (2, 4), (4, 6)], unit="token")):
            (scored,) = depass.attribute(input_ids=ids, target=3, rule=rule, source=source)
            layers = layer_scores(depass, scored)
            if rule == "softmax" and source != Tokens():
                assert layers is None
                continue
            assert layers is not None
            summed = [float(layers[-1, slice(*span)].sum()) for span in scored.positions if span is not None]
            given = [
                score for score, span in zip(scored.scores.tolist(), scored.positions, strict=True) if span
            ]
            assert summed == pytest.approx(given, abs=1e-6)


def test_a_mean_is_over_the_prompt_alone() -> None:
    depass = DePass(build("llama"))
    ids = prompt(6)[None]
    mean = Direction(torch.linspace(-1, 1, 36).double(), position="mean")
    last = Direction(torch.linspace(-1, 1, 36).double())
    both: Any = depass.attribute(input_ids=ids, target=[[mean, last]])[0]
    with_answer: Any = depass.attribute(input_ids=ids, target=[[mean, Continuation([7, 9])]])[0]
    assert with_answer[0].value == pytest.approx(both[0].value, abs=1e-6)
    assert both[0].prediction == both[1].prediction
