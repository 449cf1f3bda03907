"""Conversations: the ids of eight families' chat templates, and every token in one turn or the template."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any, assert_type

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from depass_lightning import Attribution, Conversation, DePass, DePassError, Documents, Spans, Tokens
from depass_lightning.prompts import Prompt, prompts_of_texts
from depass_lightning.results.attributions import Attributions
from depass_lightning.sources import Source
from depass_lightning.sources.segments import segment
from depass_lightning.utils.chat_templates import formatted
from depass_lightning.utils.sections import from_json, sections_of, to_json
from tests.reference.models import build

# Written by hand, after the families' own; then the special tokens, of which the first is BOS.
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{% if m.tool_calls %}{{ {'name': m.tool_calls[0].function.name, 'parameters': "
        "m.tool_calls[0].function.arguments} | tojson }}{% else %}{{ m['content'] | trim }}{% endif %}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
        "\n\n{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}<tool_call>\n"
        "{{ m.tool_calls[0].function | tojson }}\n</tool_call>{% else %}{{ m.content }}{% endif %}<|im_end|>"
        "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% set offset = 0 %}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
        "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS]"
        "[{{ m.tool_calls[0].function | tojson }}]{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"],
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content or m.tool_calls | tojson }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
        "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{% set content = m.content or '' %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ content }}{% if m.tool_calls %}<｜tool▁call▁begin｜>{{ m.tool_calls[0].function.name }}\n"
        "```json\n{{ m.tool_calls[0].function.arguments | tojson }}\n```{% endif %}<｜end▁of▁sentence｜>"
        "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    ),
    "command-r": (
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>"
        "{% elif m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{% endif %}"
        "{{ (m.content or m.tool_calls | tojson).strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"],
    ),
    "harmony": (
        "<|start|>system<|message|>You are ChatGPT.<|end|>{% for m in messages %}{% if m.role == 'system' %}"
        "<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>{% elif m.tool_calls %}"
        "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json"
        "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif m.role == 'tool' %}"
        "<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}"
        "<|end|>{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ["<|startoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"],
    ),
}
CALL = {"function": {"name": "find_weather", "arguments": {"city": "Paris", "days": 2}}}
# What people say may be a role's name, a special token, the words of the template, or twice the same.
CHAT = [
    {"role": "user", "content": "  user\n"},
    {"role": "assistant", "content": "assistant: <|im_end|>\n<|im_start|>user [/INST] <|end|>"},
    {"role": "user", "content": "user"},
]
WITH_SYSTEM = [{"role": "system", "content": 'Be 短い, "terse".'}, *CHAT]
WITH_TOOLS = [
    {"role": "user", "content": "How is the weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "find_weather", "content": '12 "degrees"'},
]


def tokenizer_of(family: str, *, adds_bos: bool = True) -> Any:
    """A tokenizer of bytes with a family's special tokens, which puts BOS before a text and EOS after it."""
    template, special = TEMPLATES[family]
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    if adds_bos:
        ends = [(token, inner.token_to_id(token)) for token in (special[0], special[-1])]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A {special[-1]}", special_tokens=ends
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=special[0],
        eos_token=special[-1],
        additional_special_tokens=special[1:-1],
        chat_template=template,
    )


def prompt_of(messages: list[dict[str, Any]], tokenizer: Any) -> Prompt:
    (prompt,) = prompts_of_texts([Conversation(messages)], tokenizer, None)
    return prompt


def cases() -> list[Any]:
    chats = {"chat": CHAT, "system": WITH_SYSTEM, "tools": WITH_TOOLS}
    refused = {("gemma", "system"), ("gemma", "tools")}
    return [
        pytest.param(family, messages, id=f"{family}-{name}")
        for family in TEMPLATES
        for name, messages in chats.items()
        if (family, name) not in refused
    ]


@pytest.mark.parametrize(("family", "messages"), cases())
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_ids_are_those_of_the_chat_template(
    family: str, messages: list[dict[str, Any]], adds_bos: bool
) -> None:
    """Special tokens are there once, and the prompt does not end with EOS."""
    tokenizer = tokenizer_of(family, adds_bos=adds_bos)
    prompt = prompt_of(messages, tokenizer)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert prompt.ids == list(expected["input_ids"])


