"""Scores of all heads and MLPs of a prompt, by methods that compare it with a corrupted prompt.

With `a` what a node is on the prompt and `b` what replaces it where it is ablated:

- `half`, `shap`: the nodes' scores in `DePass.circuit`; where nodes are resampled, those of the difference
  between the two prompts;
- `atp`: attribution patching, (a - b) times the gradient on the prompt (Nanda 2023). A node's outgoing edges
  in edge attribution patching (EAP; Syed et al., arXiv 2310.10348) sum to this score;
- `eap_ig`: the same with the mean of the gradients at inputs between the corrupted prompt's embeddings and
  the prompt's (Hanna et al., "Have Faith in Faithfulness", arXiv 2403.17806), summed over outgoing edges;
- `patching`: activation patching, what the target's value really loses with one node ablated;
- `gradient_norm`: the gradient's length, summed over positions;
- `random`: random numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.attribution.edges import CircuitOptions
from depass_lightning.depass import DePass
from depass_lightning.engine.rules import RuleName
from depass_lightning.faithfulness.true_ablation import (
    Replacement,
    ablation_effects,
    places_of,
    substitutes_of,
    target_values,
)
from depass_lightning.methods import make_method
from depass_lightning.methods.model_runs import as_depass_runs
from depass_lightning.methods.patching import activations_and_gradients
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.circuit import Circuit
from depass_lightning.sources import Heads, Module
from depass_lightning.studies.circuits.prompt_pairs import CORRUPTED
from depass_lightning.tasks import Example
from depass_lightning.utils.batching import in_batches
from depass_lightning.utils.tokenization import encode

RULES: tuple[RuleName, ...] = ("half", "shap")
METHODS = (*RULES, "atp", "eap_ig", "patching", "gradient_norm", "random")
Scores = Mapping[str, Float[Tensor, "node"]]  # by method


@dataclass(frozen=True)
class NodePairs:
    """Prompts with their nodes, and their corrupted counterparts.

    Args:
        examples: the prompts.
        attributions: the prompts' heads and MLPs, with random scores.
        corrupted: the token ids of each corrupted prompt.
    """

    examples: Sequence[Example]
    attributions: Sequence[Attribution]
    corrupted: Sequence[Sequence[int]]
    _circuits: dict[str, list[Circuit]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, depass: DePass, examples: Sequence[Example], size: int, **options: Any) -> "NodePairs":
        """Return the first `size` prompts whose answer the model prefers to its foil."""
        assert depass.tokenizer is not None
        prompts, targets = (
            [example.prompt for example in examples],
            [example.target() for example in examples],
        )
        if not prompts:
            return cls([], [], [])
        parts = (
            make_method("random", depass, source).attribute(prompts, targets, **options)
            for source in (Heads(), Module("mlp"))
        )
        chosen = [
            (
                example,
                replace(
                    heads,
                    scores=torch.cat([heads.scores, mlps.scores]),
                    components=[*heads.components, *mlps.components],
                    groups=1,
                ),
            )
            for example, heads, mlps in zip(examples, *parts, strict=True)
            if heads.value > 0
        ][:size]
        corrupted = [encode(example.variants[CORRUPTED], depass.tokenizer).ids for example, _ in chosen]
        return cls([example for example, _ in chosen], [nodes for _, nodes in chosen], corrupted)

    def circuits(self, depass: DePass, rule: RuleName, progress: bool = False) -> list[Circuit]:
        """Return the prompts' circuits under a rule, computed once."""

        def work(indices: list[int]) -> list[Circuit]:
            (example,) = (self.examples[index] for index in indices)
            options: CircuitOptions = {"rule": rule, "nodes": ("embedding", "heads", "mlps")}
            options["corrupted"] = example.variants[CORRUPTED]
            return [depass.circuit(example.prompt, example.target(), **options)]

        if rule not in self._circuits:
            kinds = [(0, len(ids)) for ids in self.corrupted]
            self._circuits[rule] = in_batches(kinds, 1, work, progress, f"{rule} circuits")
        return self._circuits[rule]

    def references(self, replacement: Replacement) -> Sequence[Sequence[int]]:
        """Return the prompts that ablated nodes are taken from, as for `ablation_effects`."""
        return () if replacement == "zero" else self.corrupted


