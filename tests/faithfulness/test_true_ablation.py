"""True ablation against models whose weights are really zero or replaced, by torch alone."""

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from depass_lightning import Contrast, DePass, DePassError, Heads, Module, Neurons, Spans, Tokens, tasks
from depass_lightning.faithfulness.ablation_agreement import AblationAgreement, agreement
from depass_lightning.faithfulness.evaluate import Case
from depass_lightning.faithfulness.true_ablation import ablation_effects
from depass_lightning.methods import make_method
from depass_lightning.results.attribution import Attribution
from tests.reference import zoo
from tests.reference.models import build, prompt

pytestmark = pytest.mark.covering

TARGET = Contrast(7, 11)
IDS, OTHER = prompt(6), prompt(6, seed=4)
REFERENCES = [prompt(5, seed=2).tolist(), prompt(8, seed=3).tolist()]


def value(model: Any, ids: Tensor = IDS, **inputs: Any) -> float:
    given = inputs or {"input_ids": ids[None]}
    logits = model(**given, use_cache=False).logits[0, -1].detach()
    return float(logits[7] - logits[11])


def effects(depass: DePass, source: Any, replacement: Any = "zero", **options: Any) -> dict[str, float]:
    """By name, all positions replaced."""
    (found,) = depass.attribute(input_ids=IDS[None], target=TARGET, source=source, rule="max")
    (losses,) = ablation_effects(depass.decoder, [found], replacement, start=0, batch_size=4, **options)
    return {found.names[index]: loss for index, loss in losses.items()}


def changed(model: Any, name: str, *, keep: Tensor | None = None, bias: Tensor | None = None) -> Any:
    """A copy whose layer of that name has columns set to zero, and another bias."""
    model = copy.deepcopy(model)
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight.mul_(0 if keep is None else keep)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias if bias is None else bias)
    return model


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    """What a layer reads, `[position, width]`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    model(input_ids=ids[None], use_cache=False)
    handle.remove()
    return seen[0].detach()


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama-biases", dtype=torch.float64)


@pytest.fixture(scope="module")
def depass(model: Any) -> DePass:
    return DePass(model)


def test_zero_is_weights_of_zero(model: Any, depass: DePass) -> None:
    heads, neurons = effects(depass, Heads()), effects(depass, Neurons(1))
    assert len(heads) == 18
    assert len(neurons) == 44
    for layer, head in ((0, 0), (1, 4), (2, 5)):
        keep = torch.ones(36, dtype=torch.float64)
        keep[head * 6 : (head + 1) * 6] = 0
        without = changed(model, f"model.layers.{layer}.self_attn.o_proj", keep=keep)
        assert heads[f"layer {layer} head {head}"] == pytest.approx(value(model) - value(without), abs=1e-9)
    keep = torch.ones(44, dtype=torch.float64)
    keep[3] = 0
    without = changed(model, "model.layers.1.mlp.down_proj", keep=keep)
    assert neurons["neuron 3"] == pytest.approx(value(model) - value(without), abs=1e-9)
    kinds: tuple[tuple[Literal["attention", "mlp"], str], ...] = (
        ("attention", "self_attn.o_proj"),
        ("mlp", "mlp.down_proj"),
    )
    for kind, path in kinds:
        modules = effects(depass, Module(kind))
        assert len(modules) == 3
        nothing = torch.zeros(36, dtype=torch.float64)
        without = changed(model, f"model.layers.2.{path}", bias=nothing)
        assert modules[f"layer 2 {kind}"] == pytest.approx(value(model) - value(without), abs=1e-9)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
        ("opt", "model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"),
        ("gemma2", "model.layers.1.post_attention_layernorm", "model.layers.1.post_feedforward_layernorm"),
    ],
)
def test_modules_are_all_that_is_added(family: str, attention: str, mlp: str) -> None:
    """After a norm, where one follows; Gemma keeps the norm's weight less one."""
    model = zoo.build(family, dtype=torch.float64)
    depass = DePass(model)
    kinds: tuple[tuple[Literal["attention", "mlp"], str], ...] = (("attention", attention), ("mlp", mlp))
    for kind, path in kinds:
        without = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in without.get_submodule(path).parameters():
                parameter.fill_(-1 if family == "gemma2" else 0)
        found = effects(depass, Module(kind))[f"layer 1 {kind}"]
        whole, ablated = (_logits(own)[7] - _logits(own)[11] for own in (model, without))
        assert found == pytest.approx(float(whole - ablated), abs=1e-9)


