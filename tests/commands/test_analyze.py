"""`python analyze.py`, from the configuration to the run's folder."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from omegaconf import OmegaConf, open_dict
from safetensors.torch import save_file

from depass_lightning import tasks
from depass_lightning.callbacks import AttributionWriter
from depass_lightning.commands.analyze import analyze
from depass_lightning.depass import DePass
from depass_lightning.engine.rule_files import rule_content
from depass_lightning.faithfulness import TokenRemoval
from depass_lightning.methods import DePassMethod
from depass_lightning.modules.attribution_module import AttributionModule
from depass_lightning.modules.prompt_datamodule import PromptData, plan_batches
from depass_lightning.storage import read_attributions, read_rows
from tests.conftest import ROOT
from tests.reports.test_page import data_of

QUICK = ["print_config=false", "trainer.accelerator=cpu", "report.figures=1"]


def run(folder, *overrides):
    """Run the command in this process, and return its exit code."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose("analyze", overrides=[*QUICK, *overrides])
    with open_dict(config):
        config.paths.output_dir = str(folder)
        config.paths.work_dir = str(folder)
    try:
        analyze(config)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run on the bundled model, with everything left as it is but the number of prompts."""
    folder = tmp_path_factory.mktemp("run")
    assert run(folder, "task.size=24") == 0
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_leaves_what_it_should(done):
    files = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    assert files == {
        "SHA256SUMS",
        "attributions/SHA256SUMS",
        "attributions/attributions.parquet",
        "attributions/manifest.json",
        "config.yaml",
        "figures/curves.svg",
        "figures/prompt-0.svg",
        "report.html",
        "summary.json",
    }
    assert OmegaConf.load(done / "config.yaml").task.size == 24


def test_the_page_shows_layers_and_next_tokens_if_asked(tmp_path):
    assert run(tmp_path, "task.size=2", "faithfulness=none", "report.figures=0", "report.lens=true") == 0
    for prompt in data_of((tmp_path / "report.html").read_text(encoding="utf-8"))["prompts"]:
        assert prompt["layers"][-1] == pytest.approx(prompt["views"]["tokens"]["scores"], abs=1e-4)
        assert prompt["likely"][-1][0][0] == prompt["prediction"]


def test_the_rows_are_the_librarys_own_attributions(done):
    """Row by row what `DePass.attribute` gives for the prompt alone, and what the task knows of it."""
    depass, task = DePass.from_pretrained("tiny"), tasks.load("ioi", size=24)
    rows = read_rows(done / "attributions")
    assert [row["id"] for row in rows] == [example.id for example in task]
    for row, read in list(zip(rows, read_attributions(done / "attributions"), strict=True))[:4]:
        example = task[row["index"]]
        alone = depass.attribute(example.prompt, target=example.target(), rule="half")
        torch.testing.assert_close(read.scores, alone.scores, atol=1e-5, rtol=1e-5)
        assert (read.text, read.target, read.tokens) == (alone.text, alone.target, alone.tokens)
        assert [tuple(span) for span in row["evidence"]] == example.evidence_ranges()
        assert row["patch_top"][0] == row["recover_top"][-1] == pytest.approx(alone.probability, abs=1e-5)


def test_the_summary_says_what_the_rows_say(done):
    summary, rows = summary_of(done), read_rows(done / "attributions")
    assert summary["prompts"] == 24
    assert summary["skipped"] == 0
    assert summary["correct"] == sum(row["correct"] for row in rows) / 24 >= 0.9
    assert summary["completeness_max"] == max(row["completeness"] for row in rows) < 1e-5
    assert summary["evidence_first"]["value"] >= 0.9 > 0.2 > summary["evidence_first"]["chance"]
    patch, recover = summary["curves"]["patch_top"], summary["curves"]["recover_top"]
    assert patch["fraction"] == pytest.approx([k / 10 for k in range(11)])
    assert patch["depass"][0] == patch["random"][0]
    assert summary["patch_top_area"]["value"] < summary["patch_top_area"]["chance"] - 0.05
    assert recover["depass"][-1] == pytest.approx(patch["depass"][0])
    assert summary["model"]["name"] == rows[0]["model"] == "tiny"
    assert summary["model"]["fingerprint"] == rows[0]["fingerprint"]
    assert summary["rule"] == {"name": "half"}
    assert summary["versions"]["torch"] == torch.__version__


def test_the_page_holds_every_prompt(done):
    page = (done / "report.html").read_text()
    assert all(json.dumps(row["id"]) in page for row in read_rows(done / "attributions"))
    assert "tiny" in page


def test_loggers_get_the_numbers(tmp_path):
    """The summary's numbers in a table of one row."""
    assert run(tmp_path, "task.size=4", "logger=csv") == 0
    names, values = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    logged = dict(zip(names.split(","), values.split(","), strict=True))
    summary = summary_of(tmp_path)
    assert float(logged["analysis/patch_top_area"]) == pytest.approx(summary["patch_top_area"]["value"])
    assert float(logged["analysis/prompts"]) == 4


