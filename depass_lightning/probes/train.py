"""Probes at every layer, and the layer that is chosen without looking at the texts that judge it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.probes.probe import Probe, train_probe
from depass_lightning.probes.states import hidden_states, layers_of
from depass_lightning.tasks.texts import Texts

VALIDATION = 0.2  # of the training texts


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe a layer.

    Attributes:
        probes: in the order of the layers, each fitted on all training texts and judged on the test texts.
        validation: for each layer the accuracy, on a fifth of the training texts, of a probe that was fitted
            on the others: what the best layer is chosen by.
    """

    probes: list[Probe]
    validation: list[float]

    @property
    def best(self) -> Probe:
        """The probe of the layer with the highest validation accuracy, the first of several such."""
        return self.probes[max(range(len(self.probes)), key=lambda i: self.validation[i])]

    def at(self, layer: int) -> Probe:
        """Return a layer's probe.

        Raises:
            DePassError: there is none.
        """
        for probe in self.probes:
            if probe.layer == layer:
                return probe
        raise DePassError(f"there is no probe at layer {layer}; add it to layers")


def train_probes(
    depass: DePass,
    train: Texts,
    test: Texts,
    *,
    layers: Sequence[int] | None = None,
    position: int = -1,
    batch_size: int = 32,
    regularisation: float = 1.0,
    iterations: int = 1000,
    standardise: bool = True,
    seed: int = 0,
) -> Probes:
    """Fit a probe at every layer on the states of labelled texts.

    Args:
        depass: the model.
        train: the texts to fit on; a fifth of them, drawn from the seed, chooses the best layer.
        test: the texts to judge on, which have no part in any choice.
        layers: as for `hidden_states`; without the first, of which only tokens are known, by default.
        position: the token whose state is read; negative counts from each text's end.
        batch_size: how many texts go through the model at once.
        regularisation: as for `train_probe`, and so are `iterations` and `standardise`.
        seed: of the draw and of the solver.

    Raises:
        DePassError: there are fewer than ten training texts, or as for `train_probe`.
    """
    if len(train) < 10:
        raise DePassError(f"{len(train)} texts are too few to fit a probe and to choose a layer by; give 10")
    wanted = layers_of(len(depass.decoder.blocks), layers)
    if layers is None:
        wanted = wanted[1:]
    states, judged = (
        hidden_states(depass, own.texts, layers=wanted, position=position, batch_size=batch_size)
        for own in (train, test)
    )
    order = random.Random(f"validation {seed}").sample(range(len(train)), len(train))
    cut = round(len(order) * (1 - VALIDATION))
    settings = {
        "regularisation": regularisation,
        "iterations": iterations,
        "standardise": standardise,
        "seed": seed,
    }

    def part(rows: list[int], at: int) -> tuple[Tensor, list[str]]:
        return states[at][rows], [train.labels[row] for row in rows]

    probes, validation = [], []
    for at, layer in enumerate(wanted):
        tried = train_probe(*part(order[:cut], at), *part(order[cut:], at), layer=layer, **settings)
        validation.append(tried.fit.accuracy)
        probes.append(train_probe(states[at], train.labels, judged[at], test.labels, layer=layer, **settings))
    return Probes(probes, validation)
