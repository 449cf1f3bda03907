"""Scores of all edges of prompts with corrupted counterparts, and circuits of the strongest ones.

With `a` what a node writes on the prompt and `b` what replaces it where an edge is ablated:

- `half`, `shap`: the edges of `DePass.circuit`, all paths together; where nodes are resampled, those of the
  difference between the two prompts;
- `eap`: edge attribution patching, (a - b) times the gradient with respect to what the reader reads on the
  prompt (Syed et al., arXiv 2310.10348);
- `eap_ig`: the same with the mean of the gradients at inputs between the corrupted prompt's embeddings and
  the prompt's (Hanna et al., arXiv 2403.17806);
- `random`: random numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.engine.memory import Budget
from depass_lightning.faithfulness.circuits import FRACTIONS, CircuitValues
from depass_lightning.faithfulness.edge_circuits import (
    PairBatch,
    ablated_values,
    input_gradients,
    node_outputs,
    possible_edges,
)
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.methods.model_runs import as_depass_runs
from depass_lightning.results.circuit import Circuit
from depass_lightning.studies.circuits.node_scores import RULES, NodePairs
from depass_lightning.utils.batching import in_batches

METHODS = (*RULES, "eap", "eap_ig", "random")
COPIES = 16  # tensors of the size of all nodes' outputs that a pass with gradients holds at once, about


class EdgeRuns:
    """Scores edges, and ablates those outside a circuit, with at most `batch_size` prompts in a pass.

    Raises:
        DePassError: the model's residual stream is not the sum of what nodes write.
    """

    def __init__(
        self,
        depass: DePass,
        pairs: NodePairs,
        replacement: Replacement,
        *,
        steps: int = 5,
        batch_size: int = 32,
        progress: bool = False,
    ) -> None:
        self.depass, self.pairs, self.replacement = depass, pairs, replacement
        self.steps, self.progress = steps, progress
        self.edges = possible_edges(depass.decoder)
        longest = max(attribution.position + 1 for attribution in pairs.attributions)
        decoder = depass.decoder
        size = len(self.edges) * longest * decoder.hidden_size * decoder.dtype.itemsize * COPIES
        self.batch_size = max(1, min(batch_size, Budget.default(decoder.device).components // size))
        self.means = self._means() if replacement == "mean" else None

    def scores(self, methods: Sequence[str]) -> dict[str, Float[Tensor, "from to"]]:
        """Return each method's scores of all edges, averaged over the prompts."""
        scores: dict[str, Tensor] = {}
        for rule in RULES:
            if rule in methods:
                circuits = self.pairs.circuits(self.depass, rule, self.progress)
                scores[rule] = torch.stack([self._of_circuit(circuit) for circuit in circuits]).mean(0)
        if {"eap", "eap_ig"} & {*methods}:
            rows = self._shared(self._patching, "scoring edges")
            scores |= {name: torch.stack([row[name] for row in rows]).mean(0) for name in ("eap", "eap_ig")}
        scores["random"] = torch.rand(self.edges.shape, generator=torch.Generator().manual_seed(0))
        return {method: scores[method] for method in methods}

    def values(
        self, scores: Float[Tensor, "from to"], fractions: Sequence[float] = FRACTIONS
    ) -> list[CircuitValues]:
        """Return each prompt's value with only the edges with the largest absolute scores kept."""
        places = self.edges.flatten().nonzero()[:, 0]
        order = places[scores.flatten()[places].abs().sort(descending=True, stable=True).indices]
        counts = [*(int(fraction * len(places)) for fraction in fractions), len(places), 0]

        def work(batch: PairBatch) -> list[CircuitValues]:
            base, of_count = self._substitutes(batch), {}
            for count in sorted({*counts}):
                kept = torch.zeros_like(self.edges)
                kept.view(-1)[order[:count]] = True
                of_count[count] = ablated_values(self.depass.decoder, batch, kept, base).tolist()
            rows = zip(*(of_count[count] for count in counts), strict=True)
            return [
                CircuitValues([*fractions], values, whole=whole, empty=empty)
                for *values, whole, empty in rows
            ]

        return self._shared(work, "ablating edges")

    def _shared(self, work: Callable[[PairBatch], list[Any]], description: str) -> list[Any]:
        """Run batches of prompts, shared among processes."""
        decoder, pairs = self.depass.decoder, self.pairs

        def joined(indices: list[int]) -> list[Any]:
            chosen = [pairs.attributions[i] for i in indices], [pairs.corrupted[i] for i in indices]
            with as_depass_runs(decoder):
                return work(PairBatch.of(decoder, *chosen))

        lengths = [attribution.position + 1 for attribution in pairs.attributions]
        kinds = [(decoder.regime(length), length) for length in lengths]
        return in_batches(kinds, self.batch_size, joined, self.progress, description)

    def _substitutes(self, batch: PairBatch) -> Float[Tensor, "node row position hidden"]:
        if self.replacement == "resample":
            return node_outputs(self.depass.decoder, batch, batch.corrupted)[0]
        if self.means is not None:
            return self.means[:, None, None].to(batch.ids.device)
        decoder = self.depass.decoder
        return torch.zeros(len(self.edges) - 1, 1, 1, 1, dtype=decoder.dtype, device=batch.ids.device)

    def _means(self) -> Float[Tensor, "node hidden"]:
        """Return the mean of what nodes write over the corrupted prompts and their positions."""

        def work(batch: PairBatch) -> list[tuple[Tensor, int]]:
            outputs, _ = node_outputs(self.depass.decoder, batch, batch.corrupted)
            ends = (batch.ends + 1).tolist()
            return [(outputs[:, row, :end].sum(1).cpu(), end) for row, end in enumerate(ends)]

        sums, counts = zip(*self._shared(work, "averaging"), strict=True)
        return torch.stack(sums).sum(0) / sum(counts)

    def _patching(self, batch: PairBatch) -> list[dict[str, Tensor]]:
        """Return the scores of edge attribution patching for each prompt."""
        decoder = self.depass.decoder
        clean, base = (decoder.token_embedding(ids).detach() for ids in (batch.ids, batch.corrupted))
        change = node_outputs(decoder, batch, batch.ids)[0] - self._substitutes(batch)
        total = gradients = torch.zeros(())
        for step in range(1, self.steps + 1):  # the last one is the prompt itself
            embeddings = torch.lerp(base, clean, step / self.steps) if step < self.steps else clean
            gradients = input_gradients(decoder, batch, embeddings)
            total = total + gradients / self.steps
        tables = {
            name: torch.einsum("ubnd,vbnd->buv", change, gradient).cpu()
            for name, gradient in (("eap", gradients), ("eap_ig", total))
        }
        # No node reads before the first head, and the target writes nothing.
        padded = {name: torch.nn.functional.pad(table, (1, 0, 0, 1)) for name, table in tables.items()}
        return [{name: table[row] for name, table in padded.items()} for row in range(len(batch.ids))]

    def _of_circuit(self, circuit: Circuit) -> Float[Tensor, "from to"]:
        """Return a circuit's edges without those of the constants, which are not ablated."""
        assert circuit.difference is not None
        edges = (circuit.difference if self.replacement == "resample" else circuit).edges.sum(0)
        nodes = [i for i, node in enumerate(circuit.nodes) if node.kind != "bias"]
        return edges[nodes][:, nodes]
