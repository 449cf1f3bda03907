"""Every declared family against the real model, by an oracle that knows no family.

Sums alone do not prove a decomposition: the wrong half of a fused map still adds up. So components are
compared one by one with derivatives through the real model, its nonlinearities held fixed
(`tests/reference/zoo.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depass_lightning import (
    Contrast,
    DePass,
    DePassError,
    Direction,
    FamilySpec,
    Heads,
    Module,
    Neurons,
    Subspace,
    Token,
    Tokens,
    register_family,
)
from depass_lightning.engine.rules import RuleName
from depass_lightning.engine.validate import validate
from depass_lightning.methods import make_method
from depass_lightning.methods.places import place_of
from depass_lightning.models import families
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, MLPSpec
from tests.reference.models import distance, padded, prompt
from tests.reference.twin import LINEAR, Rule
from tests.reference.zoo import ALL, FIRST, ZOO, build, derivatives

pytestmark = pytest.mark.covering

TARGET = Contrast(5, 7)
EXPERTS = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
# One of each order of sublayers, of norms and of fused maps.
KINDS = (
    "gpt2",
    "gpt_neox",
    "gemma2-biases",
    "olmo2",
    "glm4",
    "cohere",
    "falcon-40b",
    "gpt_oss",
    "deepseek_v3",
    "opt-350m",
    "bloom-normed",
    "qwen3_5",
    "bitnet",
    "gemma4",
)
ADDING = (
    "mpt",
    "xglm",
    "doge",
    "falcon-rw",
)  # a bias of positions, scores of 3 dimensions, a dynamic mask, ALiBi
# Sinks outside the softmax, and norms inside attention: queries and keys cannot be followed.
UNFOLLOWED = ("granite_swa", "granitemoe_swa", "megatron-bert", "xlm-roberta-xl", "roberta-prelayernorm")
SOURCES: dict[str, Any] = {
    "tokens in the middle": Tokens(1),
    "heads": Heads(),
    "mixer": Module("mixer"),
    "mlp": Module("mlp"),
    "neurons": Neurons(1),
    "neurons of the first block": Neurons(0),
    "subspace": Subspace(1, torch.randn(2, 36, generator=torch.Generator().manual_seed(0))),
}


def lean(choices: Sequence[str], chosen: str, quick: Sequence[str] = KINDS) -> list[Any]:
    """Every choice for the families that all tests run on, and one for the others; one of a few is quick."""
    return [
        pytest.param(
            name,
            choice,
            marks=[] if name in quick and choice == chosen else [pytest.mark.slow],
            id=f"{name}-{choice}",
        )
        for name in ALL
        for choice in choices
        if name in FIRST or choice == chosen
    ]


def few(names: Sequence[str]) -> list[Any]:
    """All families, those that are not one of a kind marked as slow."""
    return [pytest.param(name, marks=[] if name in KINDS else [pytest.mark.slow]) for name in names]


def rename(model: Any, kind: str) -> None:
    """Give a model a type that it does not have."""
    model.config.model_type = kind


def completeness(attribution: Any) -> float:
    """The worst of its groups'."""
    groups = attribution.scores.view(attribution.groups, -1).double()
    size = max(abs(attribution.value), float(groups.abs().max()))
    return float((groups.sum(1) - attribution.value).abs().max()) / size


