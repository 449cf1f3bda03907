"""Means over rows against cases worked out by hand, on one process and on two."""

import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import (
    CurveMean,
    PromptMean,
    area,
    masking_metrics,
    number_metrics,
    removal_metrics,
    summarise,
)
from depass_lightning.storage import ATTRIBUTION_SCHEMA
from depass_lightning.utils.bootstrap import bootstrap

PERCENTS = [0.0, 50.0, 100.0]
HAND: list[dict[str, Any]] = [
    {"correct": True, "percents": PERCENTS, "patch_top": [1.0, 0.0, 0.0], "patch_random": [1.0, 0.5, 0.0]},
    {"correct": False, "percents": PERCENTS, "patch_top": [0.8, 0.4, 0.0], "patch_random": [0.8, 0.7, 0.0]},
    {"correct": True, "percents": None, "patch_top": None, "patch_random": None},
    {"correct": None, "percents": PERCENTS, "patch_top": [0.6, 0.5, 0.3], "patch_random": [0.6, 0.6, 0.3]},
    {"correct": True, "percents": None},
]


def test_a_number_and_a_curve_by_hand() -> None:
    number = PromptMean("correct")
    number.update(HAND[:3])
    number.update(HAND[3:])
    found = number.compute()
    assert found is not None
    assert (found.value, found.prompts, found.highest) == (0.75, 4, 1.0)
    expected = bootstrap([0, 1, 1, 1])
    assert (found.low, found.high) == (expected.low, expected.high)

    curve = CurveMean("patch_top", PERCENTS, points=True)
    curve.update(HAND)
    both = curve.compute()
    assert both is not None
    assert both.mean == pytest.approx([0.8, 0.3, 0.1])
    assert both.prompts == 3
    areas = [0.25, 0.4, 0.475]
    assert both.area is not None
    assert both.area.value == pytest.approx(sum(areas) / 3) == pytest.approx(area(PERCENTS, both.mean))
    assert [point.value for point in both.points] == pytest.approx(both.mean)
    assert both.points[1].low == pytest.approx(bootstrap([0, 0.4, 0.5]).low)
    (single,) = [CurveMean("sizes", [5.0])]
    single.update([{"sizes": [0.5]}])
    alone = single.compute()
    assert alone is not None
    assert alone.area is None


def test_the_order_of_prompts_changes_nothing() -> None:
    found = []
    for rows in itertools.permutations(HAND[:4]):
        metric = CurveMean("patch_top", PERCENTS)
        for row in rows:
            metric.update([row])
        found.append(metric.compute())
    assert all(own is not None and own.area == found[0].area for own in found)


def test_what_no_row_knows_is_none() -> None:
    metrics = (PromptMean("sufficiency"), CurveMean("mask_top", PERCENTS))
    for metric in metrics:
        metric.update(HAND)
        assert metric.compute() is None
    with pytest.raises(DePassError, match="must rise"):
        CurveMean("patch_top", [50, 10])


def test_every_column_is_the_schemas() -> None:
    columns = {
        *number_metrics().keys(),
        *removal_metrics(PERCENTS).keys(),
        *masking_metrics(PERCENTS).keys(),
    }
    assert columns <= set(ATTRIBUTION_SCHEMA.names)


def _share(rank: int, folder: str) -> None:
    """One process of two: it takes its rows, one of them nothing of a column, and writes what it computes."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        numbers, curves = number_metrics(), removal_metrics(PERCENTS, points=True)
        rows = HAND[:2] if rank == 0 else HAND[2:]
        numbers.update(rows)
        curves.update(rows)
        late = PromptMean("sufficiency")
        late.update([{"sufficiency": 0.25}] if rank == 1 else [])
        found = [numbers.compute(), curves.compute(), late.compute()]
        # One process that summarises by itself must not wait for the other.
        own = summarise(HAND) if rank == 0 else None
        Path(folder, f"{rank}.json").write_text(json.dumps([found, own]))
    finally:
        distributed.destroy_process_group()


def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    arguments = (str(tmp_path),)
    multiprocessing.start_processes(_share, arguments, nprocs=2, start_method="fork")  # type: ignore[attr-defined]
    shares = [json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in (0, 1)]
    numbers, curves = number_metrics(), removal_metrics(PERCENTS, points=True)
    numbers.update(HAND)
    curves.update(HAND)
    alone = json.loads(json.dumps([numbers.compute(), curves.compute(), [0.25, 0.25, 0.25, 0.25, 1]]))
    assert shares[0][0] == shares[1][0] == alone
    assert shares[0][1] == json.loads(json.dumps(summarise(HAND)))
    assert alone[0]["correct"][0] == 0.75
    assert alone[1]["patch_top"][1] == pytest.approx([0.8, 0.3, 0.1])


def many(count: int) -> Iterator[dict[str, Any]]:
    """Rows as large as those of real prompts, each made when it is asked for."""
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        curve = torch.rand(3, generator=generator).tolist()
        yield {
            "correct": number % 4 > 0,
            "completeness": number * 1e-9,
            "scores": [0.5] * 8000,
            "percents": PERCENTS if number >= 300 else None,
            "patch_top": curve if number >= 300 else None,
            "patch_random": curve if number >= 300 else None,
        }


def test_a_summary_takes_rows_as_they_come() -> None:
    """One pass over a generator, most of whose rows are gone before the next is made."""
    tracemalloc.start()
    summary = summarise(many(3000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80e6  # all rows have 192 MB; what is drawn at once for an interval has most of this
    assert (summary["prompts"], summary["correct"]) == (3000, 0.75)
    assert summary["completeness_max"] == pytest.approx(2999e-9)
    entry = summary["patch_top_area"]
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] == pytest.approx(entry["chance"])
    assert entry["high"] - entry["low"] == pytest.approx(2 * 1.96 * (0.375 / 12 / 2700) ** 0.5, rel=0.15)
    assert "recover_top_area" not in summary


def test_masked_heads_are_summed_up_beside_a_random_order() -> None:
    row = {
        "masked_percents": [0.0, 50.0],
        "mask_top": [1.0, 0.0],
        "mask_bottom": [1.0, 1.0],
        "mask_random": [1.0, 0.5],
        "comprehensiveness": 0.5,
        "comprehensiveness_random": 0.25,
    }
    summary = summarise([row])
    assert summary["mask_top_area"]["value"] == 0.5
    assert summary["mask_bottom_area"]["chance"] == 0.75
    assert summary["masking_curves"]["mask_top"] == {
        "fraction": [0.0, 0.5],
        "depass": [1.0, 0.0],
        "random": [1.0, 0.5],
    }
    assert summary["comprehensiveness"] == {
        "value": 0.5,
        "chance": 0.25,
        "note": "higher is better",
        "low": 0.5,
        "high": 0.5,
    }