def test_paths_are_printed_in_one_piece(tmp_path, capsys):
    """However narrow the terminal: they are there to be copied."""
    folder = tmp_path / ("long" * 30)
    assert run(folder, "task.size=1", "faithfulness=none") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f"page     {folder / 'report.html'}", f"folder   {folder}"]


def test_the_batch_size_and_a_second_run_change_nothing(done, tmp_path):
    """Other batches, in a folder where a run has been before: the same rows."""
    (tmp_path / "attributions" / "shards").mkdir(parents=True)
    for name in (".draft.0123abcd.half", "rank0007-0-1.skipped.jsonl"):  # of a run that was killed
        (tmp_path / "attributions" / "shards" / name).write_bytes(b"{}")
    (tmp_path / "skipped.jsonl").write_text("{}\n")
    assert run(tmp_path, "task.size=24", "batch_size=5", "faithfulness=none", "logger=none") == 0
    assert not (tmp_path / "skipped.jsonl").exists()
    for one, other in zip(
        read_attributions(done / "attributions"), read_attributions(tmp_path / "attributions"), strict=True
    ):
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
        assert one.names == other.names
    assert "curves" not in summary_of(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["target=token"], {"rule": "half", "target": "Mary"}),
        (["rule=softmax"], {"rule": "softmax"}),
        (["target=own", "rule=max"], {"rule": "max", "target": "Mary"}),
        (["rule=taylor", "source.layer=1"], {"rule": "taylor", "layer": 1, "target": "Mary−John"}),
    ],
)
def test_choices_reach_the_attribution(tmp_path, overrides, expected):
    assert run(tmp_path, *jsonl(tmp_path, good("a")), *overrides) == 0
    (row,) = read_rows(tmp_path / "attributions")
    row["target"] = row["target"].replace("'", "").replace(" ", "")
    assert {key: row[key] for key in expected} == expected
    assert row["correct"]
    assert row["probability"] == pytest.approx(row["patch_top"][0], abs=1e-5)


def test_a_rule_is_read_from_its_file(tmp_path):
    depass = DePass.from_pretrained("tiny")
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(rule_content([(0.7, 0.4)] * len(depass.decoder.blocks), depass.decoder)))
    overrides = ["rule=calibrated", f"rule.path={path}", "task.size=2", "faithfulness=none"]
    assert run(tmp_path / "run", *overrides) == 0
    example = tasks.load("ioi", size=1)[0]
    expected = depass.attribute(example.prompt, example.target(), rule=str(path))
    first = read_attributions(tmp_path / "run" / "attributions")[0]
    torch.testing.assert_close(first.scores, expected.scores)
    assert (first.rule, summary_of(tmp_path / "run")["rule"]["path"]) == ("calibrated", str(path))


@pytest.mark.parametrize("source", ["spans", "heads", "modules", "neurons", "subspace"])
def test_every_source_runs_and_is_shown(tmp_path, capsys, source):
    """Its own kind of components, complete; the mean over the prompts where these are the same in all."""
    weight = torch.eye(64)
    save_file({"one": weight[40].clone(), "several": weight[50:53].clone()}, tmp_path / "some.safetensors")
    path = [f"source.path={tmp_path / 'some.safetensors'}"] if source == "subspace" else []
    assert run(tmp_path, "task.size=3", f"source={source}", *path) == 0
    rows, summary = read_rows(tmp_path / "attributions"), summary_of(tmp_path)
    assert {row["source"] for row in rows} == {source}
    assert summary["completeness_max"] < 1e-4
    assert ("curves" in summary) == (source == "spans")
    assert (tmp_path / "figures" / "mean.svg").exists() == (source != "spans")
    page = (tmp_path / "report.html").read_text()
    if source == "spans":
        assert " Nicole" in {name for row in rows for name in row["names"]}
        assert "mean_scores" not in summary
        return
    first = rows[0]["names"][1]
    expected = sum(row["scores"][1] for row in rows) / 3
    if first in summary["mean_scores"]:
        assert summary["mean_scores"][first] == pytest.approx(expected, abs=1e-6)
    assert ("layer 2 head 3" in rows[0]["names"]) == (source == "heads")
    assert ("promotes " in page.split("data", 1)[1]) == (source in ("neurons", "subspace"))
    assert ("each layer's" in capsys.readouterr().out) == (source in ("heads", "modules"))


