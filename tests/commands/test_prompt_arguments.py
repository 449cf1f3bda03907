"""Prompts typed on a command line: any text reaches the task as it was typed."""

from __future__ import annotations

import io
import json
import random
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from depass_lightning.commands import analyze as analysis
from depass_lightning.commands.attribute_task import task_of
from depass_lightning.commands.prompt_arguments import KINDS, quoted, rewritten
from depass_lightning.errors import DePassError
from depass_lightning.sources.named import SOURCES
from depass_lightning.storage import read_rows
from tests.conftest import ROOT

PIECES = ['"', "'", "\\", "$", "{", "}", "${", "${a}", "a", " ", ",", "=", "[", "]", ":", "#", "~", "?", "漢"]
HOSTILE = [
    "The capital",
    "a=b, c: {d} [e] (f) ~g @h %i !j #k *l",
    'say "yes", or \'no\' \\" \\\\',
    "${oc.env:HOME} \\${x} $5",
    "null",
    "true",
    "12",
    "tab\there\nand a line break",
    "ends in a backslash \\",
    "<script>alert(1)</script>",
    "Привет 你好 👋",
]


def composed(arguments):
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        return compose("analyze", overrides=rewritten(arguments))


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_arrives_unchanged(text: str) -> None:
    config = composed(["batch_size=2", f"prompt={text}", f"target={text} x", f"foil={text}"])
    (example,) = task_of(config)
    assert (example.prompt, example.answer, example.foil) == (text, f"{text} x", text)
    assert config.batch_size == 2
    assert config.faithfulness is None


def test_random_text_survives_the_grammar_and_the_saved_configuration() -> None:
    generator, parser = random.Random(0), OverridesParser.create()
    for _ in range(300):
        text = "x" + "".join(generator.choice([*PIECES, "\n"]) for _ in range(generator.randint(1, 8)))
        value: Any = parser.parse_override(f"rows=[{{prompt:{quoted(text, 'prompt')}}}]").value()
        (row,) = value
        saved = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(dict(row))))
        assert OmegaConf.to_container(saved, resolve=True) == {"prompt": text}


def test_a_rewritten_command_line_stays_as_it_is() -> None:
    """Lightning starts further processes with it."""
    once = rewritten(["prompt=a", "target=logprob"])
    assert rewritten(once) == once
    assert rewritten(["-m", "rule=softmax,taylor", "target=token"]) == [
        "-m",
        "rule=softmax,taylor",
        "target=token",
    ]


def test_files_conversations_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo words\n")
    assert [example.prompt for example in task_of(composed([f"prompts={tmp_path}/prompts.txt"]))] == [
        "one",
        "two words",
    ]
    messages = [{"role": "user", "content": 'Say "${hi}"'}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages[:1]))
    (asked,) = task_of(composed([f"messages={tmp_path}/chat.json"]))
    (answered,) = task_of(composed([f"messages={json.dumps(messages)}"]))
    assert (asked.answer, answered.answer) == (None, "Hi")
    assert asked.prompt == answered.prompt
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond, third\n"))
    assert [example.prompt for example in task_of(composed(["prompts=-"]))] == ["first", "second, third"]
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert [example.prompt for example in task_of(composed(["prompt=-"]))] == ["two\nlines"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prompt=a", "prompts=b"], "two sets of prompts"),
        (["prompt=a", "task=ioi"], "two sets of prompts"),
        (["prompt=a", "prompt=b"], "given twice"),
        (["prompt= "], "prompt= is empty"),
        (["prompt=???"], "three question marks"),
        (["prompt=\udcff"], "not UTF-8"),
        (["prompts=a.txt", "target= b"], "for prompt="),
        (["messages=[{"], "cannot be read"),
        (["messages=none.json"], "cannot be read"),
        (["prompt=-"], "nothing on standard input"),
    ],
)
def test_refused(arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(DePassError, match=reason):
        rewritten(arguments)


def test_names_are_those_of_the_configuration() -> None:
    assert set(KINDS) == {path.stem for path in (ROOT / "conf/target").glob("*.yaml")}
    options = {path.stem: path for path in (ROOT / "conf/source").glob("*.yaml")}
    assert SOURCES.keys() == options.keys() - {"subspace"}
    for name, source in SOURCES.items():
        assert instantiate(OmegaConf.load(options[name]), _convert_="all") == source


@pytest.mark.parametrize("answer", [None, " John"])
def test_a_typed_target_is_not_called_right_or_wrong(
    answer: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    config = composed(
        [
            "prompt=When Mary and John went to the store, John gave a drink to",
            *([] if answer is None else [f"target={answer}"]),
            "open=true",
            "print_config=false",
            "trainer.accelerator=cpu",
        ]
    )
    with open_dict(config):
        config.paths.output_dir = config.paths.work_dir = str(tmp_path)
    analysis.analyze(config)
    (row,) = read_rows(tmp_path / "attributions")
    assert (row["target"], row["answer"], row["correct"]) == (repr(answer or " Mary"), answer, None)
    assert "correct" not in json.loads((tmp_path / "summary.json").read_text())
    assert "right" not in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<h1>What tiny relies on</h1>" in page
    assert '<p class="subtitle">target: contrast</p>' in page
    assert '"answer":""' in page  # the target may be wrong
    assert opened == [(tmp_path / "report.html").as_uri()]
