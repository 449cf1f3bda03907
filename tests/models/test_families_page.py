"""`docs/families.md` lists the declared families, and is what its command writes."""

from __future__ import annotations

import re

import pytest
import transformers

from depass_lightning import DePass, DePassError
from depass_lightning.models import families
from tests.reference.families_table import ERRORS, PAGE, SECTIONS, TEXTS, refused, row_of, section
from tests.reference.zoo import ALL, ZOO

TEXT = PAGE.read_text(encoding="utf-8")
MEASURED = ("gpt2", "gpt_neox", "gemma2", "olmo2", "qwen3_moe", "gpt_oss", "deepseek_v3")
LIMITS = dict(zip(ERRORS, (1e-10, 1e-6, 1e-5, 1e-5, 0.1, 1e-4), strict=True))
# Their tiny random models are badly conditioned: a value close to zero, or as inexact in float32 by itself.
CONDITIONED = {"bert", "ernie", "xlm-roberta-xl", "roberta-prelayernorm"}
# With images around the decoder that is measured.
INSIDE_ANOTHER = {
    "dots3_note": "dots3_note_text",
    "emu3": "emu3_text_model",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}


def rows() -> dict[str, dict[str, str]]:
    """The page's table, by name."""
    head, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section(TEXT, "families").splitlines()
    )
    assert tuple(head) == TEXTS + ERRORS
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_every_declared_type_is_measured_and_on_the_page() -> None:
    assert tuple(rows()) == ALL
    encoders = {"distilbert", "modernbert", "deberta-v2"}  # they are no decoders: `test_encoders.py`
    measured = {kind for kind, _ in ZOO.values()} | encoders
    declared = set(families.supported_model_types())
    assert {INSIDE_ANOTHER.get(kind, kind) for kind in declared} == measured
    assert all(f"`{kind}`" in TEXT for kind in declared)


def test_every_row_is_as_exact_as_is_said() -> None:
    for name, row in rows().items():
        for column, limit in LIMITS.items():
            assert 0 <= float(row[column]) < limit * (10 if name in CONDITIONED else 1), (name, column)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.covering(3)
def test_the_command_writes_these_rows(name: str) -> None:
    """Words are the same; errors are rounding, whose last digits depend on the machine."""
    page, own = rows()[name], row_of(name)
    assert {column: own[column] for column in TEXTS} == {column: page[column] for column in TEXTS}
    for column, limit in LIMITS.items():
        assert float(own[column]) < limit
        assert float(own[column]) < 30 * float(page[column])


@pytest.mark.skipif(
    not transformers.__version__.startswith("5.23"), reason="the page lists the types of 5.23"
)
def test_every_type_of_transformers_has_a_line() -> None:
    assert section(TEXT, "types") == SECTIONS["types"]()


def test_what_is_refused_is_listed() -> None:
    assert section(TEXT, "refused") == refused() == SECTIONS["refused"]()


@pytest.mark.slow
def test_encoders_are_supported_as_is_said() -> None:
    assert section(TEXT, "encoders") == SECTIONS["encoders"]()


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    precision, model, declaration = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(precision, "families.md", "exec"), names)
    assert capsys.readouterr().out == "rounding True\n"
    exec(compile(model, "families.md", "exec"), names)
    with pytest.raises(DePassError, match=r"'house' is not supported: no family declares it"):
        DePass(names["model"])  # type: ignore[arg-type]
    exec(compile(declaration, "families.md", "exec"), names)
    assert float(capsys.readouterr().out) < 1e-5
