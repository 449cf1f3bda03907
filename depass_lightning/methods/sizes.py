"""How large heads and neurons are, whatever the target: the norm of what they write, and activations."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.base import Baseline
from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.places import Place, places_in, reading
from depass_lightning.sources import Heads, Neurons, Source


class _Size(Baseline):
    """A number a position, averaged over them."""

    sources: ClassVar[tuple[type[Source], ...]] = (Heads, Neurons)

    def __init__(
        self, depass: DePass, source: Source | None = None, *, positions: Literal["all", "last"] = "all"
    ) -> None:
        super().__init__(depass, source)
        self.places = dict(enumerate(places_in(depass.decoder, self.source)))
        if positions not in ("all", "last"):
            raise DePassError(f"{self.name}: positions must be 'all' or 'last'; got {positions!r}")
        self.positions = positions

    @override
    def score(self, batch: Batch) -> Tensor:
        with reading(self.places, len(batch.ids)) as seen:
            batch.values()
        real = batch.real
        if self.positions == "last":
            real = torch.zeros_like(real).scatter_(1, batch.positions[:, None], True)
        means = []
        for number, place in self.places.items():
            sizes = self.of(place, seen[number].to(batch.ids.device, batch.decoder.dtype))
            sizes = torch.where(real[:, :, None], sizes, sizes.new_zeros(()))
            means.append(sizes.sum(1) / real.sum(1, keepdim=True))
        return self.source.chosen(torch.stack(means, 1))

    @abstractmethod
    def of(
        self, place: Place, values: Float[Tensor, "batch position component size"]
    ) -> Float[Tensor, "batch position component"]:
        """Return each component's size at each position."""


class Norm(_Size):
    """The L2 norm of what a head or neuron writes into the residual stream, before any norm after it.

    Args:
        depass: the model, with its tokenizer.
        source: `Heads()` or `Neurons()`, of one layer or of all.
        positions: "all" averages over the positions up to the target's, "last" takes the target's alone.

    Raises:
        DePassError: the source is something else, or `positions` is unknown.
    """

    name: ClassVar[str] = "norm"

    @override
    def of(self, place: Place, values: Tensor) -> Tensor:
        assert place.projection is not None
        weight = place.projection.linear(values.dtype).weight.to(values.device)
        slices = weight.view(len(weight), place.count, -1).permute(1, 2, 0)  # component, size, hidden
        # |W z|^2 is z W^T W z, which needs no state a head.
        squares = slices @ slices.transpose(1, 2)
        return ((values[..., None, :] @ squares).squeeze(-2) * values).sum(-1).clamp(min=0).sqrt()


class Activation(_Size):
    """A neuron's value: the activation function's output, times the up-projection in a gated MLP.

    Args:
        depass: the model, with its tokenizer.
        source: `Neurons()`, of one layer or of all.
        positions: "all" averages over the positions up to the target's, "last" takes the target's alone.

    Raises:
        DePassError: the source is something else, or `positions` is unknown.
    """

    name: ClassVar[str] = "activation"
    sources: ClassVar[tuple[type[Source], ...]] = (Neurons,)

    @override
    def of(self, place: Place, values: Tensor) -> Tensor:
        return values.squeeze(-1)