class Rounded(TorchDispatchMode):
    """Collects the operations with results coarser than float64; whole numbers are exact anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            coarse = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16)
            if coarse and not torch.equal(value, value.round()):
                self.operations.add(function.overloadpacket.__name__)
        return result


# The slopes that ALiBi adds to attention scores: a table, the same in every batch.
ALIBI = {"full", "pow", "cat", "unsqueeze", "mul", "repeat", "view", "_to_copy"}


@pytest.mark.parametrize("name", few(FIRST))
def test_models_in_float64_compute_in_float64(name: str) -> None:
    """Whatever float32 is left, as in a softmax, depends on lengths and on the processor."""
    model = build(name, dtype=torch.float64)
    with torch.no_grad(), Rounded() as rounded:
        model(prompt(9)[None], use_cache=False)
    assert rounded.operations <= (ALIBI if ZOO[name][0] in ("bloom", "falcon") else set())


@pytest.mark.parametrize(("name", "rule"), lean(LINEAR, "half", ALL))
def test_token_scores_are_the_real_models_derivatives(name: str, rule: Rule) -> None:
    model, ids = build(name, dtype=torch.float64), prompt(9)
    tokens, biases, value = derivatives(model, ids, 5, 7, half=rule == "half")
    if name == "gpt_oss" and rule == "half":
        biases = value - float(tokens.sum())  # it adds a one to a factor, which is no parameter
    assert abs(float(tokens.sum()) + biases - value) < 1e-12 * max(1, float(tokens.abs().max()))
    depass = DePass(model)
    engines: tuple[Literal["adjoint", "propagate"], ...] = ("adjoint", "propagate")
    for engine in engines:
        own = depass.attribute(input_ids=ids[None], target=TARGET, rule=rule, engine=engine)[0]
        assert own.value == pytest.approx(value, abs=1e-9)
        assert distance(own.scores[: len(ids)], tokens.float()) < 1e-6
        assert len(own.scores) == len(ids) + depass.decoder.has_biases
        if depass.decoder.has_biases:
            assert float(own.scores[-1]) == pytest.approx(biases, abs=1e-6)


@pytest.mark.parametrize(("name", "rule"), lean(("softmax", "half"), "softmax"))
def test_every_layers_components_add_up(name: str, rule: RuleName) -> None:
    model, ids = build(name, dtype=torch.float64), prompt(9)
    entered: list[torch.Tensor] = []
    depass = DePass(model)
    handles = [
        block.module.register_forward_pre_hook(
            lambda _module, given, named: entered.append(given[0] if given else named["hidden_states"]),
            with_kwargs=True,
        )
        for block in depass.decoder.blocks
    ]
    with torch.no_grad():
        model.config._attn_implementation_internal = "eager" if name != "falcon-rw" else "sdpa"
        model(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    layers = depass.decompose_layers(input_ids=ids[None], rule=rule)
    states = {layer.layer: layer.states.sum(0) for layer in layers}
    for layer, expected in enumerate(entered):
        assert distance(states[layer], expected[0]) < 1e-10


@pytest.mark.parametrize("name", few(FIRST))
def test_scores_add_up_in_float32(name: str) -> None:
    depass, ids = DePass(build(name)), prompt(9)[None]
    rules: tuple[RuleName, ...] = ("softmax", "max", "taylor", "half", "shap")
    for rule in rules:
        assert completeness(depass.attribute(input_ids=ids, target=TARGET, rule=rule)[0]) < 1e-5
    for source in (Heads(), Module("mlp")):
        assert completeness(depass.attribute(input_ids=ids, target=TARGET, source=source)[0]) < 1e-5


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in (*KINDS, *ADDING) else [pytest.mark.slow]) for name in ALL],
)
def test_shap_is_complete(name: str) -> None:
    """What is added to attention's scores is a constant, whatever the module that adds it."""
    if name in UNFOLLOWED:
        with pytest.raises(DePassError, match="take rule='half'"):
            DePass(build(name)).attribute(input_ids=prompt(7)[None], target=TARGET, rule="shap")
        return
    rows = torch.stack([prompt(7), prompt(7).flip(0)])
    depass = DePass(build(name, dtype=torch.float64), compute_dtype=torch.float64)
    results = depass.attribute(input_ids=rows, target=TARGET, rule="shap")
    for row, result in zip(rows, results, strict=True):
        (alone,) = depass.attribute(input_ids=row[None], target=TARGET, rule="shap")
        assert completeness(result) < 1e-6
        assert distance(result.scores, alone.scores) < 1e-9


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.covering(10)
def test_both_engines_agree(name: str, source: Any) -> None:
    depass = DePass(build(name, dtype=torch.float64))
    rows, mask = padded([prompt(9), prompt(6, seed=1)], "left")
    arguments: dict[str, Any] = {
        "input_ids": rows,
        "attention_mask": mask,
        "target": TARGET,
        "source": source,
    }
    for rule in LINEAR:
        forward = depass.attribute(**arguments, rule=rule, engine="propagate")
        backward = depass.attribute(**arguments, rule=rule, engine="adjoint")
        for one, other in zip(forward, backward, strict=True):
            assert distance(other.scores, one.scores) < 1e-6
            assert completeness(one) < 1e-5
    for rule in ("softmax", "shap"):
        for found in depass.attribute(**arguments, rule=rule):
            assert completeness(found) < 1e-5


@pytest.mark.parametrize(("name", "side"), lean(("left", "right"), "left"))
def test_padded_batches_equal_single_prompts(name: str, side: str) -> None:
    depass = DePass(build(name))
    rows = [prompt(17), prompt(9, seed=1), prompt(5, seed=2)]
    ids, mask = padded(rows, side)
    together = depass.attribute(input_ids=ids, attention_mask=mask, target=TARGET)
    for own, row in zip(together, rows, strict=True):
        alone = depass.attribute(input_ids=row[None], target=TARGET)[0]
        assert own.names == alone.names
        assert distance(own.scores, alone.scores) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.covering(7)
