"""Where heads and neurons are read and masked in a running model: before their output projection."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import Projection
from depass_lightning.models.decoder import Decoder
from depass_lightning.sources import Heads, Neurons


@dataclass(frozen=True)
class Site:
    """The heads or neurons of one block.

    Args:
        layer: the block's index.
        projection: the map that takes them to the residual stream: the output projection, or the down
            projection.
        count: how many there are.
    """

    layer: int
    projection: Projection
    count: int

    def apart(self, values: Tensor, batch: int) -> Float[Tensor, "batch position component size"]:
        """Return the map's input head by head, or neuron by neuron.

        Args:
            values: the input; some models put all positions in one row.
            batch: the number of prompts.
        """
        return values.view(batch, -1, self.count, values.shape[-1] // self.count)


def sites_of(decoder: Decoder, source: Heads | Neurons) -> list[Site]:
    """Return where a source's components are, one site per block.

    Args:
        decoder: the model.
        source: the heads or neurons.

    Raises:
        DePassError: the neurons are those of a mixture of experts, which have no shared projection.
    """
    sites = []
    for layer in source.layers(len(decoder.blocks)):
        block = decoder.blocks[layer]
        if isinstance(source, Heads):
            sites.append(Site(layer, block.attention.output, block.attention.heads))
            continue
        if block.mlp.dense is None:
            raise DePassError(
                f"block {layer} is a mixture of experts, whose neurons cannot be read or masked by "
                "hooks; use heads, or the neurons of a dense block by layer"
            )
        sites.append(Site(layer, block.mlp.dense.down, block.mlp.width))
    return sites


@contextmanager
def reading(sites: list[Site]) -> Iterator[dict[int, Tensor]]:
    """Record the values of heads or neurons in the passes inside; the last pass's, by layer.

    Args:
        sites: where to read.
    """
    seen: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[layer] = arguments[0]

        return keep

    with ExitStack() as stack:
        for site in sites:
            handle = site.projection.module.register_forward_pre_hook(keeper(site.layer))
            stack.callback(handle.remove)
        yield seen


@contextmanager
def masking(sites: list[Site], kept: Mapping[int, Tensor]) -> Iterator[None]:
    """Set heads or neurons to zero at every position in the passes inside, different ones for each prompt.

    This is equivalent to zeroing their slice of the output projection, without changing a weight.

    Args:
        sites: where they are.
        kept: by layer `[batch, component]`, false where one is masked.
    """

    def masker(site: Site) -> Any:
        def mask(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values, mask = arguments[0], kept[site.layer]
            apart = site.apart(values, len(mask))
            masked = torch.where(mask.to(values.device)[:, None, :, None], apart, apart.new_zeros(()))
            return (masked.view(values.shape), *arguments[1:])

        return mask

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.projection.module.register_forward_pre_hook(masker(site)).remove)
        yield
