"""Where heads, neurons, attentions and MLPs are read and replaced in a running model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import Projection
from depass_lightning.models.block import Block
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.mixers.side_by_side import JoinedHeads
from depass_lightning.sources import Heads, Module, Source

Key = TypeVar("Key")


@dataclass(frozen=True)
class Place:
    """A module in whose output, or a projection in whose input, components can be read and replaced.

    Args:
        module: the module.
        count: the number of components, which share the last dimension equally.
        projection: the projection of the module that reads them; None where they are the module's output.
    """

    module: nn.Module
    count: int
    projection: Projection | None = None

    def hooked(self, change: Callable[[Tensor], Tensor], batch: int) -> Any:
        """Register a hook; `handle.remove()` takes it away.

        Args:
            change: takes the components `[batch, position, component, size]`, and returns what replaces them.
            batch: the number of rows; some models put all positions in one row.
        """

        def changed(states: Tensor) -> Tensor:
            components = states.view(batch, -1, self.count, states.shape[-1] // self.count)
            return change(components).reshape(states.shape)

        def before(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (changed(arguments[0]), *arguments[1:])

        def after(_module: nn.Module, _arguments: object, output: Any) -> Any:
            return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

        if self.projection is None:
            return self.module.register_forward_hook(after)
        return self.module.register_forward_pre_hook(before)


def place_of(decoder: Decoder, layer: int, kind: str) -> Place:
    """Return where one block's components are.

    Args:
        decoder: the model.
        layer: the block's index.
        kind: `head` or `neuron`, which an output (down) projection reads; `attention`, `mixer` or `mlp`, what
            a sublayer adds to the residual stream, after any norm that follows it but is not on the stream.

    Raises:
        DePassError: the neurons are those of a mixture of experts, which have no shared projection.
    """
    block = decoder.blocks[layer]
    if kind not in ("neuron", "mlp") and isinstance(block.attention.output, JoinedHeads):
        raise DePassError(
            f"block {layer} has attention and a state space side by side, with an output map each, so that "
            "no one place has their heads; take another source, or the method 'depass'"
        )
    if kind == "head":
        return Place(block.attention.output.module, block.attention.heads, block.attention.output)
    if kind == "mlp" and not separate_mlp(block):
        raise DePassError(
            f"block {layer} of {type(decoder.model).__name__} runs its experts itself, so that no one module "
            "gives its MLP's output; take another source, or the method 'depass'"
        )
    if kind != "neuron":
        return Place(_adding(block, kind), 1)
    if block.mlp.dense is None:
        raise DePassError(
            f"block {layer} is a mixture of experts, whose neurons cannot be read or masked by "
            "hooks; use heads, or the neurons of a dense block by layer"
        )
    return Place(block.mlp.dense.down.module, block.mlp.width, block.mlp.dense.down)


def separate_mlp(block: Block) -> bool:
    """Return whether one module, other than the block, gives what the MLP writes."""
    return block.mlp.dense is not None or block.mlp.module is not block.module


def places_in(decoder: Decoder, source: Source) -> list[Place]:
    """Return where a source's components are, one place for each of its layers.

    Args:
        decoder: the model.
        source: `Heads`, `Neurons` or `Module`.

    Raises:
        DePassError: as for `place_of`, or a block lacks what is asked for.
    """
    kind = "head" if isinstance(source, Heads) else "neuron"
    if isinstance(source, Module):
        kind = source.module
    layers = source.layers(len(decoder.blocks))
    for layer in layers:
        block = decoder.blocks[layer]
        mixer, of_mlp = block.attention.mixer, kind in ("neuron", "mlp")
        if block.mlp.absent if of_mlp else mixer is not None and not mixer.mixes:
            missing = "MLP" if of_mlp else "attention"
            raise DePassError(
                f"block {layer} of {type(decoder.model).__name__} has no {missing} that could be read; give "
                f"the layer of a block that has one, or take the method 'depass'"
            )
    return [place_of(decoder, layer, kind) for layer in layers]


def _adding(block: Block, kind: str) -> nn.Module:
    """Return the module whose output a sublayer adds to the residual stream."""
    parts = block.mlp if kind == "mlp" else block.attention
    if parts.post_norm is not None and parts.residual != "post_norm":
        return parts.post_norm
    if kind != "mlp":
        return block.attention.output.module
    return block.mlp.module if block.mlp.dense is None else block.mlp.dense.down.module


@contextmanager
def reading(places: Mapping[Key, Place], rows: int) -> Iterator[dict[Key, Tensor]]:
    """Record the components in the passes inside: by place `[row, position, component, size]` of the last.

    A pass goes on from what is recorded, so that it has a gradient.
    """
    seen: dict[Key, Tensor] = {}

    def keeper(key: Key) -> Callable[[Tensor], Tensor]:
        def keep(components: Tensor) -> Tensor:
            seen[key] = components
            return components

        return keep

    with ExitStack() as stack:
        for key, place in places.items():
            stack.callback(place.hooked(keeper(key), rows).remove)
        yield seen


@contextmanager
def replaced(
    places: Mapping[Key, Place],
    masks: Mapping[Key, Bool[Tensor, "row position component"]],
    values: Mapping[Key, Tensor],
) -> Iterator[None]:
    """Replace components in the passes inside.

    Args:
        places: where they are.
        masks: by place, true where a component is replaced; broadcast over rows and positions.
        values: by place what it is replaced with, broadcast to `[row, position, component, size]`; zero where
            a place has none.
    """

    def changer(key: Key) -> Callable[[Tensor], Tensor]:
        def change(components: Tensor) -> Tensor:
            value = values.get(key, components.new_zeros(())).to(components)
            return torch.where(masks[key].to(components.device)[..., None], value, components)

        return change

    with ExitStack() as stack:
        for key, place in places.items():
            stack.callback(place.hooked(changer(key), len(masks[key])).remove)
        yield
