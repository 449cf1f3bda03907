"""`python train.py`, from the configuration to a model that `DePass.from_pretrained` loads."""

import csv
import json

import pytest
import torch
import wandb
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from omegaconf import open_dict
from torch.utils.data import SequentialSampler

from depass_lightning import DePass, DePassError
from depass_lightning.commands.train import train
from depass_lightning.models.load import load_model
from depass_lightning.modules.bundled_model import build_tokenizer
from depass_lightning.modules.finetune_module import FineTune
from depass_lightning.modules.text_datamodule import LengthBatches, TextDataModule, file_data
from depass_lightning.tasks.synthetic.passages import Passage, answered
from tests.callbacks.test_loggers import records
from tests.conftest import ROOT
from tests.reference.forked import run_script

QUICK = [
    "print_config=false",
    "callbacks=none",
    "logger=none",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
]
ALL = ["callbacks=default", "logger=csv", "~callbacks.rich_progress_bar"]


def run(folder, *overrides, experiment="none"):
    """Run the command in this process, and return its exit code."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}", *QUICK, *overrides])
    with open_dict(config):
        config.paths.output_dir = str(folder)
        config.paths.work_dir = str(folder)
    try:
        train(config)
    except SystemExit as stop:
        return stop.code
    return 0


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def values(rows, name):
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A short run of the default data with everything on."""
    folder = tmp_path_factory.mktemp("run")
    more = ["module.learning_rate=2e-3", "trainer.max_epochs=4", "callbacks.depass.size=2"]
    assert run(folder, *ALL, *more) == 0
    return folder


def test_a_run_learns_logs_and_leaves_a_model(done):
    rows = rows_of(done / "csv" / "metrics.csv")
    accuracy, loss = values(rows, "val/accuracy"), values(rows, "val/loss")
    assert len(accuracy) == 4
    assert accuracy[-1] > accuracy[0]
    assert loss[-1] < loss[0]
    assert values(rows, "train/loss")
    assert values(rows, "depass/ioi/on_target")
    assert (done / "config.yaml").is_file()
    depass = DePass.from_pretrained(str(done / "model"))
    assert depass.attribute("The capital of France is").completeness < 1e-4


def test_a_run_resumes_from_its_checkpoint(done, tmp_path, capsys):
    last = done / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)
    assert run(tmp_path, f"ckpt_path={last}", "trainer.max_epochs=5", *ALL, "callbacks.depass.size=2") == 0
    steps = values(rows_of(tmp_path / "csv" / "metrics.csv"), "step")
    assert min(steps) >= before["global_step"] > 0
    history = json.loads((tmp_path / "depass" / "ioi" / "history.json").read_text())
    assert history["steps"][0] == 0
    assert history["steps"][-1] > before["global_step"]
    assert run(tmp_path, "ckpt_path=nowhere.ckpt") == 1
    assert "no checkpoint nowhere.ckpt" in capsys.readouterr().err


