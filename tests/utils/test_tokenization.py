"""Text on its way in and out: special tokens, unknown words, turns, characters of many bytes."""

import html
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import markdown  # what TensorBoard shows text with
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from depass_lightning import Contrast, DePass, DePassError, Spans, Token
from depass_lightning.faithfulness import removal_curves, text_components
from depass_lightning.faithfulness.accuracy import answered_right
from depass_lightning.monitoring.probe_sets import load_set
from depass_lightning.monitoring.sinks import _cell
from depass_lightning.prompts import Prompt, continued, prompts_of_texts
from depass_lightning.reports.figures import _layout
from depass_lightning.reports.notebook import attribution_html
from depass_lightning.reports.page import page_html
from depass_lightning.reports.terminal import attribution_text
from depass_lightning.results.generation import Generation
from depass_lightning.sources.segments import segment
from depass_lightning.tasks import Example, load
from depass_lightning.utils.tokenization import continuation, encode
from depass_lightning.utils.words import word_spans, word_tokens
from tests.reference.attributions import ioi, spans
from tests.reference.models import build

TEXT = "the capital of France is"


@pytest.fixture
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def wrapped_by(depass: DePass, template: str) -> None:
    """Let the tokenizer add special tokens as a template says."""
    tokenizer: Any = depass.tokenizer
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )


def characters(text: str) -> Prompt:
    """A prompt whose tokens are BOS and single characters."""
    return Prompt(
        text,
        [0] * (len(text) + 1),
        ["<s>", *text],
        [(0, 0), *((i, i + 1) for i in range(len(text)))],
        "the prompt",
    )


