"""Node-level circuits: how much of a target's value the highest components give alone.

The nodes with the highest scores are kept, and all other nodes are ablated. With m(C) the target's value,
averaged over prompts, with only the nodes C kept, N all nodes and {} none, the faithfulness of a circuit is

    f(C) = (m(C) - m({})) / (m(N) - m({}))

CPR, the circuit performance ratio, is the area under f over the fraction of nodes that is kept; CMD, the
circuit-model distance, is the area under |1 - f|. Areas are trapezoids between the benchmark's fractions,
from 0.001 to 1, linear in the fraction.

Source: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (ICML 2025, arXiv 2504.13151), the
circuit localization track, for nodes instead of edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.token_removal import area
from depass_lightning.faithfulness.true_ablation import (
    Replacement,
    Target,
    places_of,
    substitutes_of,
    target_values,
)
from depass_lightning.methods.model_runs import as_depass_runs
from depass_lightning.methods.places import Place, replaced
from depass_lightning.models.decoder import Decoder
from depass_lightning.results.attribution import Attribution
from depass_lightning.utils.batching import in_batches
from depass_lightning.utils.bootstrap import Interval

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class CircuitValues:
    """A prompt's value of the target with circuits of rising size.

    Attributes:
        fractions: the fractions of the nodes that are kept.
        values: the target's value with that many kept.
        whole: with all of them.
        empty: with none.
    """

    fractions: Sequence[float]
    values: Sequence[float]
    whole: float
    empty: float


@dataclass(frozen=True)
class CircuitScores:
    """How faithful circuits of rising size are, with bootstrap 95% CIs over prompts.

    Attributes:
        cpr: the circuit performance ratio, higher is better.
        cmd: the circuit-model distance, lower is better.
        faithfulness: of each size.
    """

    cpr: Interval
    cmd: Interval
    faithfulness: list[float]


def circuit_values(
    decoder: Decoder,
    attributions: Sequence[Attribution],
    replacement: Replacement = "zero",
    *,
    references: Sequence[Sequence[int]] = (),
    fractions: Sequence[float] = FRACTIONS,
    progress: bool = False,
) -> list[CircuitValues]:
    """Return the target's value with only the highest nodes kept, all others ablated at every position.

    There is one ranking, by the scores' mean over all attributions, as in the benchmark. Token embeddings are
    kept, except in the empty circuit under `resample`, which is the run of the reference.

    Args:
        decoder: the model that was attributed.
        attributions: scores of the same heads, neurons, attentions or MLPs for several prompts.
        replacement: what stands in an ablated node's place.
        references: as for `ablation_effects`; the benchmark resamples from a counterfactual of each prompt.
        fractions: the fractions of the nodes that are kept, each rounded down to whole nodes.
        progress: show a progress bar.

    Raises:
        DePassError: as for `ablation_effects`, or the attributions are of different components or of tokens.
    """
    if not attributions:
        return []
    substitutes = substitutes_of(decoder, attributions, replacement, references, 0)
    places, targets = places_of(decoder, attributions[0])
    names = [attribution.names for attribution in attributions]
    if names != [names[0]] * len(names) or "embedding" in places:
        raise DePassError("a circuit has the same heads, neurons or modules for all prompts")
    indices = [target.index for target in targets]
    scores = torch.stack([attribution.scores[indices] for attribution in attributions]).mean(0)
    order = scores.sort(descending=True, stable=True).indices.tolist()
    counts = [*(int(fraction * len(targets)) for fraction in fractions), len(targets), 0]
    circuits = [order[:count] for count in counts]
    masks = _masks(circuits, places, targets, decoder.device)
    lengths = [attribution.last + 1 for attribution in attributions]

    def work(numbers: list[int]) -> list[CircuitValues]:
        (index,) = numbers
        ids = torch.tensor([attributions[index].token_ids[: lengths[index]]], device=decoder.device)
        with as_depass_runs(decoder):
            values = substitutes(index)
            with replaced(places, masks, values):
                rows = target_values(decoder, attributions[index], ids.expand(len(circuits), -1)).tolist()
            if replacement == "resample":  # the empty circuit is the other prompt's run, embeddings included
                other = torch.tensor([list(references[index])], device=decoder.device)
                rows[-1] = float(target_values(decoder, attributions[index], other)[0])
        return [CircuitValues(list(fractions), rows[:-2], whole=rows[-2], empty=rows[-1])]

    return in_batches([(decoder.regime(length), length) for length in lengths], 1, work, progress, "ablating")


def _masks(
    circuits: Sequence[Sequence[int]],
    places: dict[str, Place],
    targets: Sequence[Target],
    device: torch.device,
) -> dict[str, Bool[Tensor, "circuit 1 component"]]:
    """Return by place what is ablated at every position, a circuit a row: all nodes that are not in it."""
    masks = {
        key: torch.zeros(len(circuits), 1, place.count, dtype=torch.bool) for key, place in places.items()
    }
    ablated = torch.ones(len(circuits), len(targets), dtype=torch.bool)
    for row, circuit in enumerate(circuits):
        ablated[row, list(circuit)] = False
    numbers: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        numbers.setdefault(target.place, []).append(number)
    for key, members in numbers.items():
        masks[key][:, 0, [targets[number].component for number in members]] = ablated[:, members]
    return {key: mask.to(device) for key, mask in masks.items()}


def circuit_scores(values: Sequence[CircuitValues], *, draws: int = 1000, seed: int = 0) -> CircuitScores:
    """Return CPR and CMD of circuits, from values averaged over prompts.

    Args:
        values: one per prompt, at the same fractions.
        draws: the number of bootstrap samples of the prompts.
        seed: of the samples.

    Raises:
        DePassError: there are no prompts, or ablating all nodes does not change the target's mean value.
    """
    if not values:
        raise DePassError("circuits need the values of one prompt at least")
    fractions = list(values[0].fractions)
    table = np.array([[*value.values, value.whole, value.empty] for value in values], dtype=np.float64)
    faithfulness, cpr, cmd = _areas(fractions, table.mean(0))
    generator = np.random.default_rng(seed)
    samples = [
        _areas(fractions, table[generator.integers(len(table), size=len(table))].mean(0))
        for _ in range(draws)
    ]
    low, high = np.quantile([[sample[1], sample[2]] for sample in samples], [0.025, 0.975], axis=0)
    return CircuitScores(
        cpr=Interval(cpr, float(low[0]), float(high[0])),
        cmd=Interval(cmd, float(low[1]), float(high[1])),
        faithfulness=faithfulness,
    )


def _areas(fractions: Sequence[float], means: np.ndarray) -> tuple[list[float], float, float]:
    """Return the faithfulness at every fraction, CPR and CMD."""
    *kept, whole, empty = means.tolist()
    if whole == empty:
        raise DePassError("with all nodes ablated the target's mean value is what it was: nothing to recover")
    faithfulness = [(value - empty) / (whole - empty) for value in kept]
    width = fractions[-1] - fractions[0]  # `area` is a mean height
    cpr = area(fractions, faithfulness) * width
    cmd = area(fractions, [abs(1 - value) for value in faithfulness]) * width
    return faithfulness, cpr, cmd