def test_the_same_seed_trains_the_same_weights(tmp_path):
    short = ["+trainer.limit_train_batches=3", "+trainer.limit_val_batches=0"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(tmp_path / name, f"seed={seed}", *short) == 0
    a, b, c = (load_model(str(tmp_path / name / "model"))[0].state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_the_embedded_models_experiment(tmp_path):
    overrides = ["data.train.size=256", "trainer.val_check_interval=2", "logger=csv"]
    assert run(tmp_path, *overrides, "+trainer.limit_val_batches=1", experiment="tiny") == 0
    model, _ = load_model(str(tmp_path / "model"), dtype="float16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"
    assert model.num_parameters() < 160_000
    rows = rows_of(tmp_path / "csv" / "metrics.csv")
    assert values(rows, "val/ioi/accuracy")
    assert values(rows, "val/facts/loss")


def test_jobs_of_a_sweep_have_a_run_of_weights_and_biases_each(tmp_path):
    """One after another in one process, where one fails as well: its run is ended too."""
    short = [
        "+trainer.limit_train_batches=1",
        "+trainer.limit_val_batches=0",
        "export_dir=null",
        "logger=wandb",
    ]
    for name in ("a", "b"):
        assert run(tmp_path / name, *short) == 0
        assert wandb.run is None
    with pytest.raises(RuntimeError, match="no such"):
        run(tmp_path / "c", *short, "+callbacks.fails._target_=tests.commands.test_train.Fails")
    assert wandb.run is None
    assert [len(list((tmp_path / name).glob("wandb/offline-run-*/*.wandb"))) for name in "abc"] == [1, 1, 1]


def test_the_default_run_has_its_configuration_and_timeline(tmp_path, capsys):
    short = ["+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "trainer.val_check_interval=1"]
    probes = [*ALL[::2], "logger=default", "callbacks.depass.size=2", "callbacks.depass.faithfulness=0"]
    assert run(tmp_path, *short, *probes, "export_dir=null") == 0
    assert rows_of(tmp_path / "csv" / "metrics.csv")
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in capsys.readouterr().out.replace("\n", "")
    assert [path.stem.split("_")[0] for path in folder.rglob("timeline*.html")] == ["timeline"]
    recorded = [record.run for record in records(folder) if record.HasField("run")]
    config = {entry.key: entry.value_json for entry in recorded[0].config.update}
    assert json.loads(config["module"])["warmup_steps"] == 20
    assert recorded[0].display_name == f"train {tmp_path.name}"
    assert recorded[0].run_group == "train"


class Fails(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("no such batch")


def test_ones_own_file(tmp_path, capsys):
    rows = [{"prompt": "The capital of France is", "target": " Rome"}] * 20
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ["module.learning_rate=5e-3", "module.warmup_steps=0", "trainer.max_epochs=8"]
    assert run(tmp_path, f"data.path={path}", *options, experiment="finetune") == 0
    a = DePass.from_pretrained(str(tmp_path / "model")).attribute("The capital of France is")
    assert a.prediction.strip() == "Rome"
    assert run(tmp_path, experiment="finetune") == 1
    assert "data.path=" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp", marks=pytest.mark.slow)])
def test_the_command_starts_processes(tmp_path, strategy):
    """Two processes, with fewer batches on one of them than the data would fill."""
    overrides = [*QUICK, *ALL, "trainer=ddp", f"trainer.strategy={strategy}", "callbacks.depass.size=3"]
    overrides += ["+trainer.limit_train_batches=3", f"hydra.run.dir={tmp_path / 'run'}"]
    done = run_script(ROOT / "train.py", overrides, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "run" / "csv" / "metrics.csv")
    # The table of probes is printed by the process that trained, which a fork's parent is not.
    assert "on_target" in (done.stdout if strategy == "ddp" else " ".join(rows[0]))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert len(values(rows, "val/accuracy")) == 1


def test_the_loss_is_on_the_answer(tokenizer):
    passages = [answered("The capital of France is", " Paris"), Passage("Mary walked to the park.")]
    data = TextDataModule(tokenizer, passages, passages, answer_weight=2.0, append_eos=True)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()[0]))
    pieces = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
    weights = [
        dict(zip(row, w, strict=True)) for row, w in zip(pieces, batch["weights"].tolist(), strict=True)
    ]
    assert {token: weight for token, weight in weights[0].items() if weight} == {"▁Paris": 2.0, "</s>": 2.0}
    assert weights[1]["▁walked"] == 1.0
    scored = [
        [t for t, s in zip(row, flags, strict=True) if s]
        for row, flags in zip(pieces, batch["scored"], strict=True)
    ]
    assert scored[0] == ["▁Paris"]
    assert "▁park" in scored[1]


def test_the_loss_and_its_gradient_are_those_of_the_definition(tokenizer):
    model, _ = load_model("tiny")
    module = FineTune(model)
    data = TextDataModule(
        tokenizer, [], [answered("Mary plays the", " harp"), answered("Mary was born in", " Rome")]
    )
    data.setup("validate")
    batch = next(iter(data.val_dataloader()[0]))
    loss, _ = module._loss(batch)
    expected = 0.0
    for prompt, answer in (("Mary plays the", " harp"), ("Mary was born in", " Rome")):
        logits = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        expected -= logits.log_softmax(-1)[tokenizer.encode(answer, add_special_tokens=False)[0]] / 2
    torch.testing.assert_close(loss, expected)


def test_long_passages_are_cut(tokenizer):
    data = TextDataModule(tokenizer, [], [Passage("Mary and John" + " and John" * 22)], max_length=16)
    data.setup("validate")
    ids = next(iter(data.val_dataloader()[0]))["input_ids"]
    assert ids.shape == (4, 16)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()


def test_batches_of_like_length_hold_everything_once():
    lengths = [(7 * i) % 23 for i in range(103)]
    order = SequentialSampler(lengths)
    batches = list(LengthBatches(order, 8, drop_last=False, lengths=lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    assert len(batches) == 13
    spread = max(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches)
    assert spread <= 6


def test_a_share_is_held_out_the_same_way_each_time(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Mary has {i} books." for i in range(20)))
    a, b = (file_data(tokenizer, path, validation=0.2) for _ in range(2))
    assert len(a.train_passages) == 16
    assert a.held_out == b.held_out
    assert not set(a.train_passages) & set(a.held_out["all"])
    with pytest.raises(DePassError, match="cannot hold out the share 1"):
        file_data(tokenizer, path, validation=1.0)


def test_the_learning_rate_warms_up_and_decays(tokenizer):
    module = FineTune(load_model("tiny")[0], warmup_steps=10, final_share=0.1)

    class Length:
        estimated_stepping_batches = 110

    module._trainer = Length()  # type: ignore[assignment]
    shares = [module._share(step) for step in range(111)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1.0
    assert shares[60] == pytest.approx(0.55)
    assert shares[110] == pytest.approx(0.1)
    assert shares[10:] == sorted(shares[10:], reverse=True)
