"""Probes at every layer, and the layer that is chosen without looking at the texts that judge it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.linear_probes.probe import LinearProbe, train_probe
from depass_lightning.linear_probes.states import hidden_states, layers_of
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

    probes: list[LinearProbe]
    validation: list[float]

    @property
    def best(self) -> LinearProbe:
        """The probe of the layer with the highest validation accuracy, the first of several such."""
        return self.probes[max(range(len(self.probes)), key=lambda i: self.validation[i])]


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
        regularisation: scikit-learn's `C`: the smaller, the stronger the penalty.
        iterations: the maximum number of iterations of `saga`.
        seed: of the draw and of the solver.

    Raises:
        DePassError: there are fewer than ten training texts, or as for `train_probe`.
    """
    _check_enough(train.labels)
    wanted = layers_of(len(depass.decoder.blocks), layers)
    if layers is None:
        wanted = wanted[1:]
    states, judged = (
        hidden_states(depass, texts.texts, layers=wanted, position=position, batch_size=batch_size)
        for texts in (train, test)
    )
    return fit_probes(
        states,
        train.labels,
        judged,
        test.labels,
        layers=wanted,
        regularisation=regularisation,
        iterations=iterations,
        seed=seed,
    )


def fit_probes(
    states: Float[Tensor, "layer text hidden"],
    labels: Sequence[str],
    held_out: Float[Tensor, "layer text hidden"],
    held_out_labels: Sequence[str],
    *,
    layers: Sequence[int],
    regularisation: float = 1.0,
    iterations: int = 1000,
    seed: int = 0,
) -> Probes:
    """Fit a probe at every layer on states that are there already, as `train_probes` does.

    Args:
        states: the training texts' states, as `hidden_states` gives them.
        labels: the training texts' labels.
        held_out: the test texts' states.
        held_out_labels: the test texts' labels.
        layers: where the states are read.
        regularisation: as in `train_probes`.
        iterations: as in `train_probes`.
        seed: as in `train_probes`.

    Raises:
        DePassError: there are fewer than ten training texts, or as for `train_probe`.
    """
    _check_enough(labels)
    order = random.Random(f"validation {seed}").sample(range(len(labels)), len(labels))
    cut = round(len(order) * (1 - VALIDATION))
    settings = {
        "regularisation": regularisation,
        "iterations": iterations,
        "seed": seed,
    }

    def part(rows: list[int], index: int) -> tuple[Tensor, list[str]]:
        return states[index][rows], [labels[row] for row in rows]

    probes, validation = [], []
    for index, layer in enumerate(layers):
        tried = train_probe(*part(order[:cut], index), *part(order[cut:], index), layer=layer, **settings)
        validation.append(tried.fit.accuracy)
        probes.append(
            train_probe(states[index], labels, held_out[index], held_out_labels, layer=layer, **settings)
        )
    return Probes(probes, validation)


def _check_enough(labels: Sequence[str]) -> None:
    if len(labels) < 10:
        raise DePassError(f"{len(labels)} texts are too few to fit a probe and to choose a layer by; give 10")