def node_scores(
    depass: DePass,
    pairs: NodePairs,
    methods: Sequence[str],
    replacement: Replacement,
    *,
    steps: int = 5,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Scores]:
    """Score the nodes of all prompts by each method; `patching` is always among them."""
    decoder, references = depass.decoder, pairs.references(replacement)
    substitutes = substitutes_of(decoder, pairs.attributions, replacement, references, 0)
    circuits = {rule: pairs.circuits(depass, rule, progress) for rule in RULES if rule in methods}

    def work(indices: list[int]) -> list[Scores]:
        (index,) = indices
        attribution = pairs.attributions[index]
        with as_depass_runs(decoder):
            gradients = _Gradients(depass, attribution, pairs.corrupted[index], steps)
            scores = gradients.scores(substitutes(index))
        scores |= {
            rule: _of_circuit(rows[index], attribution, replacement) for rule, rows in circuits.items()
        }
        scores["random"] = attribution.scores
        return [{method: scores[method] for method in methods if method != "patching"}]

    lengths = [attribution.position + 1 for attribution in pairs.attributions]
    scored = in_batches([(decoder.regime(n), n) for n in lengths], 1, work, progress, "scoring")
    effects = ablation_effects(
        decoder,
        pairs.attributions,
        replacement,
        references=references,
        start=0,
        batch_size=batch_size,
        progress=progress,
    )
    return [
        {**row, "patching": torch.tensor([effect[i] for i in range(len(effect))])}
        for row, effect in zip(scored, effects, strict=True)
    ]


class _Gradients:
    """What the nodes of one prompt are, and the target's gradients with respect to them."""

    def __init__(
        self, depass: DePass, attribution: Attribution, corrupted: Sequence[int], steps: int
    ) -> None:
        decoder = depass.decoder
        self.places, self.targets = places_of(decoder, attribution)
        ids = torch.tensor([attribution.token_ids[: attribution.position + 1]], device=decoder.device)
        other = torch.tensor([list(corrupted)], device=decoder.device)
        clean, base = (decoder.token_embedding(row).detach() for row in (ids, other))
        self.mean: dict[str, Tensor] = {}
        for step in range(1, steps + 1):  # the last one is the prompt itself
            embeddings = torch.lerp(base, clean, step / steps) if step < steps else clean
            self.activations, self.gradients = activations_and_gradients(
                decoder, self.places, embeddings, lambda: target_values(decoder, attribution, ids)
            )
            for key, gradient in self.gradients.items():
                self.mean[key] = self.mean.get(key, 0) + gradient / steps

    def scores(self, substitutes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores of the methods that use gradients, for what replaces the nodes."""
        by_place: dict[str, dict[str, Tensor]] = {"atp": {}, "eap_ig": {}, "gradient_norm": {}}
        for key, activation in self.activations.items():  # [1, position, component, size]
            change = activation
            if key in substitutes:
                change = activation - substitutes[key].to(activation)
            by_place["atp"][key] = (change * self.gradients[key]).sum((0, 1, 3))
            by_place["eap_ig"][key] = (change * self.mean[key]).sum((0, 1, 3))
            by_place["gradient_norm"][key] = self.gradients[key].norm(dim=3).sum((0, 1))
        return {
            method: torch.stack([values[node.place][node.component] for node in self.targets]).cpu()
            for method, values in by_place.items()
        }


def _of_circuit(circuit: Circuit, attribution: Attribution, replacement: str) -> Tensor:
    """Return a circuit's scores in the order of an attribution's nodes."""
    assert circuit.difference is not None
    scores = (circuit.difference if replacement == "resample" else circuit).scores
    indices = {(node.kind, node.layer, node.index): i for i, node in enumerate(circuit.nodes)}
    return scores[[indices[node.kind, node.layer, node.index] for node in attribution.components]]
