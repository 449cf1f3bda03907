"""A linear probe that can be read, explained and split along: weights in the model's own space.

The probe is fitted on standardised states: features of a residual stream differ in size by orders of
magnitude, and without standardising them `saga` does not get near its optimum in a thousand iterations. The
standardisation is then folded into the weights (`w / s`, `b - w·m / s`), which leaves every logit as it was,
so that `Probe.weight` is a direction of the residual stream itself.

Source: Hong et al., "DePass" (arXiv 2510.18462): logistic regression, scikit-learn's `saga`, 1000 iterations.
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.sources import Subspace
from depass_lightning.targets import ProbeLogit
from depass_lightning.utils.atomic_files import write_whole

FORMAT = "depass-probe-1"


@dataclass(frozen=True)
class Fit:
    """How a probe was fitted, and how well it does on texts that it was not fitted on.

    Attributes:
        accuracy: the share of the held-out texts that it labels right.
        majority: that share for the most frequent label of the training texts.
        texts: how many it was fitted on.
        held_out: how many texts `accuracy` is over.
        iterations: how many the solver took.
        converged: whether it stopped by itself, not at its limit.
    """

    accuracy: float
    majority: float
    texts: int
    held_out: int
    iterations: int
    converged: bool


@dataclass(frozen=True)
class ProbeReadout:
    """One logit of a probe, in the form of a fitted scikit-learn probe with two classes."""

    coef_: Float[Tensor, "1 hidden"]
    intercept_: Float[Tensor, "1"]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A logistic regression on the residual stream at one layer.

    Attributes:
        weight: `[1, hidden]` for two labels, the logit of the second; else `[label, hidden]`.
        bias: `[1]` or `[label]`.
        labels: the labels' names, in the order of the weights.
        layer: the block whose input it reads; the number of blocks means what leaves the last one.
        fit: how it was fitted.
    """

    weight: Float[Tensor, "row hidden"]
    bias: Float[Tensor, "row"]
    labels: tuple[str, ...]
    layer: int
    fit: Fit

    @cached_property
    def basis(self) -> Float[Tensor, "direction hidden"]:
        """Independent directions that span the labels' differences: one fewer than there are labels."""
        return self.weight if len(self.labels) == 2 else self.weight[:-1] - self.weight[-1:]

    def subspace(self, name: str = "subspace") -> Subspace:
        """Return the source that splits a state at the probe's layer into `basis` and the rest."""
        return Subspace(self.layer, self.basis, names=[name])

    def target(self, label: str, position: int = -1) -> ProbeLogit:
        """Return the logit of a label as a target.

        Of two labels that is the logit itself, for the first with the other sign. Of several it is the
        label's logit less the mean of all, since only differences of logits mean something.

        Args:
            label: the label's name.
            position: the position that is read; negative counts from the prompt's end.

        Raises:
            DePassError: the probe has no such label.
        """
        if label not in self.labels:
            raise DePassError(f"the probe has no label {label!r}; it has {', '.join(self.labels)}")
        place = self.labels.index(label)
        if len(self.labels) == 2:
            sign = 1.0 if place else -1.0
            readout = ProbeReadout(sign * self.weight, sign * self.bias)
        else:
            weight, bias = self.weight[place] - self.weight.mean(0), self.bias[place] - self.bias.mean()
            readout = ProbeReadout(weight[None], bias[None])
        return ProbeLogit(readout, self.layer, position)

    def logits(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows label"]:
        """Return the logit of every label; of two labels the first's is zero."""
        logits = states.to(self.weight) @ self.weight.T + self.bias
        return torch.cat([torch.zeros_like(logits), logits], -1) if len(self.labels) == 2 else logits

    def predict(self, states: Float[Tensor, "row hidden"]) -> list[str]:
        """Return the most likely label of each state."""
        return [self.labels[place] for place in self.logits(states).argmax(-1).tolist()]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the probe to a `.safetensors` file, whole or not at all."""
        metadata = {
            "format": FORMAT,
            "probe": json.dumps({"labels": self.labels, "layer": self.layer, "fit": asdict(self.fit)}),
        }
        return write_whole(path, save({"weight": self.weight, "bias": self.bias}, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LinearProbe":
        """Read a probe that `save` wrote.

        Raises:
            DePassError: the file is missing or holds no probe.
        """
        if not Path(path).is_file():
            raise DePassError(f"there is no file {path} of a probe")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DePassError(f"{Path(path).name} holds no probe; give a file that Probe.save wrote")
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        except (SafetensorError, OSError) as error:
            raise DePassError(f"{Path(path).name} cannot be read: {error}") from error
        known = json.loads(metadata["probe"])
        return cls(weight, bias, tuple(known["labels"]), known["layer"], Fit(**known["fit"]))


def train_probe(
    states: Float[Tensor, "text hidden"],
    labels: Sequence[str],
    held_out: Float[Tensor, "text hidden"],
    held_out_labels: Sequence[str],
    *,
    layer: int,
    regularisation: float = 1.0,
    iterations: int = 1000,
    seed: int = 0,
) -> LinearProbe:
    """Fit a logistic regression on states, and judge it on others.

    Args:
        states: the states to fit on.
        labels: their labels: two or more different ones.
        held_out: the states to judge it on.
        held_out_labels: their labels.
        layer: where the states stand.
        regularisation: scikit-learn's `C`: the smaller, the stronger.
        iterations: how many `saga` takes at most.
        seed: of the solver.

    Raises:
        DePassError: there are no two labels, a label of the held-out texts is new, or numbers do not match.
    """
    _check(states, labels, held_out, held_out_labels)
    features = states.double()
    mean, scale = features.mean(0), features.std(0, unbiased=False)
    scale = torch.where(scale > 0, scale, 1.0)
    model = LogisticRegression(
        C=regularisation, solver="saga", max_iter=iterations, random_state=seed, tol=1e-4
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.fit(((features - mean) / scale).numpy(), list(labels))
    for other in told:
        if not issubclass(other.category, ConvergenceWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    weight = (torch.from_numpy(model.coef_) / scale).contiguous()  # as safetensors want it
    bias = torch.from_numpy(model.intercept_) - weight @ mean
    names = tuple(str(label) for label in model.classes_)
    frequent = Counter(labels).most_common(1)[0][0]
    probe = LinearProbe(weight, bias, names, layer, Fit(0.0, 0.0, len(labels), len(held_out), 0, True))
    predictions = zip(probe.predict(held_out), held_out_labels, strict=True)
    right = sum(predicted == label for predicted, label in predictions)
    fit = Fit(
        accuracy=right / len(held_out),
        majority=list(held_out_labels).count(frequent) / len(held_out),
        texts=len(labels),
        held_out=len(held_out),
        iterations=int(model.n_iter_.max()),
        converged=not any(issubclass(warned.category, ConvergenceWarning) for warned in told),
    )
    return LinearProbe(weight, bias, names, layer, fit)


def _check(states: Tensor, labels: Sequence[str], held_out: Tensor, held_out_labels: Sequence[str]) -> None:
    if len(states) != len(labels) or len(held_out) != len(held_out_labels):
        raise DePassError(
            f"{len(states)} and {len(held_out)} states have {len(labels)} and {len(held_out_labels)} labels; "
            "give one a state"
        )
    known = set(labels)
    if len(known) < 2 or not held_out_labels:
        raise DePassError(
            f"a probe needs at least two labels and is evaluated on at least one text; got the labels "
            f"{', '.join(sorted(known)) or 'none'} and {len(held_out_labels)} texts"
        )
    if new := sorted(set(held_out_labels) - known):
        raise DePassError(f"held-out texts have labels that no training text has: {', '.join(new)}")
