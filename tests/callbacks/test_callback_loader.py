"""Probes from a DataLoader: which batches are understood, and what is not touched by reading them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from depass_lightning import Continuation, Contrast, DePass, DePassError, Token
from depass_lightning.callbacks import DePassCallback
from depass_lightning.monitoring.probe_sets import TargetKind, load_set
from depass_lightning.storage import read_attributions
from depass_lightning.targets import LogitReading
from depass_lightning.tasks import Example
from tests.reference.training import PROMPTS, OwnModule, fit, tokenizer, trainer

LONG, SHORT = [1, 2, 3, 4, 5], [6, 7, 8]


def loader(*batches: Mapping[str, Any]) -> DataLoader:
    """Return a loader of batches that are made already."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def padded(side: str, empty: int, *rows: list[int]) -> Tensor:
    longest = max(map(len, rows))
    fill = [[empty] * (longest - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([row + more if side == "right" else more + row for row, more in pairs])


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_say_where_the_prompt_ends(side: str) -> None:
    batch = {
        "input_ids": padded(side, 0, LONG, SHORT),
        "attention_mask": padded(side, 0, [1] * 5, [1] * 3),
        "labels": padded(side, -100, [-100, -100, 3, 4, -100], [-100, 7, -100]),
    }
    first, second = load_set("x", loader(batch), 16)
    assert (first.id, first.ids, first.target) == ("x-0", (1, 2), Continuation((3, 4)))
    assert (second.id, second.ids, second.target) == ("x-1", (6,), 7)
    assert load_set("x", loader(batch), 16, "contrast", "first")[0].target == 3
    readings: list[tuple[TargetKind, LogitReading]] = [("token", "logit"), ("logprob", "logprob")]
    for kind, of in readings:
        assert load_set("x", loader(batch), 16, kind)[0].target == Continuation((3, 4), of)
    assert load_set("x", loader(batch), 16, "own")[0].target == Token(None)


def test_a_target_follows_its_row() -> None:
    batch = {"input_ids": padded("left", 0, LONG, SHORT), "target": torch.tensor([9, 3])}
    batch["attention_mask"] = padded("left", 0, [1] * 5, [1] * 3)
    more = {"input_ids": torch.tensor([SHORT]), "target": [5]}
    found = load_set("x", loader(batch, more, more), 3)
    assert [(probe.ids, probe.target) for probe in found] == [
        ((1, 2, 3, 4, 5), 9),
        ((6, 7, 8), 3),
        ((6, 7, 8), 5),
    ]


IDS = torch.tensor([LONG])
BAD: list[tuple[Any, str]] = [
    ([1, 2], "must be a mapping with input_ids and either labels .* but it is a list"),
    ({"input_ids": IDS}, "but it is input_ids"),
    ({"input_ids": IDS, "labels": IDS}, "prompt 0 of 'x': its labels mark the first token"),
    ({"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, "its labels are -100 throughout"),
    ({"input_ids": IDS, "labels": torch.tensor([[-100, 3, 4, 5, -100]])}, "not one position earlier"),
    ({"input_ids": IDS, "labels": torch.tensor([[-100, 2, 3, 5, -100]])}, "have 5 where input_ids has 4"),
    ({"input_ids": IDS, "labels": torch.tensor([[-100, 2]])}, r"labels of \[1, 2\] must be of the shape"),
    ({"input_ids": IDS, "target": torch.tensor([1, 2])}, r"target of \[2\] must be one id a row"),
    ({"input_ids": IDS[0], "target": torch.tensor([1])}, r"input_ids of \[5\]"),
]


@pytest.mark.parametrize(("batch", "message"), BAD, ids=[message for _, message in BAD])
def test_batches_of_another_layout_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(DePassError, match=message):
        load_set("x", loader(batch), 16)


def collate(rows: list[Any]) -> dict[str, Tensor]:
    rows_ids = torch.stack(rows)
    return {"input_ids": rows_ids[:, :-1], "target": rows_ids[:, -1]}


def test_a_shuffled_loader_is_read_alike_and_left_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    shuffled = DataLoader(
        list(torch.arange(1, 13).view(4, 3)),  # type: ignore[arg-type]
        batch_size=2,
        shuffle=True,
        generator=generator,
        collate_fn=collate,
    )
    before, own = torch.get_rng_state(), generator.get_state()
    first = load_set("x", shuffled, 3)
    torch.rand(5)
    assert load_set("x", shuffled, 3) == first
    torch.set_rng_state(before)
    load_set("x", shuffled, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), own)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_training_attributes_ids_as_it_would_their_text(tmp_path: Path, with_tokenizer: bool) -> None:
    """Compared with the same prompts as text; names are texts if there is a tokenizer, else ids."""
    words = tokenizer()
    prompts = [words(prompt)["input_ids"] for prompt, _ in PROMPTS]
    answers = [words.convert_tokens_to_ids("▁" + answer.strip()) for _, answer in PROMPTS]
    batch = {
        "input_ids": padded("left", 0, *prompts),
        "attention_mask": padded("left", 0, *([1] * len(prompt) for prompt in prompts)),
        "target": torch.tensor(answers),
    }
    module = OwnModule()
    both = {"ids": loader(batch), "text": list(PROMPTS)}
    if not with_tokenizer:
        del module.tokenizer, both["text"]
    callback = DePassCallback(both, batch_size=3)  # type: ignore[arg-type]
    fit(trainer(tmp_path, [callback]), module)
    assert callback.history["ids"].curves["failed"] == [0.0] * 4
    found = read_attributions(tmp_path / "depass/ids/step-000006.parquet")
    if not with_tokenizer:
        assert len(found) == 5
        return
    for own, text in zip(found, read_attributions(tmp_path / "depass/text/step-000006.parquet"), strict=True):
        assert [name.strip() for name in own.names] == [name.strip() for name in text.names]
        torch.testing.assert_close(own.scores, text.scores)
    for name, curve in callback.history["text"].curves.items():
        assert callback.history["ids"].curves[name] == pytest.approx(curve, rel=1e-4, abs=1e-6)


class PerRank:
    """A dataset that gives every rank rows of its own, as a distributed sampler does."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rank = torch.distributed.get_rank()
        return {"input_ids": torch.tensor([[1, 2 + rank, 3 + index]]), "target": torch.tensor([4 + rank])}


def test_ranks_ask_the_same_whatever_their_loaders_give(tmp_path: Path) -> None:
    callback = DePassCallback(DataLoader(PerRank(), batch_size=None))  # type: ignore[arg-type]
    fit(trainer(tmp_path, [callback], devices=2, strategy="ddp_fork"), OwnModule())
    found = read_attributions(tmp_path / "depass/probes/step-000006.parquet")
    assert [attribution.token_ids for attribution in found] == [[1, 2, 3], [1, 2, 4], [1, 2, 5]]


def test_what_is_explained_can_be_chosen() -> None:
    example = Example("a", "Mary and John", " Mary", " John")
    [contrast] = load_set("x", [example], 1)
    [token] = load_set("x", [example], 1, "token")
    [own] = load_set("x", [example], 1, "own")
    assert contrast.target == Contrast(" Mary", " John", first=True)
    assert token.target == Token(" Mary", first=True)
    assert own.target == Token(None)
    model = OwnModule()
    found = DePass(model.inside.lm, model.tokenizer).attribute("Mary and John", own.target)
    assert found.rank == 1
    with pytest.raises(DePassError, match="target='generation' cannot be explained for probes"):
        DePassCallback(target="generation")  # type: ignore[arg-type]
