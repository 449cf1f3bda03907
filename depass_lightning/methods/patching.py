"""Attribution patching (AtP): gradient x activation of heads, neurons or sublayers, from one backward pass.

Source: Nanda, "Attribution Patching" (2023); Kramár et al., "AtP*" (2024, arXiv 2403.00745), equation 3, with
zero in the place of a corrupted prompt's activations.

A head is taken where it is a head: its values, mixed by attention, in front of the output projection, so that
its score is its own. The comparison that was published with DePass took the output projection's result
instead and cut that into as many pieces as there are heads; each piece holds some dimensions of the residual
stream, which all heads write to, so that what it calls a head is a mixture of them.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.methods.base import Baseline
from depass_lightning.methods.gradients import embeddings_of
from depass_lightning.methods.model_runs import Batch, embeddings_replaced
from depass_lightning.methods.places import Key, Place, places_in, reading
from depass_lightning.models.decoder import Decoder
from depass_lightning.sources import Heads, Module, Neurons, Source


def activations_and_gradients(
    decoder: Decoder,
    places: Mapping[Key, Place],
    embeddings: Float[Tensor, "batch position hidden"],
    value: Callable[[], Float[Tensor, "batch"]],
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """Return components' activations and the value's gradients: `[batch, position, component, size]`.

    Args:
        decoder: the model, already set up to be run (`as_depass_runs`).
        places: where the components are.
        embeddings: what the token embeddings are replaced with.
        value: runs the model once.
    """
    # A leaf: the model's parameters may be frozen.
    embeddings = embeddings.detach().requires_grad_()
    with (
        torch.enable_grad(),
        embeddings_replaced(decoder, embeddings),
        reading(places, len(embeddings)) as seen,
    ):
        gradients = torch.autograd.grad(value().sum(), list(map(seen.__getitem__, places)))
    both = zip(places, gradients, strict=True)
    return (
        {key: seen[key].detach().to(decoder.dtype) for key in places},
        {key: gradient.to(decoder.dtype) for key, gradient in both},
    )


class AttributionPatching(Baseline):
    """Gradient x activation of each head, neuron, attention or MLP, summed over positions.

    Of tokens this is `input_gradient`.

    Args:
        depass: the model, with its tokenizer.
        source: `Heads()`, `Neurons()` or `Module(...)`, of one layer or of all.

    Raises:
        DePassError: it is something else, or the neurons are those of a mixture of experts.
    """

    name: ClassVar[str] = "atp"
    sources: ClassVar[tuple[type[Source], ...]] = (Heads, Neurons, Module)

    def __init__(self, depass: DePass, source: Source | None = None) -> None:
        super().__init__(depass, source)
        self.places = dict(enumerate(places_in(depass.decoder, self.source)))

    @override
    def score(self, batch: Batch) -> Tensor:
        activations, gradients = activations_and_gradients(
            batch.decoder, self.places, embeddings_of(batch), batch.values
        )
        effects = []
        for index in self.places:
            both = activations[index] * gradients[index]
            effects.append(both.sum((1, 3)).to(batch.ids.device))  # [batch, component]
        return self.source.chosen(torch.stack(effects, 1))
