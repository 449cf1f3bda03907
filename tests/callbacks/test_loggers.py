"""Every logger gets what it can hold, and Weights & Biases never prompts for input."""

import csv
import json
import os
import pty
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring.wandb_logger import wandb_logger
from depass_lightning.storage import read_attributions
from tests.conftest import ROOT
from tests.reference.training import PROMPTS, OwnModule, fit, trainer

STEPS = [0, 2, 4, 6]
LOGGED = [0, 1, 3, 5]  # Lightning logs what comes after batch 2 under step 1, its own losses too


def train(run: Path, *loggers: Any, **options: Any) -> DePassCallback:
    callback = DePassCallback(list(PROMPTS), **options)
    fit(trainer(run, [callback], logger=list(loggers)), OwnModule())
    return callback


def assert_files(folder: Path) -> None:
    """The pages, the scores and the curves lie below a run's folder."""
    written = {path.name for path in (folder / "depass/probes").iterdir()}
    assert written == {"history.json"} | {f"step-{n:06d}.{end}" for n in STEPS for end in ("html", "parquet")}
    page = (folder / "depass/probes/step-000006.html").read_text()
    assert "probes, step 6" in page
    assert "France" in page
    read = read_attributions(folder / "depass/probes/step-000006.parquet")
    assert [attribution.text for attribution in read] == [prompt for prompt, _ in PROMPTS]


def test_without_a_logger_files_go_to_the_default_folder(tmp_path: Path) -> None:
    train(tmp_path)
    assert_files(tmp_path)


def test_a_folder_can_be_chosen(tmp_path: Path) -> None:
    train(tmp_path, CSVLogger(tmp_path, "csv", ""), folder=tmp_path / "run")
    assert_files(tmp_path / "run")


def test_csv_has_the_scalars_and_files_lie_beside_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "mine", 3)
    callback = train(tmp_path, logger)
    folder = tmp_path / "mine/version_3"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    history = callback.history["probes"]
    for name, curve in history.curves.items():
        logged = {int(row["step"]): float(row[key]) for row in rows if row[key := f"depass/probes/{name}"]}
        assert list(logged) == LOGGED
        assert list(logged.values()) == pytest.approx(curve, rel=1e-5)
    # after a validation, in one row with the validation's own loss
    assert [int(row["step"]) for row in rows if row["val_loss"] and row["depass/probes/value"]] == LOGGED[1:]
    assert_files(folder)