def _logits(model: Any) -> Tensor:
    """Before any soft cap."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(input_ids=IDS[None], use_cache=False)
    handle.remove()
    return seen[0][0, -1].detach()


def test_the_mean_is_over_all_positions_of_the_references(model: Any, depass: DePass) -> None:
    """A head's mean goes into the output map's bias; an MLP's is what the whole map gives."""
    name = "model.layers.1.self_attn.o_proj"
    read = torch.cat([inputs_of(model, name, torch.tensor(ids)) for ids in REFERENCES]).mean(0)
    layer = model.get_submodule(name)
    keep = torch.ones(36, dtype=torch.float64)
    keep[12:18] = 0
    bias = layer.bias + layer.weight[:, 12:18] @ read[12:18]
    without = changed(model, name, keep=keep, bias=bias.detach())
    found = effects(depass, Heads(), "mean", references=REFERENCES)
    assert found["layer 1 head 2"] == pytest.approx(value(model) - value(without), abs=1e-9)
    name = "model.layers.0.mlp.down_proj"
    read = torch.cat([inputs_of(model, name, torch.tensor(ids)) for ids in REFERENCES]).mean(0)
    without = changed(model, name, bias=model.get_submodule(name)(read).detach())
    found = effects(depass, Module("mlp"), "mean", references=REFERENCES)
    assert found["layer 0 mlp"] == pytest.approx(value(model) - value(without), abs=1e-9)


def test_resampling_brings_in_another_prompts_activations(model: Any, depass: DePass) -> None:
    name = "model.layers.1.mlp.down_proj"
    written = model.get_submodule(name)(inputs_of(model, name, OTHER)).detach()
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, _o: written[None])
    ablated = value(model)
    handle.remove()
    found = effects(depass, Module("mlp"), "resample", references=[OTHER.tolist()])
    assert found["layer 1 mlp"] == pytest.approx(value(model) - ablated, abs=1e-9)
    same = effects(depass, Heads(), "resample", references=[IDS.tolist()])
    assert max(map(abs, same.values())) < 1e-9


def test_tokens_lose_their_embeddings(model: Any, depass: DePass) -> None:
    """All but the last one, after which the answer is read."""
    embedding = model.get_input_embeddings()
    states = embedding(IDS[None]).detach()
    mean = torch.cat([embedding(torch.tensor(ids)) for ids in REFERENCES]).mean(0).detach()
    other = embedding(OTHER).detach()
    for replacement, references, substitute in (
        ("zero", (), torch.zeros(6, 36, dtype=torch.float64)),
        ("mean", REFERENCES, mean.expand(6, -1)),
        ("resample", [OTHER.tolist()], other),
    ):
        (found,) = depass.attribute(input_ids=IDS[None], target=TARGET, source=Tokens(), rule="max")
        (losses,) = ablation_effects(depass.decoder, [found], replacement, references=references)  # type: ignore[arg-type]
        assert list(losses) == [0, 1, 2, 3, 4]
        for position, loss in losses.items():
            replaced = states.clone()
            replaced[0, position] = substitute[position]
            assert loss == pytest.approx(value(model) - value(model, inputs_embeds=replaced), abs=1e-9)
    span = Spans([(1, 3)], "token")
    (found,) = depass.attribute(input_ids=IDS[None], target=TARGET, source=span, rule="max")
    (losses,) = ablation_effects(depass.decoder, [found])
    replaced = states.clone()
    replaced[0, 1:3] = 0
    assert losses[1] == pytest.approx(value(model) - value(model, inputs_embeds=replaced), abs=1e-9)


