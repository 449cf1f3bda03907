"""Attention recomputed from queries and keys, some queries at a time, against eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama import modeling_llama

from depass_lightning import Contrast, DePass, Heads, Module, Neurons, Token, Tokens
from depass_lightning.engine import mixture
from depass_lightning.engine.record import Recording, record
from tests.reference import zoo
from tests.reference.models import padded, prompt

# Grouped queries, windows, soft caps and norms after attention, sinks, values of another size than keys,
# parallel blocks, gates next to linear mixers; and ALiBi, whose attention stays eager.
FAMILIES = (
    "llama-biases",
    "mistral-window",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "phi",
    "qwen3_next",
    "bloom",
)
QUICK = ("gemma2", "gpt_oss")


def scores(depass: DePass, rule: Any) -> list[Tensor]:
    """The scores of tokens, heads, a module and neurons, of two padded prompts."""
    rows, mask = padded([prompt(9), prompt(6, seed=1)], "left")
    sources = [Tokens(), Heads(1), Module("mixer", 1), Neurons(1)]
    found = depass.attribute_sources(None, 7, sources, input_ids=rows, attention_mask=mask, rule=rule)
    return [attribution.scores for by_source in found for attribution in by_source]


def built(name: str, **changes: Any) -> DePass:
    depass = DePass(zoo.build(name, **changes))
    assert depass.decoder.recomputes == (name != "bloom")
    return depass


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_it_gives_what_eager_attention_gives(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = built(name, dtype=dtype)
    eager.decoder.recomputes = False
    depass = built(name, dtype=dtype)
    monkeypatch.setattr(mixture, "_CPU_BYTES", 600)  # one to three queries at a time
    for keeps in (True, False):
        if not keeps:  # blocks are run again, with what attention mixed kept
            monkeypatch.setattr(type(depass.decoder), "neurons", 10**9)
        for rule in ("half", "shap", "dual"):
            for one, other in zip(scores(depass, rule), scores(eager, rule), strict=True):
                limit = 1e-12 if dtype == torch.float64 else 1e-5
                assert (one - other).abs().max() <= limit * other.abs().max()


class Sizes(TorchDispatchMode):
    """The numbers of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.most = max(self.most, *sizes, 0)
        return result


@pytest.mark.parametrize("rule", ["half", "shap", "dual"])
def test_no_probabilities_of_all_heads_and_positions_are_held(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("llama", max_position_embeddings=512)
    depass, count, heads = DePass(model), 300, 6
    monkeypatch.setattr(mixture, "_CPU_BYTES", 2**16)
    with Sizes() as sizes:
        depass.attribute(input_ids=prompt(count)[None], target=7, rule=rule)
    assert sizes.most < heads * count * count / 4
    depass.decoder.recomputes = False
    with Sizes() as sizes:
        depass.attribute(input_ids=prompt(count)[None], target=7, rule=rule)
    assert sizes.most >= heads * count * count


def test_the_model_keeps_its_attention_in_a_recording() -> None:
    """No operation computes probabilities, and the logits are those of the fused kernel."""
    model = zoo.build("llama")
    depass, ids = DePass(model), prompt(9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    recording = record(depass.decoder, ids, torch.tensor([9]), torch.tensor([[8]]))
    assert torch.equal(recording.logits, expected)
    assert isinstance(recording.block(1).attention.mixture, mixture.ScoredMixture)


def test_attention_that_does_more_is_recorded_under_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    right = modeling_llama.LlamaAttention.forward

    def biased(self: Any, hidden_states: Tensor, **keywords: Any) -> Any:
        keywords["position_bias"] = torch.zeros(1)
        return right(self, hidden_states, **keywords)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", biased)
    depass = DePass(zoo.build("llama"))
    assert not depass.decoder.recomputes
    found = depass.attribute(input_ids=prompt(6)[None], target=7, rule="half")[0]
    assert found.completeness < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_targets_and_rounding_share_one_sweep(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    depass = built("gemma3", dtype=dtype)
    targets: list[Any] = [Token(3), Contrast(5, 7), Token(4)]

    def heads(target: Any) -> Any:
        return depass.attribute(input_ids=prompt(9)[None], target=target, source=Heads(), rule="half")[0]

    alone = [heads(target) for target in targets]
    frozen: list[int] = []
    block = Recording.block
    monkeypatch.setattr(Recording, "block", lambda self, layer: frozen.append(layer) or block(self, layer))
    together = heads([targets])
    assert frozen == [2, 1, 0]
    depass.memory_budget = 1  # they do not fit together
    singly = heads([targets])
    assert frozen == [2, 1, 0] * 4
    for target, expected in enumerate(alone):
        assert any("rounding" in name for name in expected.names) == (dtype == torch.bfloat16)
        assert expected.completeness < 1e-5
        for found in (together[target], singly[target]):
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