def test_tensorboard_has_scalars_figures_and_tables(tmp_path: Path) -> None:
    callback = train(tmp_path, TensorBoardLogger(tmp_path, "board", ""))
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "tensors": 0}).Reload()
    curve = events.Scalars("depass/probes/similarity_first")
    assert [event.step for event in curve] == LOGGED
    expected = callback.history["probes"].curves["similarity_first"]
    assert [event.value for event in curve] == pytest.approx(expected, rel=1e-5)
    for i in range(4):
        images = events.Images(f"depass/probes/map/probes-{i}")
        assert [image.step for image in images] == LOGGED
        assert images[0].width > 300
        assert images[0].encoded_image_string != images[-1].encoded_image_string
    texts = events.Tensors("depass/probes/table/text_summary")
    assert [text.step for text in texts] == LOGGED
    assert "| probes-2 | the capital of France is |" in texts[-1].tensor_proto.string_val[0].decode()
    assert_files(tmp_path / "board")


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow's own, of sqlalchemy
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_has_metrics_pages_scores_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    if store == "sqlite":  # mlflow-skinny brings neither
        pytest.importorskip("sqlalchemy")
        pytest.importorskip("alembic")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{tmp_path}/mlflow.db" if store == "sqlite" else f"file:{tmp_path}/runs"
    artifacts = tmp_path / "artifacts"
    logger = MLFlowLogger("tests", tracking_uri=uri, artifact_location=artifacts.as_uri())
    callback = train(tmp_path, logger, folder=tmp_path)
    client = mlflow.MlflowClient(uri)
    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    for name, curve in callback.history["probes"].curves.items():
        logged = client.get_metric_history(run.info.run_id, f"depass/probes/{name}")
        assert [metric.step for metric in logged] == LOGGED
        assert [metric.value for metric in logged] == pytest.approx(curve, rel=1e-5)
    places = [item.path for item in client.list_artifacts(run.info.run_id, "depass/probes")]
    ends = ("csv", "html", "parquet")
    assert places == [f"depass/probes/step-{n:06d}.{end}" for n in STEPS for end in ends]
    folder = artifacts / run.info.run_id / "artifacts/depass/probes"
    for file in folder.glob("*.[hp]*"):
        assert file.read_bytes() == (tmp_path / "depass/probes" / file.name).read_bytes()
    with (folder / "step-000006.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["probe"] for row in rows] == [f"probes-{i}" for i in range(len(PROMPTS))]
    assert [row["prompt"] for row in rows] == [prompt for prompt, _ in PROMPTS]
    mean = sum(float(row["value"]) for row in rows) / len(rows)
    assert mean == pytest.approx(callback.history["probes"].curves["value"][-1], rel=1e-5)
    assert_files(tmp_path)


# Weights & Biases


def records(run: Path) -> Iterator[Any]:
    """Read the file of an offline run: a header of 7 bytes, then LevelDB's log of protobuf records.

    The log is made of blocks of 32 KiB; a record that spans several is cut into pieces of types 2, 3 and 4.
    The last one may be half written.
    """
    [file] = run.glob("run-*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            yield record
            parts = b""


def history_rows(run: Path) -> list[dict[str, Any]]:
    """Return what was logged, a row at a time. The file may be written a moment after the run has ended."""
    deadline = time.monotonic() + 60
    found = list(records(run))
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < deadline, f"{run} has no end"
        time.sleep(0.1)
        found = list(records(run))
    rows: list[dict[str, Any]] = []
    for record in found:
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                key, *inner = item.nested_key
                holder = rows[-1].setdefault(key, {}) if inner else rows[-1]
                holder[inner[0] if inner else key] = json.loads(item.value_json)
    return rows


@pytest.fixture
def _finished() -> Iterator[None]:
    yield
    wandb.finish()


@pytest.mark.usefixtures("_finished")
def test_wandb_offline_has_a_page_and_a_table_a_step(tmp_path: Path) -> None:
    logger = wandb_logger("tests", save_dir=tmp_path, tags=["a"])
    assert isinstance(logger, WandbLogger)
    callback = train(tmp_path, logger)
    wandb.finish()
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    rows = history_rows(run)
    by_key = {
        key: [
            (row["trainer/global_step"], row[f"depass/probes/{key}"])
            for row in rows
            if f"depass/probes/{key}" in row
        ]
        for key in ("value", "map", "table")
    }
    assert [[step for step, _ in found] for found in by_key.values()] == [LOGGED] * 3
    values = [value for _, value in by_key["value"]]
    assert values == pytest.approx(callback.history["probes"].curves["value"], rel=1e-5)
    for step, (_, shown) in zip(STEPS, by_key["map"], strict=True):
        assert shown["_type"] == "html-file"
        assert f"probes, step {step}" in (run / "files" / shown["path"]).read_text()
    for _, shown in by_key["table"]:
        assert shown["_type"] == "table-file"
        table = json.loads((run / "files" / shown["path"]).read_text())
        assert table["columns"][:3] == ["probe", "prompt", "target"]
        assert {"similarity_first", "gained most", "lost most"} <= set(table["columns"])
        assert [row[0] for row in table["data"]] == [f"probes-{i}" for i in range(5)]
    assert len({shown["path"] for key in ("map", "table") for _, shown in by_key[key]}) == 8
    assert_versions_of_one_artifact(run)
    assert_files(tmp_path)


def assert_versions_of_one_artifact(run: Path) -> None:
    """The scores of every step are a version of one artifact, which is that step's file."""
    logged = [record.artifact for record in records(run) if record.HasField("artifact")]
    found = [artifact for artifact in logged if artifact.type == "attributions"]  # a table is one, too
    assert [sorted(artifact.aliases) for artifact in found] == [["latest", f"step-{n}"] for n in STEPS]
    [name] = {artifact.name for artifact in found}
    assert name.startswith("attributions-probes-")
    for step, artifact in zip(STEPS, found, strict=True):
        [entry] = artifact.manifest.contents
        assert entry.path == "attributions.parquet"
        written = run.parent.parent / f"depass/probes/step-{step:06d}.parquet"
        assert entry.size == written.stat().st_size
        assert json.loads(artifact.metadata)["step"] == step


SCRIPT = """
import time, wandb
from depass_lightning.monitoring.wandb_logger import wandb_logger

began = time.monotonic()
logger = wandb_logger(save_dir="logs", init_timeout=2)
logger.log_metrics({"loss": 1.0}, step=3)
print("STARTED AFTER", time.monotonic() - began, flush=True)
wandb.finish()
"""


def at_a_terminal(folder: Path, **variables: str) -> tuple[str, float]:
    """Run the script where it could ask a person; return what it said, and after how long it logged."""
    unwanted = ("WANDB_", "PYTEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment |= {"HOME": str(folder), "NETRC": os.devnull, "PYTHONPATH": str(ROOT)} | variables
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=environment, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    said = b""
    deadline = time.monotonic() + 200
    while select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    else:
        process.kill()
    os.close(terminal)
    assert process.wait() == 0, said.decode()
    [run] = (folder / "logs/wandb").glob("offline-run-*")
    assert [row["loss"] for row in history_rows(run)] == [1.0]
    return said.decode(), float(said.decode().split("STARTED AFTER ")[1].split()[0])


@pytest.mark.slow
def test_wandb_does_not_ask_at_a_terminal(tmp_path: Path) -> None:
    said, seconds = at_a_terminal(tmp_path)
    assert "there are no credentials for Weights & Biases, so this run is recorded offline" in said
    assert seconds < 30


@pytest.mark.slow  # W&B's own attempts to reach the server
def test_wandb_does_not_wait_for_a_server(tmp_path: Path) -> None:
    said, seconds = at_a_terminal(
        tmp_path, WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert "Weights & Biases did not start" in said
    assert seconds < 60


@pytest.mark.usefixtures("_finished")
@pytest.mark.parametrize("error", [wandb.errors.CommError("no server"), TimeoutError("no answer")])  # type: ignore[attr-defined]
def test_wandb_that_does_not_start_records_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    modes, init = [], wandb.init

    def unreachable(**options: Any) -> Any:
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise error
        return init(**options)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_logger(save_dir=tmp_path).experiment.offline
    assert modes == ["online", "offline"]
    assert f"did not start ({error}); this run is recorded offline" in caplog.text


@pytest.mark.parametrize(
    ("variable", "offline", "account", "mode"),
    [
        (None, False, True, "online"),
        (None, True, True, "offline"),
        (None, False, False, "offline"),
        ("online", False, False, "offline"),
        ("offline", False, True, "offline"),
        ("disabled", False, False, "disabled"),
    ],
)
def test_who_decides_whether_wandb_is_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    offline: bool,
    account: bool,
    mode: str,
) -> None:
    asked = []

    def login(**options: Any) -> bool:
        asked.append(options)
        return account

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.delenv("WANDB_MODE")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_logger(save_dir=tmp_path, offline=offline)._wandb_init["mode"] == mode
    assert all(options == {"prompt": False, "verify": False} for options in asked)


# Configuration

NAMES = ("default", "csv", "tensorboard", "wandb", "mlflow", "many", "none")


@pytest.mark.parametrize("name", NAMES)
def test_logger_configurations_make_loggers(tmp_path: Path, name: str) -> None:
    loggers = made(f"+logger={name}", tmp_path).get("logger", {})
    kinds = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger}
    expected = {"many": ["csv", "tensorboard", "wandb"], "none": [], "default": ["csv", "wandb"]}.get(
        name, [name]
    )
    assert list(loggers) == expected
    if name != "mlflow":
        assert [type(logger) for logger in loggers.values()] != [object]
        assert all(isinstance(logger, kinds[key]) for key, logger in loggers.items())
        assert all(Path(logger.save_dir) == tmp_path for logger in loggers.values())


def test_callback_configurations_make_callbacks(tmp_path: Path) -> None:
    callbacks = made("+callbacks=default", tmp_path)["callbacks"]
    assert [type(callback).__name__ for callback in callbacks.values()] == [
        "ModelCheckpoint",
        "RichProgressBar",
        "DePassCallback",
    ]
    assert callbacks["depass"].folder == str(tmp_path)
    assert callbacks["depass"].monitor.sources["tokens"].kind == "tokens"
    assert "callbacks" not in made("+callbacks=none", tmp_path)


def made(override: str, folder: Path) -> dict[str, Any]:
    """Compose one group, and make what it describes."""
    more = [f"+paths.output_dir={folder}", "+tags=[a]", "+task_name=tests"]
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose(overrides=[override, *more])
    groups = {key: value for key, value in config.items() if key in ("callbacks", "logger") and value}
    if "mlflow" in groups.get("logger", {}):  # a package of its own
        return {"logger": OmegaConf.to_container(groups["logger"], resolve=True)}
    return {key: {name: instantiate(entry) for name, entry in group.items()} for key, group in groups.items()}
