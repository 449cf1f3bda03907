"""JSON files: the bytes that are written, and what is read back."""

from pathlib import Path

from depass_lightning.storage import read_json_lines, write_json, write_json_lines


def test_an_object_is_indented_in_the_order_given(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "one.json", {"b": "Zoë", "a": [1]})
    assert path.read_bytes().decode() == '{\n  "b": "Zoë",\n  "a": [\n    1\n  ]\n}\n'


def test_lines_come_back_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    rows = [{"b": "Zoë", "a": None}, {"a": "two\nlines"}]
    path = write_json_lines(tmp_path / "rows.jsonl", rows)
    text = path.read_bytes().decode()
    assert text == '{"b": "Zoë", "a": null}\n{"a": "two\\nlines"}\n'
    path.write_text(text.replace("\n", "\n\n"), encoding="utf-8")
    assert read_json_lines(path) == rows