def test_rounding_is_a_component(name: str, dtype: torch.dtype) -> None:
    depass = DePass(build(name, dtype=dtype))
    rows, mask = padded([prompt(9), prompt(6, seed=1)], "right")
    ways: list[dict[str, Any]] = [
        {"rule": "softmax"},
        {"rule": "taylor", "engine": "propagate"},
        {"rule": "taylor", "engine": "adjoint"},
        {"rule": "half", "engine": "propagate"},
        {"rule": "half", "engine": "adjoint"},
    ]
    for way in ways:
        for source in (Tokens(), Heads(), Module("mlp"), Neurons(1)):
            found = depass.attribute(input_ids=rows, attention_mask=mask, target=TARGET, source=source, **way)
            for own in found:
                groups = own.scores.view(own.groups, -1)
                assert own.names[-1].endswith("rounding")
                assert completeness(own) < 1e-5
                assert 0 < groups[:, -1].abs().max() < 0.1 * groups.abs().max()
    state = depass.decompose(input_ids=rows, attention_mask=mask)[1]
    assert state.names[-1] == "rounding"


@pytest.mark.parametrize("name", KINDS)
def test_rounding_is_exact_for_the_bulk_of_neurons_and_several_targets(name: str) -> None:
    depass, ids = DePass(build(name, dtype=torch.bfloat16)), prompt(9)[None]
    targets: list[Any] = [Token(5), Contrast(4, 6, position=4), Direction(torch.ones(36), 2, position=3)]
    for source in (Tokens(), Neurons(0, top=4)):
        (found,) = depass.attribute(input_ids=ids, target=[targets], source=source)
        assert [own.completeness < 1e-5 for own in found] == [True] * 3
        assert found.names[-1] == "rounding"


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_dual_follows_any_mlp_as_half_does(name: str) -> None:
    """Without attention, which the two rules treat differently, they are the same."""
    model: Any = build(name, dtype=torch.float64)
    depass = DePass(model)
    arguments: dict[str, Any] = {"input_ids": prompt(7)[None], "target": TARGET}
    assert depass.attribute(**arguments, rule="dual")[0].completeness > 1e-2
    for block in depass.decoder.blocks:
        for parameter in block.attention.output.module.parameters():
            torch.nn.init.zeros_(parameter)
    dual, half = (DePass(model).attribute(**arguments, rule=rule)[0] for rule in ("dual", "half"))
    assert distance(dual.scores, half.scores) < 1e-6
    assert dual.completeness < 1e-5


def test_a_finer_precision_is_chosen() -> None:
    model, ids = build("llama"), prompt(9)[None]
    fine = DePass(model, compute_dtype="float64").attribute(input_ids=ids, target=TARGET)[0]
    plain = DePass(model).attribute(input_ids=ids, target=TARGET)[0]
    assert fine.names == [*plain.names, "rounding"]
    assert abs(float(fine.scores[-1])) < 1e-5
    assert distance(fine.scores[:-1], plain.scores) < 1e-5
    with pytest.raises(DePassError, match="int8"):
        DePass(model, compute_dtype="int8")


