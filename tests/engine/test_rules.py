"""Competing rules: components that are cut into chunks share as they do together."""

from __future__ import annotations

import pytest
import torch

from depass_lightning.engine.rules import CompetingRule, rule_named

pytestmark = pytest.mark.covering


def gates() -> torch.Tensor:
    """`[segment, component, neuron]`; the greatest gate of some neurons is that of several components."""
    torch.manual_seed(0)
    return torch.randint(-3, 4, (4, 9, 50)).double()


@pytest.mark.parametrize("name", ["softmax", "max", "relu", "linear"])
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_chunks_share_as_the_whole_does(name: str, cut: int) -> None:
    """Among equals the first takes the neuron, wherever the chunks are cut."""
    rule, table = rule_named(name), gates()
    assert isinstance(rule, CompetingRule)
    present = torch.ones(4, 9, 1, dtype=torch.bool)
    present[0, :6] = False
    whole = rule.shares(table.clone(), present)
    parts = [slice(0, cut), slice(cut, 9)]
    first, second = (rule.summarise(table[:, part], present[:, part], part.start) for part in parts)
    summary = rule.merge(first, second)
    shares = [rule.share(table[:, part], present[:, part], summary, part.start) for part in parts]
    assert torch.allclose(torch.cat(shares, 1), whole, rtol=0, atol=1e-12)
    assert torch.allclose(whole.sum(1), torch.ones(4, 50).double())


def test_the_first_of_equals_takes_the_neuron() -> None:
    rule, table = rule_named("max"), gates()
    assert isinstance(rule, CompetingRule)
    shares = rule.shares(table.clone(), torch.ones(4, 9, 1, dtype=torch.bool))
    greatest = table == table.amax(1, keepdim=True)
    assert bool((greatest.sum(1) > 1).any())
    assert torch.equal(shares.argmax(1), greatest.double().argmax(1))
