"""Generated tokens: one pass over the finished text against one pass a token, and the model's own words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from depass_lightning import DePass, DePassError, Heads, Token, Tokens
from depass_lightning.engine.record import record
from depass_lightning.prompts import continued, prompts_of_texts
from depass_lightning.reports.matrix import score_matrix
from depass_lightning.results.generation import Generation
from tests.engine.test_untouched import must_stay_untouched
from tests.reference.models import ONE_OF_EACH, VOCABULARY, build, prompt

pytestmark = pytest.mark.covering

TEXT = "When Mary and John went to the store, John gave a drink to"
NEVER: dict[str, Any] = {"eos_token_id": VOCABULARY}  # random models else may stop at once


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def tokens_of(found: Generation) -> list[int]:
    return found[0].token_ids


CASES = [
    *((name, rule, Tokens()) for name in ONE_OF_EACH for rule in ("softmax", "taylor")),
    *(("llama-biases", rule, Tokens()) for rule in ("softmax", "max", "relu", "linear", "taylor", "dual")),
    ("qwen2", "softmax", Tokens(1, exclude_first=False)),
    *(("qwen2", rule, Tokens(-1)) for rule in ("softmax", "taylor")),
]


@pytest.mark.parametrize(("name", "rule", "source"), CASES)
@pytest.mark.covering(6)
def test_one_pass_equals_a_pass_for_each_token(name: str, rule: Any, source: Tokens) -> None:
    depass = DePass(build(name, dtype=torch.float64))
    count = 7
    # More tokens than a head has values go another way through the last attention than few do.
    for new in (3, 12):
        found = depass.attribute_generation(
            input_ids=prompt(count)[None], max_new_tokens=new, rule=rule, source=source, **NEVER
        )
        assert found.scores.shape == (new, len(found.names))
        assert found.names[: count + new] == found.tokens
        ids = torch.tensor([tokens_of(found)])
        for index in (0, new // 2, new - 1):
            place = count - 1 + index
            target = Token(int(ids[0, place + 1]), position=place)
            (alone,) = depass.attribute(input_ids=ids, target=target, rule=rule, source=source)
            own = found[index]
            assert (own.names, own.target, own.position) == (alone.names, alone.target, place)
            assert own.value == pytest.approx(alone.value, rel=1e-6)
            assert own.rank == 1
            torch.testing.assert_close(own.scores, alone.scores, rtol=1e-5, atol=1e-6)
            assert found.scores[index, place + 1 : count + new].eq(0).all()
            assert torch.equal(found.scores[index], own.scores)
        if rule == "dual":  # which is not complete
            continue
        assert found.completeness.max() < 1e-6
        torch.testing.assert_close(found.scores.sum(1), found.values, rtol=1e-5, atol=1e-5)


def test_constants_stand_apart_only_where_there_are_any() -> None:
    ids = prompt(7)[None]
    biased, plain = DePass(build("llama-biases")), DePass(build("llama"))
    assert biased.attribute_generation(input_ids=ids, max_new_tokens=2, **NEVER).names[-1] == "bias"
    dropped = biased.attribute_generation(input_ids=ids, max_new_tokens=2, bias="drop", **NEVER)
    assert "bias" not in dropped.names
    assert dropped.completeness.max() > 1e-3
    assert "bias" not in plain.attribute_generation(input_ids=ids, max_new_tokens=2, **NEVER).names


@pytest.mark.parametrize("rule", ["softmax", "taylor"])
def test_the_finished_text_is_recorded_once(monkeypatch, rule: Any) -> None:
    depass, lengths = DePass(build("qwen2")), []

    def counted(decoder: Any, input_ids: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        lengths.append(input_ids.shape)
        return record(decoder, input_ids, *arguments, **keywords)

    monkeypatch.setattr("depass_lightning.attribution.forward.record", counted)
    depass.attribute_generation(input_ids=prompt(7)[None], max_new_tokens=9, rule=rule, **NEVER)
    assert lengths == [(1, 7 + 9 - 1)]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_it_generates_what_the_model_does(name: str) -> None:
    model: Any = build(name, attention="sdpa")
    ids = prompt(7)[None]
    expected = model.generate(input_ids=ids, max_new_tokens=9, do_sample=False, **NEVER)
    found = DePass(model).attribute_generation(input_ids=ids, max_new_tokens=9, **NEVER)
    assert tokens_of(found) == expected[0].tolist()
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 3.0, **NEVER}
    torch.manual_seed(3)
    expected = model.generate(input_ids=ids, max_new_tokens=9, **sampling)
    torch.manual_seed(3)
    sampled = DePass(model).attribute_generation(input_ids=ids, max_new_tokens=9, **sampling)
    assert tokens_of(sampled) == expected[0].tolist()
    assert tokens_of(sampled) != tokens_of(found)
    assert sampled[0].metadata["temperature"] == 0.1


def test_it_is_greedy_unless_asked_for_something_else() -> None:
    model: Any = build("llama")
    ids = prompt(7)[None]
    expected = model.generate(input_ids=ids, max_new_tokens=9, do_sample=False, **NEVER)
    model.generation_config.do_sample = True
    found = DePass(model).attribute_generation(input_ids=ids, max_new_tokens=9, **NEVER)
    assert tokens_of(found) == expected[0].tolist()


def test_it_stops_at_an_end_of_text_and_explains_it() -> None:
    depass, ids = DePass(build("llama")), prompt(7)[None]
    whole = tokens_of(depass.attribute_generation(input_ids=ids, max_new_tokens=9, **NEVER))
    end = whole[9]
    found = depass.attribute_generation(input_ids=ids, max_new_tokens=9, eos_token_id=end)
    assert tokens_of(found) == whole[: whole.index(end, 7) + 1]
    assert found.generated[-1] == str(end)
    assert found[-1].completeness < 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, ids = build(name, attention="sdpa", attention_dropout=0.5).train(), prompt(7)[None]
    depass = DePass(model)
    with must_stay_untouched(model):
        first = depass.attribute_generation(input_ids=ids, max_new_tokens=4, **NEVER)
    model.eval()
    second = depass.attribute_generation(input_ids=ids, max_new_tokens=4, **NEVER)
    assert torch.equal(first.scores, second.scores)
    with must_stay_untouched(model), pytest.raises(DePassError, match="refuses these arguments"):
        depass.attribute_generation(input_ids=ids, wings=2)


def test_memory_changes_no_score() -> None:
    model, ids = build("qwen3-biases", dtype=torch.float64), prompt(7)[None]
    for new in (3, 12):
        large, small = (
            DePass(model, memory_budget=budget).attribute_generation(
                input_ids=ids, max_new_tokens=new, **NEVER
            )
            for budget in (None, 10_000)
        )
        torch.testing.assert_close(small.scores, large.scores, rtol=1e-6, atol=1e-7)


def test_text_and_tokens_read_on(tiny: DePass) -> None:
    found = tiny.attribute_generation(TEXT, max_new_tokens=3)
    own = found[1]
    assert found.text == TEXT + "".join(found.generated)
    assert found.tokens[-3:] == found.generated
    assert own.offsets is not None
    assert [found.text[start:end] for start, end in own.offsets][-3:] == found.generated
    assert own.text_of((1, len(found.tokens))) == found.text
    assert repr(found).startswith("Generation(' Mary")
    alone = tiny.attribute(TEXT, " Mary")
    torch.testing.assert_close(found.scores[0, : len(alone)], alone.scores, rtol=1e-4, atol=1e-5)
    assert own.words().completeness < 1e-5


def test_bytes_of_one_character_are_read_together() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    (before,) = prompts_of_texts(["a"], tokenizer, None)
    end: Any = tokenizer.eos_token_id
    for text in ("bé", "é 🙂b", "x€€"):
        ids = tokenizer.encode(text)
        found, whole = (
            continued(before, [*ids, end], tokenizer),
            prompts_of_texts(["a" + text], tokenizer, None),
        )
        assert found.text == "a" + text
        assert found.ids == [*whole[0].ids, end]
        assert found.offsets == [*(whole[0].offsets or []), (0, 0)]
        assert found.tokens == [*whole[0].tokens, "</s>"]
    # A character that was not finished, at the end and before a special token.
    for ids in (tokenizer.encode("€")[:2], [*tokenizer.encode("€")[:2], end]):
        found = continued(before, ids, tokenizer)
        assert len(found.tokens) == len(found.offsets or []) == 1 + len(ids)
        assert found.text == f"a{tokenizer.decode(tokenizer.encode('€')[:2])}"


@pytest.mark.parametrize("width", [40, 200])
def test_the_matrix_shows_every_token_once_a_column(tiny: DePass, width: int) -> None:
    found = tiny.attribute_generation(TEXT, max_new_tokens=12)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(score_matrix(found, width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    # The strongest of each column is written as ten tenths.
    assert sum(line.count("+10") + line.count("−10") for line in lines) >= len(found)
    first = [line.split() for line in lines if "John" in line]
    assert sum(len(cells) - 1 for cells in first) == 2 * len(found)
    for number in range(1, 13):
        assert any(str(number) in line.split() for line in lines)


def test_it_is_shown_and_written(tiny: DePass, tmp_path: Path, capsys) -> None:
    found = tiny.attribute_generation(TEXT, max_new_tokens=2)
    found.show()
    assert "store" in capsys.readouterr().out
    found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("Mary") > 1
    with pytest.raises(IndexError):
        found[2]


IDS = torch.tensor([[1, 5, 7]])
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing to explain"),
    ({"prompt": TEXT}, "there is no tokenizer"),
    ({"prompt": "a", "input_ids": IDS}, "not both"),
    ({"input_ids": IDS.repeat(2, 1)}, "there are 2 prompts; generate from one at a time"),
    ({"input_ids": IDS, "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"input_ids": IDS, "max_new_tokens": None}, "max_new_tokens is None"),
    ({"input_ids": IDS, "max_new_tokens": 62}, "3 tokens, and 62 new ones are more than .* context of 64"),
    ({"input_ids": IDS, "source": Heads()}, "source is Heads; what is generated is attributed to Tokens"),
    ({"input_ids": IDS, "source": Tokens(5)}, "layer 5 is out of range"),
    ({"input_ids": IDS, "rule": "sharp"}, "rule 'sharp' is unknown"),
    ({"input_ids": IDS, "rule_temperature": 0.0}, "temperature is 0.0"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input_is_named(arguments: dict[str, Any], message: str, monkeypatch) -> None:
    model = build("llama")

    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("the expensive part has started")

    monkeypatch.setattr(model, "generate", must_not_run)
    with pytest.raises(DePassError, match=message):
        DePass(model).attribute_generation(**arguments)


def test_several_texts_are_refused() -> None:
    with pytest.raises(DePassError, match="generate gave 2 texts"):
        DePass(build("llama")).attribute_generation(
            input_ids=IDS, max_new_tokens=2, num_beams=2, num_return_sequences=2, **NEVER
        )