def test_the_first_position_can_be_left_alone(model: Any, depass: DePass) -> None:
    name = "model.layers.2.mlp.down_proj"
    kept = model.get_submodule(name)(inputs_of(model, name, IDS)).detach()[None]
    kept[:, 1:] = 0
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, _o: kept)
    ablated = value(model)
    handle.remove()
    (found,) = depass.attribute(input_ids=IDS[None], target=TARGET, source=Module("mlp"), rule="max")
    (losses,) = ablation_effects(depass.decoder, [found])
    last = found.names.index("layer 2 mlp")
    assert losses[last] == pytest.approx(value(model) - ablated, abs=1e-9)


def test_agreement_by_hand() -> None:
    result = agreement(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 14.0]), top=0.5)
    assert result.pearson == pytest.approx(20 / (5 * 110) ** 0.5)
    assert (result.spearman, result.top_overlap) == (pytest.approx(1), 1.0)
    result = agreement(torch.tensor([4.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0, 3.0]), top=0.5)
    assert result.spearman == pytest.approx(-3 / (4.5 * 5) ** 0.5)  # ranks 4, 1.5, 1.5, 3 and 1, 2, 4, 3
    assert result.top_overlap == 0.5
    constant = agreement(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    assert (constant.pearson, constant.spearman) == (None, None)
    with pytest.raises(DePassError, match="as many effects"):
        agreement(torch.ones(3), torch.ones(2))
    with pytest.raises(DePassError, match="fraction"):
        agreement(torch.ones(3), torch.ones(3), top=0.0)


def test_methods_with_other_components_share_the_ablations() -> None:
    depass = DePass.from_pretrained("tiny")
    examples = list(tasks.load("ioi", size=12))
    texts, targets = [own.prompt for own in examples], [own.target() for own in examples]
    ours = [Case(own) for own in depass.attribute(texts, targets, source=Heads(), rule="taylor")]
    theirs = [Case(own) for own in make_method("atp", depass, Heads()).attribute(texts, targets)]
    for replacement in ("zero", "mean", "resample"):
        measure = AblationAgreement(replacement, references=texts)
        columns = measure.columns(ours, depass)
        measured = len(measure.cache)
        others = measure.columns(theirs, depass)
        assert len(measure.cache) == measured
        assert [list(own) for own in columns] == [list(own) for own in others]
        full = [own for own in columns if own]
        assert len(full) == 12 or replacement == "resample"
        assert set(full[0]) == {f"ablation_{replacement}_{name}" for name in ("pearson", "spearman", "top")}
        assert all(-1 <= own[f"ablation_{replacement}_pearson"] <= 1 for own in full)


def test_what_cannot_be_ablated_is_refused(depass: DePass) -> None:
    def scored(source: Any) -> Attribution:
        return depass.attribute(input_ids=IDS[None], target=TARGET, source=source, rule="max")[0]

    tokens = scored(Tokens())
    with pytest.raises(DePassError, match="replace with zero, mean, resample"):
        ablation_effects(depass.decoder, [tokens], "noise")  # type: ignore[arg-type]
    with pytest.raises(DePassError, match="mean ablation needs reference prompts"):
        ablation_effects(depass.decoder, [tokens], "mean")
    with pytest.raises(DePassError, match="1 attributions need as many prompts"):
        ablation_effects(depass.decoder, [tokens], "resample")
    with pytest.raises(DePassError, match="6 tokens cannot be resampled from one of 5"):
        ablation_effects(depass.decoder, [tokens], "resample", references=[IDS[:5].tolist()])
    with pytest.raises(DePassError, match="no reference prompt has a token at position 1"):
        ablation_effects(depass.decoder, [scored(Heads())], "mean", references=[[3]])
    with pytest.raises(DePassError, match="not those at layer 1"):
        ablation_effects(depass.decoder, [scored(Tokens(1))])
    with pytest.raises(DePassError, match="resample ablation needs reference prompts"):
        AblationAgreement("resample")