def test_generated_tokens_are_rows_of_a_matrix(tmp_path, capsys):
    """A row a token, as the library gives it; on the page a matrix a prompt; the same on two processes."""
    typed = ["target=generation", "target.max_new_tokens=3", "task.size=3", "batch_size=2"]
    assert run(tmp_path / "one", *typed) == 0
    rows = read_rows(tmp_path / "one" / "attributions")
    task, depass = tasks.load("ioi", size=3), DePass.from_pretrained("tiny")
    assert [row["id"] for row in rows] == [f"{example.id}/{k}" for example in task for k in range(3)]
    found = depass.attribute_generation(task[1].prompt, max_new_tokens=3, rule="half")
    for row, read, own in zip(
        rows[3:6], read_attributions(tmp_path / "one" / "attributions")[3:6], found, strict=True
    ):
        torch.testing.assert_close(read.scores, own.scores, atol=1e-5, rtol=1e-5)
        assert (read.text, read.target, read.position) == (found.text, own.target, own.position)
        assert [tuple(span) for span in row["evidence"]] == task[1].evidence_ranges()
        assert (row["correct"], row["evidence_first"], row["patch_top"], row["answer"]) == (None,) * 4
    summary = summary_of(tmp_path / "one")
    assert (summary["prompts"], summary["generated_tokens"]) == (3, 9)
    assert not {"correct", "curves", "evidence_first"} & set(summary)
    page = (tmp_path / "one" / "report.html").read_text()
    assert f'"name":"{task[2].id}","rows":[6,9]' in page
    said = capsys.readouterr()
    assert task[0].prompt.split()[-1] in said.out
    assert "+10" in said.out
    assert "faithfulness and right answers are not measured" in said.err
    two = ["trainer.devices=2", "trainer.strategy=ddp_fork"]
    assert run(tmp_path / "two", *typed, *two) == 0
    files = [tmp_path / name / "attributions" / "attributions.parquet" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_page_has_the_first_prompts_matrices_whole(tmp_path):
    assert (
        run(tmp_path, "target=generation", "target.max_new_tokens=2", "task.size=3", "report.prompts=2") == 0
    )
    page = (tmp_path / "report.html").read_text()
    assert '"rows":[2,4]' in page
    assert '"rows":[4,6]' not in page
    assert "the first 2 of 3 prompts" in page


def test_a_prompt_that_cannot_be_gone_on_with_costs_itself_alone(tmp_path):
    long = good("long") | {"prompt": "Mary and John " * 40 + "gave a drink to"}
    task = jsonl(tmp_path, good("first"), long, good("last"))
    assert run(tmp_path, *task, "target=generation", "target.max_new_tokens=4", "batch_size=3") == 1
    ids = [row["id"] for row in read_rows(tmp_path / "attributions")]
    assert [name for name in ids if name.endswith("/0")] == ["first/0", "last/0"]
    assert summary_of(tmp_path)["skipped"] == 1


def test_control_paths_are_reported_apart(tmp_path, capsys):
    """The library's own, and no word of a distance from the value, of which they are only a part."""
    assert run(tmp_path, "attention_path=control", "task.size=2", "faithfulness=none") == 0
    (read, _), example = read_attributions(tmp_path / "attributions"), tasks.load("ioi", size=2)[0]
    alone = DePass.from_pretrained("tiny").attribute(
        example.prompt, example.target(), rule="taylor", attention_path="control"
    )
    torch.testing.assert_close(read.scores, alone.scores, atol=1e-5, rtol=1e-5)
    assert not [key for key in summary_of(tmp_path) if key.startswith("completeness")]
    said = capsys.readouterr().out
    assert "control paths alone" in said
    assert "completeness" not in said


def good(name):
    prompt = "When Mary and John went to the store, John gave a drink to"
    return {"id": name, "prompt": prompt, "target": " Mary", "foil": " John", "evidence": ["Mary"]}


def jsonl(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return ["task=jsonl", f"task.path={path}"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.layer=99"], "layer 99 is out of range"),
        (["source=subspace"], "source.path has to be given"),
        (["source=subspace", "source.path=nowhere.npy"], "no file nowhere.npy"),
        (["source=neurons", "source.indices=[4000]"], "no neuron 4000"),
        (["batch_size=0"], "batch_size"),
        (["attention_path=control", "rule=half"], "attention_path='control' needs rule='taylor'"),
        (
            ["attention_path=sideways", "rule=taylor"],
            "attention_path='sideways': it should be 'content' or 'control'",
        ),
        (["target=generation", "source=heads"], "what is generated is attributed to Tokens()"),
        (["target=generation", "compat=paper_code"], "compat='paper_code' explains no generated tokens"),
        (["target=generation", "target.max_new_tokens=0"], "max_new_tokens is 0"),
        (["faithfulness.percents=[0,120]"], "percents must rise"),
        (["task=jsonl"], "the jsonl task reads a file; give its path"),
        (["task=jsonl", "task.path=nowhere.jsonl"], "no file nowhere.jsonl"),
        (["model=gguf", "model.path=nowhere.gguf"], "nowhere.gguf"),
        (["model=llama2-7b"], "ask for access at https://huggingface.co/meta-llama/Llama-2-7b-hf"),
        (["compute_dtype=float3"], "float3"),
    ],
)
def test_a_mistake_ends_at_once_with_one_line(tmp_path, capsys, overrides, message):
    """Before any prompt is attributed, and without a traceback."""
    assert run(tmp_path, "task.size=4", *overrides) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "skipped.jsonl").exists()
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("size", [1, 5])
def test_forked_processes_write_the_same_file(tmp_path, size, capfd):
    """Two processes, and fewer batches than processes: the same bytes as one process."""
    for name, extra in (("one", []), ("two", ["trainer.devices=2", "trainer.strategy=ddp_fork"])):
        assert run(tmp_path / name, f"task.size={size}", "batch_size=2", *extra) == 0
        assert capfd.readouterr().out.count("model is right") == 1, "only the first process prints"
    one, two = (
        (tmp_path / name / "attributions" / "attributions.parquet").read_bytes() for name in ("one", "two")
    )
    assert one == two
    assert summary_of(tmp_path / "two")["hardware"]["processes"] == 2


