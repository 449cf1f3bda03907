"""How large heads and neurons are, whatever the target: the norm of what they write, and activations."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.hook_points import Site, reading
from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.patching import ComponentBaseline
from depass_lightning.sources import Neurons, Source


class _Size(ComponentBaseline):
    """A number a position, averaged over them.

    Args:
        depass: the model, with its tokenizer.
        source: `Heads()` or `Neurons()`, of one layer or of all.
        positions: "all" averages over the positions up to the target's, "last" takes the target's alone.

    Raises:
        DePassError: the source is something else, or `positions` is unknown.
    """

    def __init__(
        self, depass: DePass, source: Source | None = None, *, positions: Literal["all", "last"] = "all"
    ) -> None:
        super().__init__(depass, source)
        if positions not in ("all", "last"):
            raise DePassError(f"{self.name}: positions must be 'all' or 'last'; got {positions!r}")
        self.positions = positions

    @override
    def score(self, batch: Batch) -> Tensor:
        with reading(self.sites) as seen:
            batch.values()
        real = batch.real
        if self.positions == "last":
            real = torch.zeros_like(real).scatter_(1, batch.positions[:, None], True)
        means = []
        for site in self.sites:
            values = seen[site.layer].to(batch.ids.device, batch.decoder.dtype)
            sizes = self.of(site, site.apart(values, len(batch.ids)))
            sizes = torch.where(real[:, :, None], sizes, sizes.new_zeros(()))
            means.append(sizes.sum(1) / real.sum(1, keepdim=True))
        return self.source.chosen(torch.stack(means, 1))

    @abstractmethod
    def of(
        self, site: Site, values: Float[Tensor, "batch position component size"]
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
    def of(self, site: Site, values: Tensor) -> Tensor:
        weight = site.projection.linear(values.dtype).weight.to(values.device)
        slices = weight.view(len(weight), site.count, -1).permute(1, 2, 0)  # component, size, hidden
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
    def of(self, site: Site, values: Tensor) -> Tensor:
        return values.squeeze(-1)