# Wrong declarations: each must be caught, and the error must name the place.
WRONG: dict[str, tuple[str, Any, str]] = {
    "halves swapped": ("llama", {"gate": "up_proj", "up": "gate_proj"}, "block 0 of .*MLP"),
    "beside each other": ("llama", "parallel", "block 0 of .*MLP"),
    "one behind the other": ("gpt_neox", "sequential", "block 0 of .*MLP"),
    "no norm behind": ("gemma2", "attention", "block 0"),
    "no norm behind the MLP": ("olmo2", {"post_norm": None}, "block 0 .*add up"),
    "wrong norm": ("llama", {"norm": "input_layernorm"}, "block 0"),
    "wrong values": ("gpt_neox", "values", "block 0 .*add up"),
    "no such part": ("llama", {"gate": "fc1"}, "no submodule 'mlp.*fc1'|fc1"),
    "residual scale": ("granite", "scale", "block 0"),
    "logit scale": ("granite", "logits", "unembedding"),
    "no norm on the stream": ("opt-350m", {"residual": "none"}, "block 0 of .*add up"),
    "norm on the stream": ("gemma2", {"residual": "post_norm"}, "block 0 of .*add up"),
    "normed before, not after": ("bloom-normed", {"residual": "none"}, "block 0 of .*add up"),
    "no gates": ("qwen3_5", "gates", "block 1 of "),
    "another kind of mixer": ("bamba", "mixer", "block 0 of .*no mixer of kind 'gated_delta'"),
    "no weight on the stream": ("doge", {"residual_weight": None}, "block 0 of .*add up"),
    "no shared expert": ("hunyuan_v1_moe", {"experts": ExpertsSpec()}, "block 0 of .*add up"),
    "values of another layout": ("codegen", "values", "block 0 of .*add up"),
    "no norm before the output map": ("bitnet", "inner norm", "block 0 of .*"),
    "no norm of the neurons": ("bitnet", {"inner_norm": None}, "block 0 of .*MLP"),
    "gates of another activation": ("laguna", "softplus", "block 0 of .*"),
    "no factor of the values": ("mimo_v2_flash", "value scale", "block 0 of .*"),
    "no bias after the output map": ("gpt_neox_japanese", "output bias", "block 2 of .*"),
    "no factor of the experts": (
        "laguna",
        {"experts": ExpertsSpec(shared="shared_experts")},
        "block 1 of .*",
    ),
    "no factor of the output": ("minimax", {"output_weight": None}, "block 0 of .*"),
    "no projection before the unembedding": ("opt-350m", "projection", "unembedding"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_declarations_are_caught(case: str) -> None:
    name, change, said = WRONG[case]
    model = build(name)
    spec = families.declared_families(model.config)[0]
    changes: dict[str, Any] = {
        "parallel": {"parallel": True},
        "sequential": {"parallel": False},
        "attention": {"attention": replace(spec.attention, post_norm=None)},
        "values": {"attention": replace(spec.attention, layout="concatenated")},
        "scale": {"residual_scale": None},
        "logits": {"logit_divisor": None},
        "gates": {"attention": replace(spec.attention, gate=None)},
        "mixer": {"attention": replace(spec.attention, mixers=(("mamba", "gated_delta"),))},
        "projection": {"final_projection": None},
        "inner norm": {"attention": replace(spec.attention, inner_norm=None)},
        "softplus": {"attention": replace(spec.attention, gate_activation="sigmoid")},
        "value scale": {"attention": replace(spec.attention, value_scale=None)},
        "output bias": {"attention": replace(spec.attention, output_bias=None)},
    }
    wrong = replace(spec, **(changes[change] if isinstance(change, str) else {}))
    if isinstance(change, dict):
        assert spec.mlp is not None
        wrong = replace(spec, mlp=replace(spec.mlp, **change))
    assert validate(Decoder(model, spec)) < 1e-5
    with pytest.raises(DePassError, match=said):
        validate(Decoder(model, wrong))


def test_a_missing_norm_of_the_values_is_caught() -> None:
    model = build("gemma4")
    (spec,) = families.declared_families(model.config)

    def wrong(block: Any) -> tuple[AttentionSpec, MLPSpec | None]:
        assert spec.by_block is not None
        attention, mlp = spec.by_block(block)
        assert attention is not None
        return replace(attention, value_norm=None), mlp

    with pytest.raises(DePassError, match="block 0 of Gemma4"):
        validate(Decoder(model, replace(spec, by_block=wrong)))


def test_the_wrong_half_of_a_fused_map_is_caught() -> None:
    model = build("phi3")
    right = Decoder(model, families.declared_families(model.config)[0])
    block = right.blocks[1]
    dense = block.mlp.dense
    assert dense is not None
    swapped = replace(dense, gate=dense.up, up=dense.gate)
    right.blocks[1] = replace(block, mlp=replace(block.mlp, dense=swapped))
    with pytest.raises(DePassError, match=r"block 1 of Phi3ForCausalLM, MLP: no activation"):
        validate(right)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "cohere", "gpt2", "gpt_neox", "opt", "gpt_oss"])