@pytest.mark.slow  # two real processes; what they write and print is tested above with forked ones
def test_the_command_line_on_two_processes(tmp_path):
    """As typed: Lightning starts the script again for the second process, and one folder results."""
    assert run(tmp_path / "one", "task.size=5", "batch_size=2") == 0
    typed = "task.size=5 batch_size=2 trainer.strategy=ddp trainer.devices=2 trainer.accelerator=cpu"
    command = [sys.executable, str(ROOT / "analyze.py"), *typed.split(), f"hydra.run.dir={tmp_path / 'two'}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    files = [tmp_path / name / "attributions" / "attributions.parquet" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert ended.stdout.count("model is right") == 1, "the first process alone speaks"
    assert str(tmp_path / "two" / "report.html") in ended.stdout
    assert summary_of(tmp_path / "two")["hardware"]["processes"] == 2


def test_an_interrupted_run_keeps_what_is_done(tmp_path):
    """The writer flushes what it holds when a run ends before its time."""

    class Stops(AttributionModule):
        def predict_step(self, batch, batch_idx=0):
            if batch_idx == 2:
                raise RuntimeError("the node is taken away")
            return super().predict_step(batch, batch_idx)

    task = tasks.load("ioi", size=6)
    method = DePassMethod(DePass.from_pretrained("tiny"))
    module = Stops(method, measures=[TokenRemoval([0, 100])])
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[AttributionWriter(tmp_path, expected=6)],
    )
    with pytest.raises(RuntimeError, match="taken away"):
        trainer.predict(module, datamodule=PromptData(task, batch_size=2), return_predictions=False)
    assert len(read_rows(tmp_path / "attributions" / "shards")) == 4
    assert not (tmp_path / "attributions" / "attributions.parquet").exists()


def test_batches_hold_like_lengths():
    """The longest first; equal lengths in the prompts' own order."""
    assert plan_batches([3, 9, 4, 9, 1, 7, 3], 2) == [[1, 3], [5, 2], [0, 6], [4]]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_processes_share_the_prompts_out(world):
    """Every prompt goes to one process, and a batch is the same whatever their number."""
    data = PromptData(tasks.load("ioi", size=7), batch_size=2)
    alone = [batch.indices for batch in data.predict_dataloader()]
    assert sorted(index for batch in alone for index in batch) == list(range(7))
    shares = []
    for rank in range(world):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
        shares.append([batch.indices for batch in data.predict_dataloader()])
    assert sorted(batch for share in shares for batch in share) == sorted(alone)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_share_each_prompt(tmp_path):
    """Components spread over two processes: the first writes what both have found."""
    for name, extra in (
        ("one", []),
        ("two", ["parallel=components", "trainer.devices=2", "trainer.strategy=ddp_fork"]),
    ):
        overrides = ["rule=softmax", "task.size=3", "batch_size=2", "faithfulness=none", *extra]
        assert run(tmp_path / name, *overrides) == 0
    one, two = (read_attributions(tmp_path / name / "attributions") for name in ("one", "two"))
    for own, other in zip(one, two, strict=True):
        assert own.names == other.names
        torch.testing.assert_close(own.scores, other.scores, atol=2e-5, rtol=1e-5)
    assert not torch.equal(one[0].scores, two[0].scores), "the sums were made in another order"
