"""One prompt's components spread over several processes: the same scores as in one."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from depass_lightning import Contrast, DePass, DePassError, Heads, Spans, Tokens
from depass_lightning.engine.parallel import ComponentParallel
from tests.reference.models import prompt
from tests.reference.zoo import build as build_family

pytestmark = pytest.mark.covering

RULES = ("softmax", "max", "relu", "linear", "taylor", "taylor forward")


def options_of(rule):
    return {"rule": rule.split()[0], "engine": "propagate" if "forward" in rule else "auto"}


def calls(depass, rules=RULES):
    """Every kind of call whose components are spread, and what it gives."""
    ids = [prompt(9), prompt(5)]
    padded = torch.stack([ids[0], torch.nn.functional.pad(ids[1], (4, 0), value=3)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    ranges = [(1, 3), (3, 4), (5, 8)]
    found = {}
    for rule in rules:
        own = options_of(rule)
        for layer in (0, 1):
            found[rule, layer] = depass.attribute(
                input_ids=padded, attention_mask=mask, target=7, source=Tokens(layer=layer), **own
            )
        found[rule, "all take part"] = depass.attribute(
            input_ids=ids[0][None], target=7, source=Tokens(exclude_first=False), **own
        )
        found[rule, "spans"] = depass.attribute(
            input_ids=ids[0][None], target=Contrast(4, 9), source=Spans(ranges, unit="token"), **own
        )
        several = depass.attribute(input_ids=ids[0][None], target=[[3, 5, 8]], **own)
        found[rule, "targets"] = list(several[0])
    found["drop"] = depass.attribute(input_ids=ids[0][None], target=7, bias="drop")
    return {key: [(one.names, one.scores, one.completeness) for one in own] for key, own in found.items()}


def in_a_process(rank, world, port, folder, budget, families, rules):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    for name in families:
        model = build_family(name, dtype=torch.float64)
        depass = DePass(model, process_group=dist.group.WORLD, memory_budget=budget)
        torch.save(calls(depass, rules), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "budget", "families", "rules"),
    [
        (2, None, ["llama"], ["softmax", "half"]),
        pytest.param(2, None, ["llama", "gpt2", "gptj"], RULES, marks=pytest.mark.slow),
        (3, 1500, ["gpt2"], RULES[:1]),
        pytest.param(3, 1500, ["gpt2"], RULES[:4], marks=pytest.mark.slow),
        pytest.param(11, None, ["llama"], ["softmax"], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_gives_the_scores_of_one(tmp_path, world, budget, families, rules):
    """More processes than components, and less memory than one position needs, included."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    given = (world, port, str(tmp_path), budget, families, rules)
    workers = [context.Process(target=in_a_process, args=(rank, *given)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        assert worker.exitcode == 0
    for name in families:
        alone = calls(DePass(build_family(name, dtype=torch.float64), memory_budget=budget), rules)
        for rank in range(world):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert found.keys() == alone.keys()
            for key, own in alone.items():
                for (names, scores, complete), (known, expected, _) in zip(found[key], own, strict=True):
                    assert names == known
                    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=1e-5, msg=str((name, key)))
                    assert key == "drop" or complete < 1e-5


def test_each_process_has_its_share_of_the_rows(monkeypatch):
    """Components that are born early have more rows: shares are of rows, not of components."""
    births, lengths = torch.arange(1000)[None], torch.tensor([1000])
    rows = []
    for rank in range(4):
        monkeypatch.setattr(ComponentParallel, "rank", rank)
        monkeypatch.setattr(ComponentParallel, "world", 4)
        own = ComponentParallel(None).keep_own(births, lengths, 1000)  # type: ignore[arg-type]
        rows.append(int((1000 - own).sum()))
    assert sum(rows) == 1000 * 1001 / 2
    assert max(rows) < 1.01 * min(rows)


@pytest.fixture
def alone():
    """A group of this one process."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"source": Heads()}, "the components of 'heads' cannot be shared by processes"),
        ("llama", {"compat": "paper_code"}, "compat='paper_code' runs in one process only"),
        ("mixtral", {}, "mixture of experts"),
    ],
)
def test_what_cannot_be_spread_is_refused(alone, family, options, message):
    depass = DePass(build_family(family), process_group=alone)
    with pytest.raises(DePassError, match=message):
        depass.attribute(input_ids=prompt(5)[None], target=7, **options)
