"""`Tokens(refine=)`: the tokens that matter one by one, the others in spans."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from depass_lightning import Continuation, DePass, DePassError, Preference, Spans, Token, Tokens
from depass_lightning.attribution.refinement import partitioned
from tests.reference.models import build, distance


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass(build("llama-biases", dtype=torch.float64), max_positions=300)


def explained(depass: DePass, ids: list[int], **options: Any) -> Any:
    call: Any = depass.attribute
    return call(input_ids=[ids], **{"target": 3} | options)[0]


@pytest.mark.parametrize("rule", ["softmax", "max"])
def test_the_result_is_that_of_its_spans(depass: DePass, rule: str) -> None:
    ids = ids_of(200)
    refined = explained(depass, ids, source=Tokens(refine=40), rule=rule)
    ranges = [component.span for component in refined.components if component.span]
    assert len(ranges) <= 40
    assert sorted(place for start, end in ranges for place in range(start, end)) == list(range(200))
    assert {component.kind for component in refined.components} == {"token", "span", "bias"}
    spans = explained(depass, ids, source=Spans(ranges[1:], unit="token"), rule=rule)
    assert distance(refined.scores, spans.scores) < 1e-10
    assert refined.completeness < 1e-6


def test_the_largest_tokens_of_the_linear_rule_are_single(depass: DePass) -> None:
    ids = ids_of(200, seed=1)
    refined, half = explained(depass, ids, source=Tokens(refine=64)), explained(depass, ids, rule="half")
    first = [place for place in half.ranked(25, absolute=True) if half.components[place].kind == "token"]
    single = {component.index for component in refined.components if component.kind == "token"}
    assert set(first) <= single


def test_a_batch_is_refined_prompt_by_prompt(depass: DePass) -> None:
    ids, source = ids_of(120), Tokens(refine=32)
    rows = [ids, ids_of(90, seed=2), ids_of(20), ids, ids[:110], ids[:65], ids_of(60, seed=3)]
    targets = [
        *(3, 4, Token(5, position=10), 6),
        *(Continuation(ids[110:]), Continuation(ids[65:]), Token(3, position=50)),
    ]
    together = depass.attribute(input_ids=rows, target=targets, source=source, batch_size=8)
    for row, target, result in zip(rows, targets, together, strict=True):
        alone = explained(depass, row, target=target, source=source)
        assert result.positions == alone.positions
        assert distance(result.scores, alone.scores) < 1e-10
        assert len(result) <= 32 + 1  # and the bias
        if result.answer_start is not None:
            spans = [span for span in result.positions if span is not None]
            assert all(end <= len(row) or start >= len(row) for start, end in spans)
        assert result.metadata.get("refine", 32) == 32
    assert [component.kind for component in together[2].components[:20]] == ["token"] * 20


def test_nothing_is_refined_where_every_token_costs_no_more(depass: DePass) -> None:
    ids = ids_of(60)
    for options in ({"rule": "taylor"}, {"source": Tokens(refine=64)}):
        refined = explained(depass, ids, **{"source": Tokens(refine=32)} | options)
        whole = explained(depass, ids, rule=options.get("rule", "softmax"))
        assert refined.names == whole.names
        assert torch.equal(refined.scores, whole.scores)


def test_the_strongest_are_single_and_edges_are_kept() -> None:
    strengths = [0.0, 0.5, 3.0, 0.0, 0.0, 0.0, 2.0, 0.1, 0.1, 0.1]
    edges = {0, 1, 8, 10, 12}
    assert partitioned(strengths, edges, 4) == [(0, 1), (1, 8), (8, 10), (10, 12)]
    assert partitioned(strengths, edges, 5) == partitioned(strengths, edges, 4)  # no weaker one in its place
    assert partitioned([0.0, 5.0, 0.0, 0.0], {0, 1, 4}, 3) == [(0, 1), (1, 2), (2, 4)]
    assert partitioned(strengths, edges, 6) == [(0, 1), (1, 2), (2, 3), (3, 8), (8, 10), (10, 12)]
    assert partitioned(strengths, edges, 8) == [
        *((0, 1), (1, 2), (2, 3), (3, 6), (6, 7), (7, 8), (8, 10), (10, 12))
    ]
    assert partitioned(strengths, edges, 40) == [*((place, place + 1) for place in range(10)), (10, 12)]


def test_what_has_no_one_target_is_refused(depass: DePass) -> None:
    with pytest.raises(DePassError, match="joins other tokens for each answer"):
        explained(depass, ids_of(40), target=Preference([5], [6, 7]), source=Tokens(refine=32))
    with pytest.raises(DePassError, match="one target at a time"):
        depass.attribute_generation(input_ids=[ids_of(40)], source=Tokens(refine=32), max_new_tokens=2)
    with pytest.raises(DePassError, match="leave refine out"):
        depass.decompose(input_ids=[ids_of(40)], source=Tokens(refine=32))


@pytest.mark.parametrize("refine", [7, 0, 40.5, True])
def test_too_few_components_are_refused(refine: Any) -> None:
    with pytest.raises(DePassError, match="at least 8"):
        Tokens(refine=refine)