def of_bytes() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # One token ends a character and begins the next.
    pairs = {letter: index for index, letter in enumerate(alphabet)}
    shift = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("你好")[0][0]
    pairs[shift[2:4]] = len(pairs)
    inner = Tokenizer(models.BPE(pairs, [(shift[2], shift[3])]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def test_a_bos_token_in_the_text_is_not_doubled(tiny: DePass) -> None:
    # A template writes the first word without a space, which this tokenizer reads as another word.
    text = "<s> " + TEXT
    with pytest.warns(UserWarning, match="begins with '<s>', which the tokenizer adds too; it is read once"):
        found = tiny.attribute(text, " Paris")
    tokenizer: Any = tiny.tokenizer
    assert found.token_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.tokens.count("<s>") == 1
    assert "".join(found.tokens) == text
    assert found.offsets is not None
    assert found.offsets[0] == (0, 0)
    assert 0 not in text_components(found), "removal leaves special tokens in place"
    plain = tiny.attribute(TEXT, " Paris")
    assert found.token_ids == plain.token_ids
    assert found.value == pytest.approx(plain.value, rel=1e-6)
    with pytest.warns(UserWarning, match="read once"):
        generation = tiny.attribute_generation(text, max_new_tokens=1)
    assert generation[0].token_ids == tiny.attribute_generation(TEXT, max_new_tokens=1)[0].token_ids
    with pytest.warns(UserWarning, match="1 of the prompts begin"):
        tiny.attribute([text, TEXT])


def test_a_bos_token_that_the_text_alone_has_is_special_too(tiny: DePass) -> None:
    wrapped_by(tiny, "$A")
    found = tiny.attribute("<s> " + TEXT, " Paris")
    assert found.tokens[:2] == ["<s>", " the"]
    assert 0 not in text_components(found)


def test_what_a_tokenizer_adds_after_a_text_is_left_out(tiny: DePass) -> None:
    expected = tiny.attribute(TEXT, Contrast(" Paris", " Oslo"))
    wrapped_by(tiny, "<s> $A </s>")
    found = tiny.attribute(TEXT, Contrast(" Paris", " Oslo"))
    assert (found.tokens, found.position) == (expected.tokens, len(expected.tokens) - 1)
    assert torch.equal(found.scores, expected.scores)
    assert tiny.attribute_generation(TEXT, max_new_tokens=1).generated == [" Paris"]
    assert len(answered_right(tiny, load("known", size=4))) == 4
    (before,) = removal_curves(tiny.model, [expected], [expected.target_ids[0]])
    (after,) = removal_curves(tiny.model, [found], [found.target_ids[0]])
    assert before.patch_top == after.patch_top
    tokenizer: Any = tiny.tokenizer
    assert encode(TEXT + "</s>", tokenizer).ids[-1] == tokenizer.eos_token_id, "the text's own one stays"


def test_half_a_surrogate_pair_is_named(tiny: DePass) -> None:
    with pytest.raises(
        DePassError, match=r"prompt 1 has half of a surrogate pair, '\\ud83d', at character 4"
    ):
        tiny.attribute([TEXT, "the \ud83d"])


def test_tokens_without_an_embedding_are_named(tiny: DePass) -> None:
    tokenizer: Any = tiny.tokenizer
    tokenizer.add_tokens(["<tool>"])
    size = tiny.decoder.vocabulary_size
    for prompt, target in (
        (f"{TEXT} <tool>", " Paris"),
        (TEXT, "<tool>"),
        (TEXT, Contrast(" Paris", "<tool>")),
    ):
        with pytest.raises(
            DePassError, match=rf"'<tool>' \(id {size}\), but the model has embeddings for {size}"
        ):
            tiny.attribute(prompt, target)


@pytest.mark.parametrize("target", [True, 1.5, Token(True), Token(1.5), Contrast(" Paris", False)])  # type: ignore[arg-type]
def test_targets_of_other_types_are_refused(tiny: DePass, target: Any) -> None:
    with pytest.raises(DePassError, match=r"is a (bool|float); pass a token's text or id"):
        tiny.attribute(TEXT, target)
    with pytest.raises(DePassError, match="position is 'last'; it must be a whole number"):
        tiny.attribute(TEXT, Token(" Paris", position="last"))  # type: ignore[arg-type]


def test_ids_may_be_lists() -> None:
    depass = DePass(build("llama"))
    rows: Any = [[1, 5, 7, 9], [1, 3]]
    first, second = (depass.attribute(input_ids=torch.tensor([row]), target=3)[0] for row in rows)
    alone: tuple[Any, ...] = (rows[0], rows[:1], np.array(rows[:1]))
    for given in alone:
        (found,) = depass.attribute(input_ids=given, target=3)
        assert torch.equal(found.scores, first.scores)
    both = depass.attribute(input_ids=rows, target=3)
    masked = depass.attribute(input_ids=[[1, 5, 7, 9], [1, 3, 0, 0]], attention_mask=[[1] * 4, [1, 1, 0, 0]])
    assert [len(own) for own in both] == [len(own) for own in masked] == [4, 2]
    torch.testing.assert_close(both[1].scores, second.scores, rtol=1e-5, atol=1e-6)
    refused: Any = ([[0.5, 1.0]], [True, False], "ab", [["a"]], [[1, 2], 3], [], [[]])
    for given in refused:
        with pytest.raises(DePassError, match="input_ids"):
            depass.attribute(input_ids=given, target=3)
    with pytest.raises(DePassError, match="attention_mask has shape"):
        depass.attribute(input_ids=[[1, 2, 3]], attention_mask=[[1, 1]], target=3)


def test_words_that_the_tokenizer_does_not_know_are_named(tiny: DePass) -> None:
    with pytest.warns(UserWarning, match="does not know 'wug', 'blick'; the model reads '<unk>' instead"):
        found = tiny.attribute("the wug of the blick wug is", " Paris")
    assert found.metadata["unknown_words"] == ["wug", "blick"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(attribution_text(found))
    for shown in (console.export_text(), attribution_html(found), page_html([found], title="T")):
        told = shown.replace("&#39;", "'").replace("\\u0027", "'")
        assert "does not know 'wug', 'blick'" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = tiny.attribute(TEXT + " <unk>", " Paris")
    assert "unknown_words" not in known.metadata
    assert "does not know" not in attribution_html(known)


CHATS = {
    "Llama 2": ("[INST] <<SYS>>\nBe kind.\n<</SYS>>|\n\nHi [/INST]| Hello! </s>|<s>[INST] And you? [/INST] "),
    "Mistral": "[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT]|[INST]Hi[/INST]|Hello!</s>|[INST]And you?[/INST]",
    "gpt-oss": (
        "<|start|>system<|message|>Be kind.<|end|>|<|start|>user<|message|>Hi<|end|>|"
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>|<|start|>assistant"
    ),
    "Granite": (
        "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n|"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    ),
    "DeepSeek R1": "Be kind.|<｜User｜>Hi|<｜Assistant｜><think>\n",
    "Command R": (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>|"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello!<|END_OF_TURN_TOKEN|>"
    ),
    "EXAONE": "[|system|]Be kind.[|endofturn|]\n|[|user|]Hi\n|[|assistant|]",
    "Llama 3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>|"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Llama 4": "<|header_start|>user<|header_end|>\n\nHi<|eot|>|<|header_start|>assistant<|header_end|>\n\n",
    "ChatML": "<|im_start|>user\nHi<|im_end|>\n|<|im_start|>assistant\n",
    "Gemma": "<start_of_turn>user\nHi<end_of_turn>\n|<start_of_turn>model\n",
    "Phi": "<|system|>Be kind.<|end|>|<|user|>Hi<|end|>|<|assistant|>",
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_turns_of_chat_templates(chat: str) -> None:
    markers = {"<|": "<\0", "|>": "\0>", "[|": "[\0", "|]": "\0]"}
    for marker, stands in markers.items():
        chat = chat.replace(f"|{marker}", f"\1{stands}").replace(marker, stands)
    turns = [own.replace("\0", "|") for own in chat.replace("|", "\1").split("\1")]
    prompt = characters("".join(turns))
    groups = segment(prompt, "turn", "character")
    assert groups[0] == [0]
    assert ["".join(prompt.tokens[i] for i in group) for group in groups[1:]] == turns


def test_a_text_without_turns_is_refused(tiny: DePass) -> None:
    with pytest.raises(DePassError, match=r"Spans\('turn'\): the prompt has no turn marker"):
        tiny.attribute(TEXT, " Paris", source=Spans("turn"))


def test_characters_over_several_tokens_are_one_text() -> None:
    tokenizer = of_bytes()
    (before,) = prompts_of_texts(["a"], tokenizer, None)
    for text in ("你好你好你好", "b🙂🏽🇳🇴", "你\ufffdb", "x👩\u200d👩\u200d👧y"):
        ids = tokenizer.encode(text)
        found = continued(before, ids, tokenizer)
        assert found.text == "a" + text
        assert found.offsets is not None
        assert all(low <= high for (low, _), (high, _) in zip(found.offsets, found.offsets[1:], strict=False))
        assert continuation(found.ids, 1, tokenizer) == tokenizer.decode(ids) == text
    broken = [*tokenizer.encode("你")[:1], *tokenizer.encode(" b c")]
    assert len(set(continued(before, broken, tokenizer).offsets or [])) == 1 + len(broken) - 1
    assert Generation([ioi()], "你好").continuation == "你好"


def test_a_generation_is_what_its_ids_say(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = of_bytes()
    depass = DePass(build("llama", vocab_size=300), tokenizer)
    ids = tokenizer.encode("你好")

    def says(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    monkeypatch.setattr(depass.model, "generate", says)
    found = depass.attribute_generation("a", max_new_tokens=len(ids))
    assert found.continuation == "你好"
    assert repr(found).startswith("Generation('你好'")


@pytest.mark.parametrize("by", ["configuration", "argument"])
def test_stop_strings_end_a_generation(tiny: DePass, by: str) -> None:
    whole = tiny.attribute_generation(TEXT, max_new_tokens=6)
    stop = whole.generated[1]
    arguments: dict[str, Any] = {"stop_strings": stop} if by == "argument" else {}
    config: Any = tiny.model.generation_config
    if by == "configuration":
        config.stop_strings = [stop]
    found = tiny.attribute_generation(TEXT, max_new_tokens=6, **arguments)
    assert found.generated == whole.generated[:2]
    assert config.stop_strings == ([stop] if by == "configuration" else None)
    with pytest.raises(DePassError, match=r"stop_strings=.* there is no tokenizer"):
        DePass(tiny.model).attribute_generation(input_ids=[[1, 2]], max_new_tokens=1, stop_strings="a")


def test_the_bytes_of_one_space_are_one_word() -> None:
    text = "at 3:00\u202fPM\u3000x"
    offsets = [
        (0, 2),
        (2, 4),
        (4, 5),
        (5, 7),
        (7, 8),
        (7, 8),
        (8, 10),
        (10, 11),
        (10, 11),
        (10, 11),
        (11, 12),
    ]
    numbers = word_tokens(text, offsets)
    assert numbers == [0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("🇳🇴🇸🇪", ["🇳🇴", "🇸🇪"]),
        ("👍🏽👍🏿 ok", ["👍🏽", "👍🏿", "ok"]),
        ("👩\u200d👩\u200d👧👧", ["👩\u200d👩\u200d👧", "👧"]),
        ("a1️⃣", ["a1️⃣"]),
        ("cafe\u0301's नमस्ते", ["cafe\u0301's", "नमस्ते"]),
        ("wait... 3.14!", ["wait", "...", "3.14", "!"]),
    ],
)
def test_what_is_seen_as_one_character_stays_in_one_word(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words


def test_tensorboard_shows_prompts_as_they_are() -> None:
    text = "2*3*4= __init__ `x` a|b <b>c</b> [d](e) ~~f~~ \\* &lt; $g$"
    shown = markdown.markdown(f"| p |\n| --- |\n| {_cell(text)} |", extensions=["tables"])
    assert f"<td>{text}</td>" in html.unescape(shown)
    assert not re.search("<(em|strong|code|b|a|del)[ >]", shown)
    assert shown.count("<td>") == 1
    assert _cell("a\nb") == "a↵b"


def test_a_figure_writes_what_follows_a_line_break() -> None:
    text = "one\ntwo\n  three four"
    names = ["one\ntwo\n  three", " four"]
    tokens = ["one", "\n", "two", "\n", "  ", "three", " four"]
    ends = np.cumsum([len(own) for own in tokens]).tolist()
    found = ioi(
        text=text,
        tokens=tokens,
        token_ids=list(range(7)),
        offsets=list(zip([0, *ends[:-1]], ends, strict=True)),
        scores=torch.tensor([1.0, 2.0]),
        components=spans(names, [(0, 6), (6, 7)]),
        position=6,
    )
    boxes, _ = _layout(found)
    assert [box.text for box in boxes] == ["one↵", "two↵", "three", "four"]
    assert [box.line for box in boxes] == [0, 1, 2, 2]
    assert boxes[2].left > boxes[1].left
    assert [box.score for box in boxes[1:3]] == [None, None], "a component's score is written once"


def test_a_model_is_right_only_where_the_answer_is_known(tmp_path: Path) -> None:

    def data(example: dict[str, Any]) -> Any:
        page = page_html([ioi(rank=1)], title="T", examples=[example])
        start = page.index('{"prompts"')
        return json.JSONDecoder().raw_decode(page[start:])[0]["prompts"][0]

    assert (data({})["right"], data({})["rank"]) == (None, 1)
    assert data({"correct": False})["right"] is False
    probes = [Example("a", TEXT, " Paris"), (TEXT, " Oslo")]
    assert [own.judged for own in load_set("p", probes, 2)] == [True, False]
    assert not load_set("p", probes, 1, "own")[0].judged
