"""Attributions to columns: every measure has one name, and columns only where it applies."""

import math
from dataclasses import replace

import pytest
import torch

from depass_lightning import DePass, DePassError, Heads, Module, Tokens, tasks
from depass_lightning.faithfulness import ROW_MEASURES, Case, ComponentMasking, TokenRemoval, evaluate
from depass_lightning.faithfulness.evaluate import entropy, evidence_first, on_target
from depass_lightning.results.component import Component
from depass_lightning.storage import ATTRIBUTION_SCHEMA
from tests.faithfulness.test_token_removal import attribution


def test_columns_are_there_where_a_measure_applies() -> None:
    """Also where the attributions are of several sources."""
    tiny = DePass.from_pretrained("tiny")
    (example,) = tasks.load("ioi", size=1)
    sources = [Tokens(), Heads(), Module("attention")]
    (attributions,) = tiny.attribute_sources([example.prompt], example.target(), sources)
    cases = [Case(scored, example.evidence_ranges(), example.answer) for scored in attributions]
    measures = (*ROW_MEASURES, TokenRemoval((0, 50), draws=0), ComponentMasking((0, 5)))
    tokens, heads, modules = evaluate(cases, measures, tiny)
    assert {"percents", "patch_top", "comprehensiveness", "evidence_first"} <= set(tokens)
    assert {"masked_percents", "mask_top", "mask_random"} <= set(heads)
    assert set(modules) == {"correct", "completeness"}
    assert not set(tokens) & {"mask_top", "patch_random", "zero_patch_top"}
    assert not set(heads) & {"patch_top", "evidence_first"}
    assert {*tokens, *heads} <= set(ATTRIBUTION_SCHEMA.names)
    for case, row in zip(cases, (tokens, heads, modules), strict=True):
        (alone,) = evaluate([case], measures, tiny)
        assert alone.keys() == row.keys()
        assert all(alone[name] == pytest.approx(row[name], rel=1e-4) for name in row)


def test_only_measures_that_run_the_model_need_it() -> None:
    case = Case(attribution([0.5, 1.0, 2.0, 0.0, 3.0]), [(0, 1)])
    (row,) = evaluate([case], [evidence_first, on_target])
    assert row == {"evidence_first": evidence_first(case), "on_target": on_target(case)}
    with pytest.raises(DePassError, match="token removal runs the model; pass depass="):
        evaluate([case], [evidence_first, TokenRemoval()])


def test_entropy_goes_from_one_component_to_all() -> None:
    for scores, expected in (([0.0, -3.0, 0.0], 0.0), ([2.0, -2.0, 2.0, 2.0], math.log(4)), ([0.0] * 3, 0.0)):
        components = [Component("component", "")] * len(scores)
        scored = replace(attribution([0.0] * 5), scores=torch.tensor(scores), components=components)
        assert entropy(Case(scored)) == pytest.approx(expected)
