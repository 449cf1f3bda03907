"""Every method has DePass's face: prompts, batches, targets, names; and leaves the model as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from depass_lightning import (
    Contrast,
    DePass,
    DePassError,
    Direction,
    Heads,
    Module,
    Neurons,
    Spans,
    Token,
    Tokens,
)
from depass_lightning.engine.rules import RuleName
from depass_lightning.faithfulness import (
    MASKED,
    PERCENTS,
    RATIONALES,
    CitationRemoval,
    ComponentMasking,
    TokenRemoval,
    ablation_effects,
)
from depass_lightning.methods import METHODS, Baseline, DePassMethod, make_method
from tests.conftest import ROOT
from tests.engine.test_untouched import in_the_middle_of_training, must_stay_untouched
from tests.reference import zoo
from tests.reference.models import build, padded, prompt

TARGET = Contrast(7, 11)
PROMPTS = [prompt(length, seed=length) for length in (5, 9)]
FAMILIES = ("llama", "gpt2", "gemma2", "falcon-rw", "gpt_oss")
OPTIONS: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "gradient_shap": {"samples": 2},
    "shapley": {"samples": 1},
    "lime": {"samples": 6},
    "context_cite": {"samples": 6},
    "reagent": {"samples": 2, "steps": 3},
}
# Ids have no words. What these leave out of the longer prompt does not stand together.
RANGES = Spans([(4, 5), (1, 3)], "token")


def methods(depass: DePass, *, neurons: bool = True) -> list[Any]:
    """Every baseline with every kind of component that it scores."""
    found = []
    for name, method in METHODS.items():
        if not issubclass(method, Baseline):
            continue
        for kind in method.sources:
            if neurons or kind is not Neurons:
                made = {Spans: RANGES, Module: Module("mlp")}
                source = made[kind] if kind in made else kind()
                found.append(make_method(name, depass, source, **OPTIONS.get(name, {})))
    return found


def names(method: Any) -> str:
    return f"{method.name} of {method.source.kind}"


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] * (family != "llama")) for family in FAMILIES]
)
def test_a_batch_gives_what_single_prompts_give(family: str) -> None:
    """And DePass's own names, values and predictions, in every family, padded on either side."""
    model = zoo.build(family, dtype=torch.float64)
    depass = DePass(model)
    ids, mask = padded(PROMPTS, "left")
    of_depass: dict[str, list[Any]] = {}  # by the kind of source, which several methods share
    for method in methods(depass, neurons=family != "gpt_oss"):
        if method.source.kind not in of_depass:
            of_depass[method.source.kind] = [
                depass.attribute(input_ids=row[None], target=TARGET, source=method.source, rule="max")[0]
                for row in PROMPTS
            ]
        together = method.attribute(input_ids=ids, attention_mask=mask, target=TARGET)
        for prompt_ids, found, ours in zip(PROMPTS, together, of_depass[method.source.kind], strict=True):
            (alone,) = method.attribute(input_ids=prompt_ids[None], target=TARGET)
            scale = float(alone.scores.abs().max())
            assert torch.allclose(found.scores, alone.scores, rtol=0, atol=1e-5 * scale), names(method)
            assert found.names == alone.names
            left = [name for name in ours.names if not name.endswith(("state", "bias", "rounding"))]
            assert found.names == left
            assert found.positions == [
                span for name, span in zip(ours.names, ours.positions, strict=True) if name in left
            ]
            assert found.groups == ours.groups
            assert found.value == pytest.approx(ours.value, rel=1e-6)
            for fact in ("target", "prediction", "rank", "position", "layer", "source", "token_ids"):
                assert getattr(found, fact) == getattr(ours, fact), (names(method), fact)
            assert found.probability == pytest.approx(ours.probability)
            assert found.rule == method.name
            assert found.target_ids == ours.target_ids == [7, 11]


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name], Baseline)])
def test_what_stands_behind_the_target_scores_nothing(name: str) -> None:
    method = make_method(name, DePass(build("llama", dtype=torch.float64)), **OPTIONS.get(name, {}))
    own = PROMPTS[1]
    (cut,) = method.attribute(input_ids=own[None, :6], target=TARGET)
    (whole,) = method.attribute(input_ids=own[None], target=Contrast(7, 11, position=5))
    if method.source.positional:
        assert whole.scores[6:].tolist() == [0, 0, 0]
        assert len(whole.names) == len(whole.positions) == 9
        assert torch.allclose(whole.scores[:6], cut.scores, atol=1e-6)
    else:
        assert torch.allclose(whole.scores, cut.scores, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the model's tokenizer does not know")
def test_text_comes_in_one_by_one_and_in_lists() -> None:
    """Prompts of the bundled model; one target for all, one per prompt, and the model's next token."""
    depass = DePass.from_pretrained("tiny")
    texts = ["When Mary and John went out, John gave it to", "Then Anna met Tom, and Tom gave a drink to"]
    for method in methods(depass):
        one = method.attribute(texts[0], Contrast(" Mary", " John"))
        assert one.target == "' Mary' − ' John'"
        assert one.text == texts[0]
        assert one.offsets is not None
        both = method.attribute(texts, [" Mary", None])
        assert [found.target for found in both] == ["' Mary'", repr(both[1].prediction)]
        assert both[0].scores.shape == one.scores.shape
        assert method.attribute(texts, Token(" Mary"))[1].target == "' Mary'"
        own = depass.attribute(texts[0], Contrast(" Mary", " John"), source=method.source)
        left = {name for name in own.names if name not in one.names}
        compared = own.without(left).compare(one) if left else own.compare(one)
        assert -1 <= compared.spearman <= 1


@pytest.mark.filterwarnings("ignore:the model's tokenizer does not know")
def test_depass_itself_has_the_same_face() -> None:
    depass = DePass.from_pretrained("tiny")
    texts = ["When Mary and John went out, John gave it to", "Then Anna met Tom, and Tom gave a drink to"]
    rules: tuple[tuple[str, RuleName], ...] = (
        ("depass", "softmax"),
        ("taylor", "taylor"),
        ("half", "half"),
        ("shap", "shap"),
        ("dual", "dual"),
    )
    for name, rule in rules:
        for source in (None, Heads()):
            found = make_method(name, depass, source).attribute(texts, [" Mary", " Anna"], batch_size=1)
            expected = depass.attribute(texts, [" Mary", " Anna"], source=source or Tokens(), rule=rule)
            assert [own.rule for own in found] == [rule, rule]
            assert all(torch.allclose(a.scores, b.scores) for a, b in zip(found, expected, strict=True))
    relu = make_method("depass", depass, rule="relu")
    assert isinstance(relu, DePassMethod)
    assert relu.attribute(texts[0]).rule == "relu"


def test_a_model_in_training_is_left_as_it_was() -> None:
    model = build("llama-biases", attention="sdpa")
    in_the_middle_of_training(model)
    own = prompt(6)[None]
    for method in methods(DePass(model)):
        with must_stay_untouched(model):
            (first,) = method.attribute(input_ids=own, target=TARGET)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # as a Trainer predicts
            (again,) = method.attribute(input_ids=own, target=TARGET)
        assert torch.equal(first.scores, again.scores), names(method)


def test_frozen_parameters_do_not_matter() -> None:
    model = build("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for method in methods(DePass(model)):
        (found,) = method.attribute(input_ids=prompt(5)[None], target=TARGET)
        assert torch.isfinite(found.scores).all()


def test_what_cannot_be_scored_is_refused() -> None:
    depass = DePass(build("llama"))
    ids = prompt(5)[None]
    with pytest.raises(DePassError, match="no method 'sage'; choose one of depass, taylor"):
        make_method("sage", depass)
    with pytest.raises(DePassError, match="no option 'stepz'; it takes steps, rows"):
        make_method("integrated_gradients", depass, stepz=3)
    with pytest.raises(DePassError, match="atp does not score Tokens"):
        make_method("atp", depass, Tokens())
    with pytest.raises(DePassError, match=r"atp does not score Spans; it scores Heads\(\), Neurons\(\)"):
        make_method("atp", depass, Spans())
    for name, method in METHODS.items():
        if issubclass(method, Baseline) and Tokens in method.sources:
            assert Spans in method.sources
            for source in (Tokens(1), Spans(layer=1)):
                kind = type(source).__name__
                with pytest.raises(DePassError, match=rf"{name} .* leave {kind}\(layer=\) at 0"):
                    make_method(name, depass, source)
    with pytest.raises(DePassError, match="positions must be"):
        make_method("norm", depass, Heads(), positions="first")
    with pytest.raises(DePassError, match="how must be"):
        make_method("occlusion", depass, how="blur")
    for name, option in (
        ("occlusion", "rows"),
        ("integrated_gradients", "steps"),
        ("gradient_shap", "samples"),
    ):
        with pytest.raises(DePassError, match="at least 1"):
            make_method(name, depass, None, **{option: 0})
    method = make_method("input_gradient", depass)
    with pytest.raises(DePassError, match="not Direction"):
        method.attribute(input_ids=ids, target=Direction(torch.ones(36), 2))
    with pytest.raises(DePassError, match="one target a prompt"):
        method.attribute(input_ids=ids, target=[[1, 2]])  # type: ignore[list-item]
    with pytest.raises(DePassError, match="vocabulary"):
        method.attribute(input_ids=ids, target=1000)
    for family in ("mixtral", "deepseek_v3"):
        with pytest.raises(DePassError, match="is a mixture of experts"):
            make_method("atp", DePass(zoo.build(family)), Neurons())
    dense = make_method("atp", DePass(zoo.build("qwen3_moe")), Neurons(1))  # among others, a dense block
    assert len(dense.attribute(input_ids=ids, target=TARGET)[0]) == 44


CONF = ROOT / "conf"


def options_of(path: Path) -> dict[str, Any]:
    """A configuration's values, with what the command adds."""
    own = OmegaConf.merge({"seed": 5}, {"own": OmegaConf.load(path)})
    found = OmegaConf.to_container(own, resolve=True)
    assert isinstance(found, dict)
    return found["own"]


def test_every_method_has_a_configuration() -> None:
    """DePass's rules have theirs in rule=, the calibrated one with its file."""
    depass = DePass(build("llama"))
    paths = sorted((CONF / "method").glob("*.yaml"))
    assert {path.stem for path in paths} == {*METHODS} - {"taylor", "half", "shap", "dual", "calibrated"}
    for path in paths:
        options = options_of(path)
        assert options["name"] == path.stem
        method = make_method(depass=depass, **options)
        assert all(getattr(method, key) == value for key, value in options.items() if key != "name")


def test_what_is_measured_has_a_configuration() -> None:
    found = {path.stem: options_of(path) for path in (CONF / "faithfulness").glob("*.yaml")}
    assert found.pop("none") == {"faithfulness": None}
    measures = {name: instantiate(own, _convert_="all") for name, own in found.items()}
    assert measures == {
        "removal": TokenRemoval(list(PERCENTS), seed=5, rationales=list(RATIONALES)),
        "masking": ComponentMasking(list(MASKED), seed=5),
        "citations": CitationRemoval(seed=5),
    }


def test_mlps_without_a_module_of_their_own_are_refused() -> None:
    """Granite's blocks call their experts themselves: the block's output is not what its MLP writes."""
    depass = DePass(zoo.build("granitemoe"))
    (scored,) = depass.attribute(input_ids=prompt(5)[None], target=3, source=Module("mlp"), rule="half")
    for ask in (
        lambda: make_method("atp", depass, Module("mlp")),
        lambda: ablation_effects(depass.decoder, [scored], "zero"),
    ):
        with pytest.raises(DePassError, match="block 0 of GraniteMoeForCausalLM runs its experts itself"):
            ask()
