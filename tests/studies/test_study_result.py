"""How an experiment is written down: the same numbers in every file, and a page that needs nothing else."""

import io
import json
import math
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from depass_lightning.errors import DePassError
from depass_lightning.studies import (
    Cloud,
    Curve,
    Panel,
    StudyResult,
    read_experiment,
    terminal_table,
    write_experiment,
)
from depass_lightning.studies.study_figures import curves_figure, points_figure
from depass_lightning.utils.bootstrap import Interval

CURVES = {
    "DePass": Curve.of([0, 2.5], [Interval(0.5, 0.4, 0.6), Interval(0.25, 0.125, 0.5)]),
    "random": Curve([0, 2.5], [0.5, 0.5]),
}
EXPERIMENT = StudyResult(
    name="paper_test",
    title="Is <b> a title?",
    model="/models/somewhere/small",
    data="a file, 3 rows",
    prompts=1200,
    seconds=3.25,
    settings={"seed": 4, "layers": [1, 2], "rule": "softmax"},
    panels=[Panel("top", "tokens", "accuracy", CURVES), Panel("rest", "tokens", "accuracy", CURVES)],
    table=[
        {"method": "DePass", "accuracy": Interval(0.5, 0.4, 0.6), "fitted": True},
        {"method": "random", "accuracy": Interval(0.25, 0.125, 0.5), "rank": 3},
    ],
    clouds=[Cloud("parts", [0.0, 1.0, 2.0], [1.0, 0.0, 1.0], ["French", "German", "French"])],
    notes=["Read & weep."],
    command="python analyze.py experiment=paper_test",
)


def changed(**fields):
    return StudyResult(**{**vars(EXPERIMENT), **fields})


def test_every_file_holds_the_same_numbers(tmp_path):
    page = write_experiment(EXPERIMENT, tmp_path / "deep" / "folder")
    folder = page.parent
    expected = "curves.parquet curves.svg points.parquet points.svg report.html results.json table.parquet"
    assert sorted(path.name for path in folder.iterdir()) == expected.split()
    rows = pq.read_table(folder / "curves.parquet").to_pylist()
    assert len(rows) == 8
    point = {"panel": "top", "method": "DePass", "x": 2.5, "y": 0.25, "low": 0.125, "high": 0.5}
    assert rows[1] == point
    assert rows[2] == {"panel": "top", "method": "random", "x": 0, "y": 0.5, "low": None, "high": None}
    first, second = pq.read_table(folder / "table.parquet").to_pylist()
    assert (first["accuracy"], first["accuracy_low"], first["accuracy_high"]) == (0.5, 0.4, 0.6)
    assert (first["rank"], second["rank"], second["fitted"]) == (None, 3, None)
    points = pq.read_table(folder / "points.parquet").to_pylist()
    assert points[1] == {"cloud": "parts", "group": "German", "x": 1.0, "y": 0.0}
    assert read_experiment(folder) == read_experiment(folder / "results.json") == EXPERIMENT


def test_the_page_says_what_was_run_and_needs_nothing_else(tmp_path):
    page = write_experiment(EXPERIMENT, tmp_path).read_text()
    for told in (
        "Is &lt;b&gt; a title?",
        "small",
        "a file, 3 rows",
        "1,200",
        "3.25 s",
        "[1, 2]",
        "Read &amp; weep.",
    ):
        assert told in page
    assert "0.500 (0.400 to 0.600)" in page
    assert "/models/" not in page
    assert page.count("data:image/svg+xml") == 4
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_an_experiment_without_pictures_is_a_page_too(tmp_path):
    page = write_experiment(changed(panels=[], clouds=[], table=[]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.parquet",
        "report.html",
        "results.json",
    ]
    assert "<img" not in page.read_text()
    assert read_experiment(tmp_path).panels == []


def test_the_figures_draw_what_was_measured():
    figure = curves_figure(EXPERIMENT.panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Top", "Rest"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert np.asarray(lines["DePass"].get_ydata()).tolist() == [0.5, 0.25]
    assert lines["random"].get_linestyle() == "--"
    assert len(figure.axes[0].collections) == 1  # one band: "random" has no intervals
    two: dict[str, Curve] = dict.fromkeys(("random part", "random rest"), CURVES["random"])
    lines = curves_figure([Panel("p", "x", "y", two)]).axes[0].get_lines()
    assert len({str(line.get_marker()) for line in lines}) == 2
    many: dict[str, Curve] = dict.fromkeys((f"method {i}" for i in range(14)), CURVES["DePass"])
    lines = curves_figure([Panel("p", "x", "y", many)]).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 14
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 14
    (axes,) = curves_figure([Panel("p", "x", "y", {"a": Curve([0, 0.02, 1, 20], [1, 0.5, 0, 0])})]).axes
    assert axes.get_xscale() == "symlog"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.02", "1", "20"]
    cloud = points_figure(EXPERIMENT.clouds)
    assert sum(np.asarray(own.get_offsets()).shape[0] for own in cloud.axes[0].collections) == 3


def test_the_terminal_shows_the_table():
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(terminal_table(EXPERIMENT))
    told = " ".join(console.export_text().split())
    for part in ("Is <b> a title?", "0.500 (0.400 to 0.600)", "small · a file", "1,200 prompts", "yes"):
        assert part in told
    assert "/models/" not in told
    many = {f"measure_{i}": Interval(0.5, 0.4, 0.6) for i in range(7)}
    console.print(terminal_table(changed(table=[many])))
    told = " ".join(console.export_text().split())
    assert "0.400" not in told
    assert "intervals on the page" in told
    console.print(terminal_table(changed(table=[{"a_difference": 1.0} | many]), 40))
    told = " ".join(console.export_text().split())
    assert "4 more columns and intervals on the page" in told
    assert "difference" not in told


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (Curve([0, 1], [0.5]), "'m' of 'p' needs one value for each place.*2 of x, 1 of y"),
        (Curve([], []), "one place at least"),
        (Curve([0], [math.nan]), "number in y that is not finite"),
        (Curve([0], [0.5], low=[0.1]), "one end of its intervals"),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_named_before_anything_is_written(curve, message, tmp_path):
    with pytest.raises(DePassError, match=message):
        write_experiment(changed(panels=[Panel("p", "x", "y", {"m": curve})]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cloud_needs_a_group_for_each_point(tmp_path):
    with pytest.raises(DePassError, match="1 groups for 2 points"):
        write_experiment(changed(clouds=[Cloud("c", [0, 1], [0, 1], ["a"])]), tmp_path)


def test_what_is_no_experiment_is_named(tmp_path):
    with pytest.raises(DePassError, match="there is no"):
        read_experiment(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"panels": []}))
    with pytest.raises(DePassError, match="holds no experiment"):
        read_experiment(tmp_path)