@pytest.mark.parametrize(("family", "messages"), cases())
def test_every_token_is_in_one_turn_or_in_the_template(family: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_of(family)
    prompt = prompt_of(messages, tokenizer)
    groups = segment(prompt, "turn", "character")
    assert sorted(position for group in groups for position in group) == list(range(len(prompt.ids)))
    (components,) = Spans("turn").describe(prompt, None)  # type: ignore[arg-type]
    assert [component.label for component in components[1:]] == [
        *(message["role"] for message in messages),
        "template",
    ]
    texts = {section.start: prompt.text[section.start : section.end] for section in prompt.sections}
    said = [texts[section.start] for section in prompt.sections]
    for message, text in zip(messages, said, strict=True):
        if message["content"] is None:
            assert "find_weather" in text
            assert "Paris" in text
        else:
            written = json.dumps(message["content"], ensure_ascii=False)[1:-1]
            assert text.strip() in (message["content"].strip(), written)


def test_a_text_that_the_template_cuts_is_located_by_what_is_left() -> None:
    chat = [*CHAT[:1], {"role": "assistant", "content": "<think>hm</think>yes"}, *CHAT[2:]]
    prompt = prompt_of(chat, tokenizer_of("deepseek"))
    assert [prompt.text[start:end] for _, _, start, end in prompt.sections] == ["  user\n", "yes", "user"]


def test_what_a_template_refuses_is_named() -> None:
    gemma = tokenizer_of("gemma")
    with pytest.raises(
        DePassError, match=r"refuses message 0 of the prompt, of the role 'system': System role"
    ):
        prompt_of(WITH_SYSTEM, gemma)
    with pytest.raises(
        DePassError, match=r"refuses message 1 of the prompt, of the role 'tool': unknown role"
    ):
        prompt_of([*CHAT[:1], {"role": "tool", "content": "x"}, *CHAT[1:]], gemma)
    gemma.chat_template = None
    with pytest.raises(
        DePassError, match="the prompt is a conversation, but the tokenizer has no chat template"
    ):
        prompt_of(CHAT, gemma)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is"),
        ("hello", "messages is 'hello'"),
        ([{"role": "user"}], "message 0 of the conversation, of the user, has no text"),
        ([{"content": "hi"}], "message 0 of the conversation is .* 'role' and a 'content'"),
        ([CHAT, [*CHAT, {"role": "user", "content": " "}]], "message 3 of conversation 1, of the user"),
    ],
)
def test_bad_messages_are_named(messages: Any, reason: str) -> None:
    depass = DePass(build("llama", max_position_embeddings=256, vocab_size=300), tokenizer_of("chatml"))
    with pytest.raises(DePassError, match=reason):
        depass.attribute(messages=messages)


def test_every_call_takes_messages() -> None:
    depass = DePass(
        build("llama", max_position_embeddings=256, vocab_size=300, dtype=torch.float64),
        tokenizer_of("chatml"),
    )
    assert depass.tokenizer is not None
    text = formatted(Conversation(CHAT), depass.tokenizer)
    ids = prompt_of(CHAT, depass.tokenizer).ids
    whole = depass.attribute(messages=CHAT, source=Spans("turn"))
    assert whole.names[1:] == ["user", "assistant", "user", "template"]
    assert whole.completeness < 1e-6
    assert whole.sections == list(sections_of(text))
    by_ids = depass.attribute(input_ids=[ids])[0]
    tokens = depass.attribute(messages=CHAT)
    assert torch.allclose(tokens.scores, by_ids.scores)
    grouped = tokens.grouped("turn")
    assert grouped.names == ["user", "assistant", "user", "template"]
    assert float(grouped.scores.sum()) == pytest.approx(float(tokens.scores.sum()), abs=1e-5)
    several = depass.attribute(messages=[CHAT, WITH_SYSTEM], target="a")
    assert [len(result.sections) for result in several] == [3, 4]
    sources: list[Source] = [Tokens(), Spans("turn")]
    one = depass.attribute_sources(messages=CHAT, target="a", sources=sources, batch_size=1)
    assert assert_type(one, list[Attribution])[0].token_ids == ids
    both = depass.attribute_sources(messages=CHAT, target=["a", None], sources=sources)
    assert len(assert_type(both, list[Attributions])[0]) == 2
    rows = depass.attribute_sources(messages=[CHAT, WITH_SYSTEM], target="a", sources=sources)
    assert [len(row) for row in assert_type(rows, list[list[Any]])] == [2, 2]
    with pytest.raises(DePassError, match="the list of sources is empty"):
        depass.attribute_sources(messages=CHAT)
    assert len(depass.decompose(messages=CHAT).components) == len(ids)
    assert depass.attribute_generation(messages=CHAT, max_new_tokens=1)[0].token_ids[: len(ids)] == ids
    assert depass.estimate(messages=CHAT).seconds > 0
    assert depass.estimate(messages=[CHAT, WITH_SYSTEM], source="heads", batch_size=2).seconds > 0
    with pytest.raises(DePassError, match="pass one of messages, prompts and input_ids"):
        depass.attribute("text", messages=CHAT)


def test_an_answer_is_a_section_of_its_own() -> None:
    depass = DePass(build("llama", max_position_embeddings=256, vocab_size=300), tokenizer_of("chatml"))
    call: Any = depass
    generated = call.attribute_generation(messages=CHAT, max_new_tokens=3)[2]
    assert [section.kind for section in generated.sections] == ["turn", "turn", "turn", "answer"]


def test_texts_with_sections_can_be_copied_and_stored() -> None:
    documents = Documents(["One. Two.", "Three."], "Four?")
    chat = Conversation([{"role": "user", "content": documents}])
    for text in (documents, chat, formatted(chat, tokenizer_of("chatml"))):
        for other in (
            copy.deepcopy(text),
            pickle.loads(pickle.dumps(text)),
            from_json(str(text), to_json(text)),
        ):
            assert type(other) is type(text)
            assert (other, sections_of(other)) == (text, sections_of(text))
            tokenizer = tokenizer_of("chatml")
            assert sections_of(formatted(other, tokenizer)) == sections_of(formatted(text, tokenizer))
    assert from_json("plain", to_json("plain")) == "plain"
