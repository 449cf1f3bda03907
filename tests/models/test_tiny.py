"""The bundled model as shipped: its answers, and its tokenizer."""

import json
import random

import pytest
import torch

from depass_lightning.models.load import TINY, load_model
from depass_lightning.modules.bundled_model import build_tokenizer, untrained
from depass_lightning.tasks import load
from depass_lightning.tasks.synthetic import corpus
from depass_lightning.tasks.synthetic.vocabulary import NAMES


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@torch.no_grad()
def last_logits(tiny, prompts, mask_with=None):
    """The next token's logits [prompt, vocabulary], prompts padded on the right."""
    model, tokenizer = tiny
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    last = batch["attention_mask"].sum(1) - 1
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[torch.arange(len(prompts)), last]


def ids_of(tiny, texts):
    return torch.tensor([tiny[1].encode(text, add_special_tokens=False)[0] for text in texts])


def accuracy(tiny, prompts, answers):
    return (last_logits(tiny, prompts).argmax(-1) == ids_of(tiny, answers)).float().mean().item()


def test_it_solves_held_out_ioi(tiny):
    task = list(load("ioi", size=1000, seed=11))
    assert accuracy(tiny, [e.prompt for e in task], [e.answer for e in task]) >= 0.99


def test_it_knows_its_facts_in_the_way_it_has_not_read(tiny):
    task = list(load("known"))
    assert accuracy(tiny, [e.prompt for e in task], [e.answer for e in task]) >= 0.95


def test_it_looks_past_an_idle_sentence(tiny):
    draw = random.Random(0)
    fillers = [filler for filler in corpus.FILLERS if "{" not in filler] + ["{name} has a new book."]
    for task, least in ((list(load("ioi", size=400, seed=12)), 0.97), (list(load("known")), 0.95)):
        prompts = [f"{draw.choice(fillers).format(name=draw.choice(NAMES))} {e.prompt}" for e in task]
        assert accuracy(tiny, prompts, [e.answer for e in task]) >= least


def test_it_knows_no_new_facts(tiny):
    task = list(load("known", split="new-test"))
    assert accuracy(tiny, [e.prompt for e in task], [e.answer for e in task]) <= 0.2


def test_a_free_prompt(tiny):
    prompt = "When Mary and John went to the store, John gave a drink to"
    assert accuracy(tiny, [prompt], [" Mary"]) == 1
    assert accuracy(tiny, ["The capital of France is"], [" Paris"]) == 1


def test_without_the_indirect_object_it_has_no_answer(tiny):
    """The right tokens are known from the model itself, independent of any attribution."""
    _, tokenizer = tiny
    found = 0
    task = list(load("ioi", size=60, seed=13))
    for example in task:
        words = tokenizer(example.prompt, return_offsets_mapping=True)["offset_mapping"][1:]
        starts = [start if start == 0 else start + (example.prompt[start] == " ") for start, _ in words]
        spans = [(start, end) for start, (_, end) in zip(starts, words, strict=True)]
        occluded = [example.prompt[:start] + "<unk>" + example.prompt[end:] for start, end in spans]
        logits = last_logits(tiny, [example.prompt, *occluded])
        answer, foil = ids_of(tiny, [example.answer, example.foil])
        contrast = logits[:, answer] - logits[:, foil]
        found += spans[int((contrast[0] - contrast[1:]).argmax())] in example.evidence_ranges()
    assert found / len(task) >= 0.95


def test_it_is_small_and_anybody_may_read_it():
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        f.name for f in files
    }
    assert sum(path.stat().st_size for path in files) < 400_000
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_it_is_what_the_code_makes(tiny):
    """A word added to the corpus asks for a new training."""
    model, tokenizer = tiny
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
        build_tokenizer().backend_tokenizer.to_str()
    )
    fresh, _ = untrained()
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in fresh.named_parameters()
    }
    assert model.dtype == torch.float32
    assert tokenizer.bos_token_id == 0


def test_every_generated_word_is_a_token(tiny):
    _, tokenizer = tiny
    texts = [e.prompt + str(e.answer) for name in ("ioi", "known") for e in load(name, size=300)]
    texts += [
        passage.text for passage in corpus.passages(300) if not any(u in passage.text for u in corpus.UNKNOWN)
    ]
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(texts)["input_ids"] for i in ids}


def test_the_tokenizer_keeps_offsets(tiny):
    _, tokenizer = tiny
    text = "When Mary and Zaphod went to the store, Zaphod gave a zorp to"
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    assert ids[0] == tokenizer.bos_token_id
    assert offsets[0] == (0, 0)
    assert "".join(text[start:end] for start, end in offsets) == text
    unknown = [
        text[start:end] for i, (start, end) in zip(ids, offsets, strict=True) if i == tokenizer.unk_token_id
    ]
    assert unknown == [" Zaphod", " Zaphod", " zorp"]
    assert tokenizer.encode("Mary", add_special_tokens=False) == tokenizer.encode(
        " Mary", add_special_tokens=False
    )
    known = "When Mary and John went to the store, John gave a drink to"
    assert tokenizer.decode(tokenizer.encode(known), skip_special_tokens=True) == known
