"""Components' states stored with the scores: one file a prompt, equal to the library's states."""

import json

import pytest
import torch
from safetensors.torch import save, save_file

from depass_lightning import DePass, DePassError, Spans, Tokens, tasks
from depass_lightning.storage import read_states
from tests.commands.test_analyze import run

FEW = ("task.size=3", "batch_size=2", "faithfulness=none", "report.figures=0")


@pytest.mark.parametrize(
    ("layer", "options", "to"), [("end", [], None), (2, ["rule=max", "source=spans"], 2)]
)
def test_states_are_kept(tmp_path, layer, options, to):
    assert run(tmp_path, *FEW, f"states={layer}", *options) == 0
    files = sorted((tmp_path / "attributions" / "states").iterdir())
    assert [path.name for path in files] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    depass, task = DePass.from_pretrained("tiny"), tasks.load("ioi", size=3)
    source = Spans("word") if options else Tokens()
    for path, example in zip(files, task, strict=True):
        alone = depass.decompose(
            example.prompt, source=source, rule="max" if options else "half", to_layer=to
        )
        read = read_states(path)
        assert (read.components, read.layer) == (alone.components, alone.layer)
        torch.testing.assert_close(read.states, alone.states, atol=1e-5, rtol=1e-5)


def test_states_are_part_of_what_a_run_is(tmp_path, capsys):
    """A run without them cannot be gone on with, with them."""
    assert run(tmp_path, *FEW) == 0
    assert run(tmp_path, *FEW, "states=end") == 1
    assert "states was None and is 'end'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["states=99"], "to_layer: layer 99 is out of range"),
        (["states=end", "method=random"], "states= keeps what DePass propagates"),
        (["states=end", "target=generation"], "states= keeps what DePass propagates"),
        (["states=0", "source.layer=1"], "to_layer=0 lies before layer 1"),
        (["states=end", "rule=dual"], "only goes back from a target"),
    ],
)
def test_what_has_no_states_is_refused(tmp_path, capsys, options, message):
    assert run(tmp_path, *FEW, *options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"nothing",
        save({"states": torch.zeros(1)}),
        save({"states": torch.zeros(1)}, {"format": "pt"}),
        save({"states": torch.zeros(1)}, {"decomposition": "no JSON"}),
    ],
    ids=["no file", "no safetensors", "no header", "another header", "a header that is no JSON"],
)
def test_a_file_without_states_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "0.safetensors").write_bytes(content)
    with pytest.raises(DePassError, match="has no component states"):
        read_states(tmp_path / "0.safetensors")


def test_states_of_an_earlier_version_are_refused(tmp_path):
    header = {"decomposition": json.dumps({"layer": 1, "names": ["a"]})}
    save_file({"states": torch.zeros(1, 2, 3)}, tmp_path / "0.safetensors", header)
    with pytest.raises(DePassError, match=r"0\.safetensors has no .* an earlier version wrote this file"):
        read_states(tmp_path / "0.safetensors")
