"""Models with adapters of the `peft` package are explained as they are: as with these merged in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from depass_lightning import Contrast, DePass, DePassError, Heads, Neurons, Tokens
from depass_lightning.models.load import load_model
from tests.engine.test_untouched import must_stay_untouched
from tests.reference.models import distance, prompt
from tests.reference.zoo import build

TARGET = Contrast(5, 7)
MLP = ["gate_proj", "up_proj", "down_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}

# name: (tiny model, what LoRA's configuration has besides)
LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "queries and values": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every map": ("llama-biases", {"target_modules": EVERY}),
    "mlp": ("llama", {"target_modules": MLP}),
    "biases, rank-stabilised": (
        "llama-biases",
        {"target_modules": EVERY, "lora_bias": True, "use_rslora": True},
    ),
    "dora": ("llama-biases", {"target_modules": EVERY, "use_dora": True}),
    "transposed": ("gpt2", GPT2),
    "transposed dora": ("gpt2", GPT2 | {"use_dora": True}),
    "fused": ("gpt_neox", {"target_modules": "all-linear"}),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "copies of head and embedding": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "copies of norms": (
        "llama",
        {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm", "norm"]},
    ),
    "rows of the embedding": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}),
    "rows of a tied embedding": ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}),
    "rows of both": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 7]},
        },
    ),
    "a tied copy": (
        "gemma",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "experts": (
        "mixtral",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"source": Tokens()},
    "heads": {"source": Heads()},
    "neurons": {"source": Neurons(1)},
    "taylor": {"rule": "taylor", "engine": "adjoint"},
    "taylor, carried": {"rule": "taylor", "engine": "propagate"},
    "control": {"rule": "taylor", "attention_path": "control"},
}


def draw(model: Any, *, seed: int = 3) -> None:
    """Randomises every learnt parameter of an adapter."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or any(
                part in name for part in ("modules_to_save", "ia3", "tokens_delta")
            ):
                parameter.mul_(torch.rand(parameter.shape, generator=numbers) + 0.5)
            elif any(part in name for part in ("lora_", "hada_", "oft_", "vera_")):
                parameter.normal_(0.0, 0.1, generator=numbers)


def adapted(case: str) -> Any:
    name, settings = LORA[case]
    model = get_peft_model(
        build(name), LoraConfig(**({"r": 4, "lora_alpha": 6, "lora_dropout": 0.3} | settings))
    )
    draw(model)
    return model


def merged(model: Any, **arguments: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload(**arguments)


def explained(model: Any, way: dict[str, Any]) -> Any:
    return DePass(model).attribute(input_ids=prompt(9)[None], target=TARGET, **way)[0]


def assert_explained_alike(model: Any, other: Any, ways: Any = None) -> None:
    first, second = DePass(model), DePass(other)
    for way in ways or WAYS.values():
        given, expected = (
            depass.attribute(input_ids=prompt(9)[None], target=TARGET, **way)[0] for depass in (first, second)
        )
        assert given.names == expected.names
        assert given.value == pytest.approx(expected.value, rel=1e-4, abs=1e-5)
        # The control path's scores cancel, so float32 leaves more of them.
        assert distance(given.scores, expected.scores) < (
            5e-5 if way.get("attention_path") == "control" else 1e-5
        )
        if way.get("attention_path") != "control":
            assert given.completeness < 1e-5


@pytest.mark.parametrize("case", LORA)
@pytest.mark.covering(8)
def test_scores_are_those_of_the_merged_model(case: str) -> None:
    model = adapted(case)
    plain = build(LORA[case][0])
    assert distance(explained(model, {}).scores, explained(plain, {}).scores) > 1e-2
    assert_explained_alike(model, merged(model))


@pytest.mark.parametrize(
    "case",
    [
        "every map",
        "biases, rank-stabilised",
        "dora",
        "copies of head and embedding",
        "rows of a tied embedding",
    ],
)
@pytest.mark.covering(3)
def test_disabled_and_merged_adapters_are_as_the_model_is_then(case: str) -> None:
    model, ways = adapted(case), [WAYS["tokens"], WAYS["taylor"]]
    other = merged(model)
    with model.disable_adapter():
        assert_explained_alike(model, build(LORA[case][0]), ways)
    model.merge_adapter()
    assert_explained_alike(model, other, ways)
    model.unmerge_adapter()
    assert_explained_alike(model, other, ways)


def test_several_adapters_at_once() -> None:
    model = adapted("every map")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "down_proj"]))
    draw(model, seed=4)
    alone = explained(model, {})
    model.base_model.set_adapter(["default", "second"])
    assert distance(explained(model, {}).scores, alone.scores) > 1e-2
    assert_explained_alike(model, merged(model, adapter_names=["default", "second"]))


# Not adapters of experts: peft itself replaces their parameters at each call of the model.
@pytest.mark.parametrize("case", ["every map", "dora", "copies of head and embedding"])
def test_a_model_in_training_is_left_as_it_was(case: str) -> None:
    model = adapted(case)
    expected = [explained(model.eval(), way).scores for way in WAYS.values()]
    model.train()
    model.base_model.model.model.layers[1].eval()
    model(input_ids=prompt(6)[None], labels=prompt(6)[None]).loss.backward()
    adapter, config = model.active_adapter, dict(model.peft_config)
    with must_stay_untouched(model):
        given = [explained(model, way).scores for way in WAYS.values()]
    assert (model.active_adapter, dict(model.peft_config)) == (adapter, config)
    for one, two in zip(given, expected, strict=True):
        assert distance(one, two) < 1e-5
        assert not one.requires_grad


def test_an_adapter_is_trained_and_explained() -> None:
    base, tokenizer = load_model("tiny")
    text = "When Mary and John went to the store, John gave a drink to"
    before = DePass(base, tokenizer).attribute(text)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).train()
    ids = tokenizer(f"{text} John", return_tensors="pt").input_ids
    optimiser = torch.optim.AdamW((own for own in model.parameters() if own.requires_grad), lr=1e-2)
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for given in (model, base):  # whole, or the model inside, where the adapters are
        depass = DePass(given, tokenizer)
        after = depass.attribute(text)
        own = DePass(merged(model), tokenizer).attribute(text)
        assert after.prediction == own.prediction == " John" != before.prediction
        assert distance(after.scores, own.scores) < 1e-5
        assert after.completeness < 1e-5
    assert model.training


OTHERS: dict[str, Callable[[], Any]] = {
    "AdaLora": lambda: AdaLoraConfig(target_modules=EVERY, total_step=10, tinit=1, tfinal=2),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: LoHaConfig(r=2, target_modules=EVERY),
    "VeRA": lambda: VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=["v_proj", "gate_proj"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_that_do_not_add_up_are_asked(kind: str) -> None:
    model = get_peft_model(build("llama"), OTHERS[kind]())
    draw(model)
    assert distance(explained(model, {}).scores, explained(build("llama"), {}).scores) > 1e-3
    assert_explained_alike(model, merged(model), [WAYS["tokens"], WAYS["taylor"]])


REFUSED: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "alora_invocation_tokens": lambda: LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3]
    ),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_no_map_of_every_position_is_refused(named: str) -> None:
    model = get_peft_model(build("llama"), REFUSED[named]())
    with pytest.raises(DePassError, match=named):
        DePass(model)


def test_half_precision_adapters_keep_sums_exact() -> None:
    for case in ("every map", "dora"):
        own = explained(adapted(case).to(torch.bfloat16), {})
        assert own.names[-1] == "rounding"
        assert own.completeness < 1e-5
