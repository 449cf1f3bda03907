"""Classes that are not of transformers: LitGPT's, which comes declared, and others that tests declare."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from depass_lightning import (
    AttentionSpec,
    DePass,
    DePassError,
    FamilySpec,
    Heads,
    MLPSpec,
    ModelSpec,
    Neurons,
    register_family,
)
from depass_lightning.models import families
from depass_lightning.monitoring.monitor import ProbeMonitor
from tests.conftest import ROOT
from tests.reference.litgpt import GPT, Config
from tests.reference.models import prompt
from tests.reference.training import PROMPTS, Inside, tokenizer, vocabulary
from tests.reference.zoo import build

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"post_norms": True, "mlp_class_name": "GemmaMLP", "final_logit_softcapping": 3.0},
    "neox": {"parallel_residual": True, "mlp_class_name": "GptNeoxMLP", "bias": True, "lm_head_bias": True},
    "phi": {
        "parallel_residual": True,
        "shared_attention_norm": True,
        "mlp_class_name": "GptNeoxMLP",
        "bias": True,
        "rotary_percentage": 0.34,
        "n_query_groups": 4,
    },
}
SOURCES: list[dict[str, Any]] = [{}, {"source": Heads(), "rule": "taylor"}, {"source": Neurons(0)}]
CONTROLLED: list[dict[str, Any]] = [{}, {"rule": "taylor", "attention_path": "control"}]


def litgpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**changes)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


@pytest.fixture
def _declared() -> Iterator[None]:
    before = list(families.FAMILIES)
    yield
    families.FAMILIES[:] = before


@pytest.mark.parametrize("name", CONFIGS)
def test_litgpt_is_declared(name: str) -> None:
    model = litgpt(**CONFIGS[name])
    depass, ids = DePass(model), torch.stack([prompt(9), prompt(9) + 3])
    with torch.no_grad():
        logits = model(ids)[:, -1, 5]
    if (cap := model.config.final_logit_softcapping) is not None:
        logits = torch.atanh(logits / cap) * cap  # scores sum to the logit before the cap
    for options in SOURCES:
        for attribution, logit in zip(
            depass.attribute(input_ids=ids, target=5, **options), logits, strict=True
        ):
            assert attribution.completeness < 1e-7  # of torch's attention kernel
            assert attribution.value == pytest.approx(float(logit), rel=1e-6)
    control = depass.attribute(input_ids=ids, target=5, rule="taylor", attention_path="control")[0]
    assert control.scores.isfinite().all()
    assert float(control.scores.abs().sum()) > 0


def test_litgpt_has_the_scores_of_the_same_llama() -> None:
    llama: Any = build("llama", dtype=torch.float64)
    config = llama.config
    model = litgpt(
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_query_groups=config.num_key_value_heads,
        n_embd=config.hidden_size,
        head_size=llama.model.layers[0].self_attn.head_dim,
        intermediate_size=config.intermediate_size,
        padded_vocab_size=config.vocab_size,
    )
    pairs = [(model.lm_head, llama.lm_head), (model.transformer["wte"], llama.model.embed_tokens)]
    pairs.append((model.transformer["ln_f"], llama.model.norm))
    blocks: Any = model.transformer["h"]
    for block, layer in zip(blocks, llama.model.layers, strict=True):
        block.attn.qkv.weight.data = torch.cat(
            [getattr(layer.self_attn, f"{name}_proj").weight.data for name in "qkv"]
        )
        pairs += [(block.attn.proj, layer.self_attn.o_proj), (block.mlp.fc_1, layer.mlp.gate_proj)]
        pairs += [(block.mlp.fc_2, layer.mlp.up_proj), (block.mlp.proj, layer.mlp.down_proj)]
        pairs += [(block.norm_1, layer.input_layernorm), (block.norm_2, layer.post_attention_layernorm)]
    for module, original in pairs:
        module.weight.data = original.weight.data.clone()
    ids = prompt(9)[None]
    for options in CONTROLLED:
        both = [DePass(decoder).attribute(input_ids=ids, target=5, **options) for decoder in (model, llama)]
        (ours,), (theirs,) = ([attribution.scores for attribution in results] for results in both)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_litgpt_with_experts_is_refused() -> None:
    model = litgpt()
    model.config.mlp_class_name = "LLaMAMoE"
    with pytest.raises(DePassError, match=r"GPT is not a Hugging Face .*register_family"):
        DePass(model)


def test_a_monitor_takes_a_declared_class() -> None:
    model = litgpt(padded_vocab_size=len(vocabulary())).float()
    monitor = ProbeMonitor(Inside(model), tokenizer(), list(PROMPTS))  # type: ignore[arg-type]
    scalars = monitor.run(0).scalars
    assert scalars["depass/probes/failed"] == 0
    assert scalars["depass/probes/completeness"] < 1e-5
    assert any("removal" in name or "faithful" in name for name in scalars), sorted(scalars)


class Twice(nn.Module):
    """Attention with the softmax that a function has to choose: differential attention has two."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.inner, self.config = inner.qkv, inner.proj, [inner], inner.config

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        self.inner[0](x * 2, *arguments)
        return self.inner[0](x, *arguments)


@pytest.mark.usefixtures("_declared")
def test_attention_without_one_softmax_needs_a_function() -> None:
    model = litgpt()
    blocks: Any = model.transformer["h"]
    for block in blocks:
        block.attn = Twice(block.attn)
    with pytest.raises(DePassError, match=r"Twice takes 2 softmaxes .* AttentionSpec"):
        DePass(model)

    def probabilities(module: Any, *arguments: Any) -> Tensor:
        return AttentionSpec().probabilities(module.inner[0], *arguments)

    register_family(
        FamilySpec(
            (GPT,),
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention=AttentionSpec(
                module="attn",
                norm="norm_1",
                value="qkv",
                layout="concatenated",
                output="proj",
                probabilities=probabilities,
            ),
            mlp=MLPSpec(norm="norm_2", gate="fc_1", up="fc_2", down="proj"),
            model=ModelSpec("transformer.wte", "lm_head", heads=lambda model: model.config.n_head),
        )
    )
    assert DePass(model).attribute(input_ids=prompt(9)[None], target=5)[0].completeness < 1e-7


@pytest.mark.usefixtures("_declared")
def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/your-own-model.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "your-own-model.md", "exec"), names)
    assert names["attribution"].completeness < 1e-5
    assert len(capsys.readouterr().out.splitlines()) == 3
