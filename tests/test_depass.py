"""The face of the library: what goes in, what is refused and with which words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from depass_lightning import Contrast, DePass, DePassError, Token, Tokens
from depass_lightning.models.load import load_model
from tests.reference.models import VOCABULARY, build

WORDS = ["<s>", "</s>", "<unk>", "▁when", "▁Mary", "▁and", "▁John", "▁gave", "▁a", "▁drink", "▁to", "anna"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = WORDS + [f"▁w{index}" for index in range(VOCABULARY - len(WORDS))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("anna", "isolated")]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def depass(tokenizer: PreTrainedTokenizerFast) -> DePass:
    return DePass(build("qwen2"), tokenizer)


PROMPT = "when Mary and John gave a drink to"


def test_one_prompt_gives_one_attribution(depass: DePass) -> None:
    found = depass.attribute(PROMPT, Contrast(" Mary", " John"))
    assert found.names == [
        *("<s>", "when", " Mary", " and", " John", " gave", " a", " drink", " to", "bias"),
    ]
    assert found.target == "' Mary' − ' John'"
    assert found.text == PROMPT
    assert found.position == 8
    assert found.completeness < 1e-5
    with torch.no_grad():
        ids = torch.tensor([found.token_ids])
        logits = depass.model(input_ids=ids).logits[0, -1]
    assert found.value == pytest.approx(float(logits[4] - logits[6]), rel=1e-4)
    assert found.probability == pytest.approx(float(logits.softmax(-1)[4]), rel=1e-4)
    assert found.rank == 1 + int((logits > logits[4]).sum())
    assert found.metadata["temperature"] == 0.1


def test_a_list_gives_a_list_in_its_order(depass: DePass) -> None:
    prompts = [PROMPT, "when Mary", "when John gave a drink to Mary and"]
    found = depass.attribute(prompts, [" Mary", " John", None], batch_size=2)
    assert [entry.text for entry in found] == prompts
    assert found[2].rank == 1
    for entry, prompt, target in zip(found, prompts, (" Mary", " John", None), strict=True):
        alone = depass.attribute(prompt, target)
        torch.testing.assert_close(entry.scores, alone.scores, rtol=1e-4, atol=1e-5)


def test_what_stands_behind_the_position_scores_nothing(depass: DePass) -> None:
    found = depass.attribute(PROMPT, Token(" Mary", position=3))
    short = depass.attribute("when Mary and", Token(" Mary"))
    torch.testing.assert_close(found.scores[:4], short.scores[:4], rtol=1e-4, atol=1e-5)
    assert found.scores[4:-1].eq(0).all()
    assert found.scores[-1] == pytest.approx(float(short.scores[-1]), rel=1e-4)


def test_a_text_of_several_tokens_may_stand_for_its_first(depass: DePass) -> None:
    found = depass.attribute(PROMPT, Token(" Maryanna", first=True))
    torch.testing.assert_close(found.scores, depass.attribute(PROMPT, " Mary").scores)


REFUSED = [
    ({"prompt": ""}, r"the prompt is empty"),
    ({"prompt": ["when", "  "]}, r"prompt 1 is empty"),
    ({"prompt": []}, r"list of prompts is empty"),
    ({"prompt": " w1" * 70}, r"71 tokens, more than the model's context of 64"),
    ({"prompt": PROMPT, "target": " Maryanna"}, r"splits it into 2: .*Mary.* \+ 'anna'"),
    ({"prompt": PROMPT, "target": "zebra"}, r"not in the model's vocabulary"),
    ({"prompt": PROMPT, "target": VOCABULARY}, r"outside the vocabulary of 61 tokens"),
    ({"prompt": PROMPT, "target": 1.5}, r"is a float; pass a token's text or id"),
    ({"prompt": PROMPT, "target": Contrast(" Mary", " Mary")}, r"compares a token with itself"),
    ({"prompt": PROMPT, "target": Token(" Mary", position=9)}, r"has 9 tokens; the target's position 9"),
    ({"prompt": [PROMPT], "target": [1, 2]}, r"2 targets for 1 prompts"),
    (
        {"prompt": PROMPT, "source": Tokens(layer=3)},
        r"layer 3 is out of range; the model has 3 blocks, 0 to 2",
    ),
    ({"prompt": PROMPT, "rule": "sharp"}, r"rule 'sharp' is unknown; did you mean shap\?"),
    ({"prompt": PROMPT, "temperature": 0.0}, r"temperature is 0.0; it must be greater than zero"),
    ({"prompt": PROMPT, "bias": "keep"}, r"choose 'component' or 'drop'"),
    ({"prompt": PROMPT, "compat": "paper"}, r"choose None or 'paper_code'"),
    ({"prompt": PROMPT, "batch_size": 0}, r"batch_size is 0"),
    ({}, r"nothing to explain"),
    ({"prompt": PROMPT, "input_ids": torch.ones(1, 2, dtype=torch.long)}, r"not both"),
    ({"input_ids": torch.tensor([1, 2])}, r"shape \(2,\); it must be \[batch, position\]"),
    ({"input_ids": torch.tensor([[1, 99]])}, r"row 0 of input_ids has an id outside the vocabulary"),
    (
        {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[0, 0]])},
        r"row 0 of input_ids is empty",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_bad_input_is_named(depass: DePass, arguments: dict, message: str, monkeypatch) -> None:
    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("the expensive part has started")

    monkeypatch.setattr("depass_lightning.attribution.attribute.attribute_batch", must_not_run)
    with pytest.raises(DePassError, match=message):
        depass.attribute(**arguments)


def test_decompose_refuses_a_layer_before_the_split(depass: DePass) -> None:
    with pytest.raises(DePassError, match=r"to_layer=1 lies before layer 2"):
        depass.decompose(PROMPT, source=Tokens(layer=2), to_layer=1)


def test_text_needs_a_tokenizer(depass: DePass) -> None:
    without = DePass(depass.model)
    with pytest.raises(DePassError, match="there is no tokenizer"):
        without.attribute(PROMPT)
    with pytest.raises(DePassError, match="pass a token id, or a tokenizer"):
        without.attribute(input_ids=torch.tensor([[1, 2]]), target=" Mary")


def test_what_is_not_a_supported_model_is_refused() -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    with pytest.raises(DePassError, match="Linear is not a Hugging Face causal language model"):
        DePass(torch.nn.Linear(2, 2))
    # No declaration has this type, and its blocks do not tell which of their parts is which.
    config: Any = XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=16, vocab_size=11)
    config.model_type = "nameless"
    with pytest.raises(
        DePassError,
        match=r"model type 'nameless' is not supported: no family declares it.*llama.*register_family",
    ):
        DePass(XLNetLMHeadModel(config))


@pytest.mark.parametrize("working", [0, -1])
def test_a_memory_budget_must_be_positive(depass: DePass, working: int) -> None:
    with pytest.raises(DePassError, match="memory_budget"):
        DePass(depass.model, memory_budget=working).attribute(input_ids=torch.tensor([[1, 2]]))


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DePassError, match=r"hub cannot be reached.*pass the path of a \.gguf"):
        load_model("somebody/no-such-model-at-all")
    with pytest.raises(DePassError, match="there is no GGUF file at"):
        load_model(str(tmp_path / "missing.gguf"))
    with pytest.raises(DePassError, match="dtype 'float31' is unknown"):
        load_model("tiny", dtype="float31")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DePassError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_saved_model_is_the_same_from_its_folder(depass: DePass, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    assert depass.tokenizer is not None
    depass.tokenizer.save_pretrained(tmp_path)
    loaded = DePass.from_pretrained(str(tmp_path), dtype="float32")
    expected = DePass(model, depass.tokenizer).attribute(PROMPT, " Mary")
    found = loaded.attribute(PROMPT, " Mary")
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.names == expected.names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" w1" * 1_000, "has 3,000 characters; its first 2,048 have .* tokens, more than .* context of 64"),
        ("x" * 10_000_001, "has 10,000,001 characters, more than 10,000,000"),
    ],
)
def test_a_prompt_far_beyond_the_context_is_refused_unread(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    depass, read = DePass(build("llama"), tokenizer), []
    encode = type(tokenizer).__call__

    def counted(own: PreTrainedTokenizerFast, given: str, *args: object, **options: object) -> object:
        read.append(len(given))
        return encode(own, given, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    with pytest.raises(DePassError, match=said):
        depass.attribute(text)
    assert max(read, default=0) <= 2_048


@pytest.mark.filterwarnings("ignore:.*does not know")
def test_a_long_prompt_of_few_tokens_is_explained(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(DePass(build("llama"), tokenizer).attribute("w1 " + "x" * 3_000).scores) == 3


@pytest.mark.parametrize(
    ("name", "is_there"), [("callbacks", True), ("conf", True), ("tests", False), ("docs", False)]
)
def test_a_checkout_adds_only_callbacks_and_conf_to_the_package(name: str, is_there: bool) -> None:
    assert (importlib.util.find_spec(f"depass_lightning.{name}") is not None) == is_there
