"""Classifiers and reward models on a decoder: their labels are what is explained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from depass_lightning import Continuation, Contrast, DePass, DePassError, Label, LogProb, Reward, tasks
from depass_lightning.callbacks import DePassCallback
from depass_lightning.depass import DePass as Loaded
from depass_lightning.methods import make_method
from depass_lightning.models.load import TINY, load_model
from depass_lightning.storage import read_rows
from tests.commands.test_analyze import run
from tests.reference.models import SMALL, distance, padded, prompt, randomise, stay_in_float64
from tests.reference.training import trainer
from tests.reference.zoo import derivatives

KINDS: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": {}, "opt": {}, "gemma2": {}, "glm4": {}}
PADDING = 2  # the id that `padded` pads with


def classifier(kind: str, *, tokens: bool = False, **changes: Any) -> Any:
    """A tiny random classifier of three labels in float64, in evaluation mode."""
    settings = SMALL | {"num_labels": 3, "pad_token_id": PADDING} | changes
    auto: Any = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    config = AutoConfig.for_model(kind, **settings)
    config._experts_implementation = "eager"
    model = auto.from_config(config)
    randomise(model, 0)
    stay_in_float64(model.double().eval())
    return model


@torch.no_grad()
def own_logits(model: Any, ids: Tensor) -> Tensor:
    """What the model gives a text alone."""
    return model(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize(("kind", "rule"), [*((kind, "taylor") for kind in KINDS), ("llama", "half")])
def test_scores_are_the_real_models_derivatives(kind: str, rule: Any) -> None:
    model, ids = classifier(kind, **KINDS[kind]), prompt(9)
    tokens, biases, value = derivatives(model, ids, 2, 0, half=rule == "half")
    for engine in ("propagate", "adjoint"):
        found = DePass(model).attribute(
            input_ids=ids[None], target=Label(2, against="LABEL_0"), rule=rule, engine=engine
        )[0]
        assert abs(found.value - value) < 1e-9
        assert distance(found.scores[: len(ids)], tokens) < 1e-6
        if found.names[-1] == "bias":
            assert abs(float(found.scores[-1]) - biases) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_padded_batches_are_read_where_transformers_reads_them(kind: str, side: str) -> None:
    """Also a text that itself ends with the padding token, which transformers takes for padding."""
    model = classifier(kind)
    texts = [prompt(9), prompt(6, seed=1), torch.cat([prompt(5, seed=2), torch.tensor([PADDING])])]
    ids, mask = padded(texts, side)
    found = DePass(model).attribute(input_ids=ids, attention_mask=mask, target=Label(1), rule="taylor")
    alone = [DePass(model).attribute(input_ids=text[None], target=1, rule="taylor")[0] for text in texts]
    for text, one, single in zip(texts, found, alone, strict=True):
        assert abs(one.value - float(own_logits(model, text)[1])) < 1e-9
        torch.testing.assert_close(one.scores, single.scores, atol=1e-6, rtol=1e-6)
        assert one.position == len(text) - 1 - int(text[-1] == PADDING)
        assert one.completeness < 1e-6
    # Without a padding token transformers refuses batches; here texts share one all the same.
    model.config.pad_token_id = None
    last = DePass(model).attribute(input_ids=ids, attention_mask=mask, target=Label(1))[2]
    assert last.position == len(texts[2]) - 1
    assert abs(last.value - float(own_logits(model, texts[2])[1])) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_token_classifier_is_read_at_each_token(kind: str) -> None:
    model, ids = classifier(kind, tokens=True), prompt(9)
    expected = own_logits(model, ids)
    targets = [Label("LABEL_2", position=place) for place in (3, -1)]
    found = DePass(model).attribute(input_ids=ids[None], target=[targets])[0]
    for place, one in zip((3, 8), found, strict=True):
        assert abs(one.value - float(expected[place, 2])) < 1e-9
        assert one.completeness < 1e-6


def test_what_is_explained_of_a_label() -> None:
    model, ids = classifier("llama"), prompt(8)
    logits, depass = own_logits(model, ids), DePass(model)
    (one,) = depass.attribute(input_ids=ids[None], target=Label(1, of="logprob"))
    assert one.remainder is not None
    assert abs(one.value + one.remainder - float(logits.log_softmax(0)[1])) < 1e-9
    assert one.probability == pytest.approx(float(logits.softmax(0)[1]), abs=1e-9)
    (best,) = depass.attribute(input_ids=ids[None])
    assert best.target == repr(best.prediction) == repr(f"LABEL_{int(logits.argmax())}")
    assert best.correct
    occluded = make_method("occlusion", depass).attribute(input_ids=ids[None], target=Label(1, against=0))[0]
    assert abs(occluded.value - float(logits[1] - logits[0])) < 1e-9


def test_labels_that_do_not_exclude_each_other_have_a_probability_each() -> None:
    model, ids = classifier("llama", problem_type="multi_label_classification"), prompt(8)
    (one,) = DePass(model).attribute(input_ids=ids[None], target=Label(1))
    assert one.probability == pytest.approx(float(own_logits(model, ids)[1].sigmoid()), abs=1e-9)
    with pytest.raises(DePassError, match="do not exclude each other"):
        DePass(model).attribute(input_ids=ids[None], target=LogProb(1))


def test_a_reward_model_has_one_score() -> None:
    model, ids = classifier("qwen2", num_labels=1), prompt(8)
    (one,) = DePass(model).attribute(input_ids=ids[None], target=Reward())
    assert abs(one.value - float(own_logits(model, ids)[0])) < 1e-9
    assert one.rank is None
    assert one.correct is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Label("nice"), "no label 'nice'; it has 3: 'LABEL_0', 'LABEL_1', 'LABEL_2'"),
        (Label(3), "no label 3"),
        (Label(1, against=1), "compares a token with itself"),
        (Label(1, position=2), "labels a whole text, not its tokens"),
        (Reward(), "has 3 labels, not one reward"),
        (Continuation([3, 4]), "continues no text"),
    ],
)
def test_what_a_classifier_does_not_have_is_refused(target: Any, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        DePass(classifier("llama")).attribute(input_ids=prompt(6)[None], target=target)


def test_what_a_label_is_not_is_refused() -> None:
    with pytest.raises(DePassError, match="has no labels"):
        DePass.from_pretrained("tiny").attribute("Then, Mary", target=Label("positive"))
    with pytest.raises(DePassError, match="leave of= out"):
        Label(1, against=0, of="logprob")
    with pytest.raises(DePassError, match="continues no text"):
        DePass(classifier("llama")).attribute_generation(input_ids=prompt(6)[None])


def test_a_head_of_another_kind_is_refused() -> None:
    model = classifier("llama")
    model.config.id2label = {0: "no", 1: "yes"}
    with pytest.raises(DePassError, match="gives 3 numbers, but its configuration names 2 labels"):
        DePass(model)
    model = classifier("llama")
    model.score = nn.Sequential(model.score, nn.Tanh())
    with pytest.raises(DePassError, match="Sequential is not a linear layer"):
        DePass(model)
    model = classifier("llama")
    model.register_forward_hook(lambda _module, _inputs, output: _doubled(output))
    with pytest.raises(DePassError, match="gives other logits than its map to the labels"):
        DePass(model)


def _doubled(output: Any) -> Any:
    output.logits = 2 * output.logits
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A classifier on the bundled model's decoder, with labels of its own, saved with its tokenizer."""
    model, tokenizer = load_model("tiny")
    config = AutoConfig.from_pretrained(TINY)
    config.id2label, config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    built: Any = AutoModelForSequenceClassification.from_config(config)
    built.model.load_state_dict(model.model.state_dict())
    nn.init.normal_(built.score.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    place = tmp_path_factory.mktemp("classifier")
    built.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_folder_is_loaded_by_its_architecture(folder: Path) -> None:
    depass = Loaded.from_pretrained(str(folder))
    assert type(depass.model).__name__ == "LlamaForSequenceClassification"
    text = "Then, Mary and John went to the pool."
    one = depass.attribute(text, target=Label("positive", against="negative"))
    assert one.target == "'positive' − 'negative'"
    assert one.completeness < 1e-5
    same = depass.attribute(text, target=Contrast("positive", "negative"))
    assert torch.equal(one.scores, same.scores)
    one.show()


ROWS = [
    {"text": "Mary and John went to the pool.", "label": "positive", "foil": "negative", "id": "first"},
    {"text": "John gave Mary a lamp.", "label": "0", "foil": None, "id": "second"},
    {"text": "", "label": "1", "foil": None, "id": "empty"},
]


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_labelled_files_of_every_layout_are_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = tasks.load("labelled", path=write(ROWS, tmp_path / f"rows{suffix}"))
    assert [(example.id, example.prompt, example.answer, example.foil) for example in task] == [
        ("first", ROWS[0]["text"], "positive", "negative"),
        ("second", ROWS[1]["text"], "0", None),
    ]
    assert [row["row"] for row in task.skipped] == [3]
    assert "non-empty text" in task.skipped[0]["reason"]


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing more")
    (tmp_path / "wide.csv").write_text("text,label\nGood, bad,1\n")
    with pytest.raises(DePassError, match="not a readable Parquet file"):
        tasks.load("labelled", path=tmp_path / "torn.parquet")
    with pytest.raises(DePassError, match="has more cells than its header names"):
        tasks.load("labelled", path=tmp_path / "wide.csv")
    with pytest.raises(DePassError, match="give its path"):
        tasks.load("labelled")


def test_an_analysis_of_a_classifier(folder: Path, tmp_path: Path) -> None:
    rows = write(ROWS[:2], tmp_path / "rows.csv")
    overrides = ["model=hf", f"model.name={folder}", "task=labelled", f"task.path={rows}"]
    assert run(tmp_path / "run", *overrides) == 0
    first, second = read_rows(tmp_path / "run" / "attributions")
    assert (first["target"], second["target"]) == ("'positive' − 'negative'", "'negative'")
    depass = Loaded.from_pretrained(str(folder))
    chances = own_logits(depass.model, torch.tensor(first["token_ids"])).softmax(0)
    assert first["patch_top"][0] == pytest.approx(float(chances[1]), abs=1e-5), "nothing is removed yet"
    assert first["correct"] == (float(chances[1]) > 0.5)
    assert (tmp_path / "run" / "report.html").exists()


def test_an_adapter_trains_a_copy_of_the_head(folder: Path) -> None:
    """As TRL trains reward models: LoRA on the decoder, and `score` saved with the adapter."""
    peft = pytest.importorskip("peft")
    depass = Loaded.from_pretrained(str(folder))
    adapted = peft.get_peft_model(
        depass.model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
    )
    randomise(adapted, 3)
    adapted.eval()
    one = DePass(adapted, depass.tokenizer).attribute("Mary and John went to the pool.", Label("positive"))
    assert abs(one.value - float(own_logits(adapted, torch.tensor(one.token_ids))[1])) < 1e-4
    assert one.completeness < 1e-5


class Classify(pl.LightningModule):
    """Somebody's own training of a classifier."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_the_callback_watches_a_classifier(folder: Path, tmp_path: Path) -> None:
    depass = Loaded.from_pretrained(str(folder))
    text = str(ROWS[0]["text"])
    before = depass.attribute(text, Label("positive", against="negative"))
    callback = DePassCallback(
        probes=write(ROWS[:2], tmp_path / "reviews.csv"), every_n_steps=2, folder=tmp_path, on_error="raise"
    )
    depass.model.train()
    row = {"input_ids": torch.tensor(before.token_ids), "labels": torch.tensor(1)}
    trainer(tmp_path, [callback], max_steps=2).fit(
        Classify(depass.model, depass.tokenizer),
        DataLoader([row] * 4, batch_size=2),  # type: ignore[arg-type]
    )
    history = callback.history["reviews"]
    assert history.steps == [0, 2]
    assert history.curves["value"][1] != history.curves["value"][0]
    assert all(error < 1e-5 for error in history.curves["completeness"])
    after = depass.attribute(text, Label("positive", against="negative"))
    assert after.value > before.value, "it learns the label that it is shown"
    assert (tmp_path / "depass" / "reviews" / "step-000002.html").exists()