def test_undeclared_models_are_recognised_by_their_blocks(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = build(name), prompt(9)[None]
    declared = DePass(model).attribute(input_ids=ids, target=TARGET)[0]
    rename(model, "brand_new")
    found = DePass(model).attribute(input_ids=ids, target=TARGET)[0]
    assert "'brand_new' has no declaration; its blocks are built like those of" in caplog.text
    assert distance(found.scores, declared.scores) < 1e-6


def test_a_scale_that_a_configuration_lacks_is_named() -> None:
    model = build("llama")
    spec = replace(families.declared_families(model.config)[0], residual_scale=lambda config: config.depth)
    with pytest.raises(DePassError, match=r"'llama' lacks a number: .*depth"):
        Decoder(model, spec)


def test_a_family_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    model, ids = build("llama"), prompt(9)[None]
    expected = DePass(model).attribute(input_ids=ids, target=TARGET)[0]
    rename(model, "house_model")
    register_family(FamilySpec(("house_model",)))
    assert "house_model" in families.supported_model_types()
    assert torch.equal(DePass(model).attribute(input_ids=ids, target=TARGET)[0].scores, expected.scores)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rwkv", "the previous token"),
        ("albert", "an encoder"),
        ("deepseek_v4", "several residual streams"),
    ],
)
def test_what_cannot_be_decomposed_is_refused_by_name(kind: str, reason: str) -> None:
    model = build("llama")
    rename(model, kind)
    with pytest.raises(DePassError, match=f"'{kind}' is not supported: .*{reason}"):
        DePass(model)


@pytest.mark.parametrize(
    "name",
    [
        "lfm2",
        "bamba",
        "granitemoehybrid-dense",
        "qwen3_next",
        "nemotron_h",
        "mamba",
        "bert",
        "minimax",
        "falcon_h1",
    ],
)
@pytest.mark.covering(4)
def test_mixers_in_both_engines(name: str) -> None:
    """Their values' and convolutions' biases, gates and matrices, for components that begin at any place."""
    depass = DePass(build(name, dtype=torch.float64))
    rows, mask = padded([prompt(9), prompt(6, seed=1)], "left")
    for source in (Tokens(1), Heads(0), Module("mixer"), Neurons(0), Neurons(1)):
        arguments: dict[str, Any] = {"input_ids": rows, "attention_mask": mask, "source": source}
        forward = depass.attribute(**arguments, target=TARGET, rule="half", engine="propagate")
        backward = depass.attribute(**arguments, target=TARGET, rule="half", engine="adjoint")
        for one, other in zip(forward, backward, strict=True):
            assert distance(other.scores, one.scores) < 1e-6
            assert completeness(one) < 1e-5
        for own in depass.attribute(**arguments, target=TARGET, rule="softmax"):
            assert completeness(own) < 1e-5
    for own in depass.attribute(input_ids=rows, attention_mask=mask, target=TARGET, rule="shap"):
        assert completeness(own) < 1e-5


def test_heads_of_mixers_and_of_attention_are_told_apart() -> None:
    depass, ids = DePass(build("bamba")), prompt(9)[None]
    assert len(depass.attribute(input_ids=ids, source=Heads(0))[0].components) == 1 + 8 + 1
    with pytest.raises(DePassError, match="the blocks have 6, 8 heads"):
        depass.attribute(input_ids=ids, source=Heads())
    with pytest.raises(DePassError, match=r"block 0 has a linear mixer.*Module\('mixer'\)"):
        depass.attribute(input_ids=ids, source=Module("attention"))


def test_attention_and_a_state_space_side_by_side_are_one_mixer() -> None:
    depass, ids = DePass(build("falcon_h1")), prompt(9)[None]
    assert len(depass.attribute(input_ids=ids, source=Heads(0))[0].components) == 1 + (6 + 8) + 1
    with pytest.raises(DePassError, match="side by side, with an output map each"):
        place_of(depass.decoder, 0, "head")


@pytest.mark.parametrize(
    "method", ["mean_attention", "attention_rollout", "value_zeroing", "information_flow"]
)
def test_methods_of_attention_refuse_mixers(method: str) -> None:
    depass, ids = DePass(build("bamba")), prompt(9)[None]
    with pytest.raises(DePassError, match=f"{method}: block 0 of BambaForCausalLM has no attention"):
        make_method(method, depass).attribute(input_ids=ids, target=TARGET)


def test_experts_that_are_not_routed_to_take_no_part() -> None:
    for name in EXPERTS:
        depass, ids = DePass(build(name)), prompt(9)[None]
        last = len(depass.decoder.blocks) - 1
        own = depass.attribute(input_ids=ids, target=TARGET, source=Neurons(last))[0]
        used = int((own.scores[1 : depass.decoder.blocks[last].mlp.width + 1] != 0).sum())
        assert 0 < used < depass.decoder.blocks[last].mlp.width


def test_lightning_attention_over_long_blocks() -> None:
    """A whole block's decay is 0 for the fastest head in float32, and has no power."""
    model = build("minimax", block_size=256, max_position_embeddings=1024)
    (scored,) = DePass(model).attribute(input_ids=prompt(300)[None], target=5, rule="half")
    assert bool(scored.scores.isfinite().all())
    assert scored.completeness < 1e-5
