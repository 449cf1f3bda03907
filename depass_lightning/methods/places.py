"""Modules in whose input or output heads, neurons, attentions and MLPs can be read and replaced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from depass_lightning.methods.hook_points import sites_of
from depass_lightning.models.block import Block
from depass_lightning.models.decoder import Decoder
from depass_lightning.sources import Heads, Neurons


@dataclass(frozen=True)
class Place:
    """A module in whose input or output components can be read and replaced.

    Args:
        module: the module.
        count: the number of components, which share the last dimension equally.
        output: whether they are in its output; else in its input.
    """

    module: nn.Module
    count: int
    output: bool

    def hooked(self, change: Callable[[Tensor], Tensor | None], batch: int) -> Any:
        """Register a hook; `handle.remove()` takes it away.

        Args:
            change: takes the components `[batch, position, component, size]`, and returns others, or None to
                leave them as they are.
            batch: the number of rows; some models put all positions in one row.
        """

        def changed(states: Tensor) -> Tensor:
            components = states.view(batch, -1, self.count, states.shape[-1] // self.count)
            replaced = change(components)
            return states if replaced is None else replaced.reshape(states.shape)

        def before(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (changed(arguments[0]), *arguments[1:])

        def after(_module: nn.Module, _arguments: object, output: Any) -> Any:
            return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

        if self.output:
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
        DePassError: the neurons are those of a mixture of experts.
    """
    if kind in ("head", "neuron"):
        (site,) = sites_of(decoder, Heads(layer) if kind == "head" else Neurons(layer))
        return Place(site.projection.module, site.count, output=False)
    return Place(_adding(decoder.blocks[layer], kind), 1, output=True)


def _adding(block: Block, kind: str) -> nn.Module:
    """Return the module whose output a sublayer adds to the residual stream."""
    parts = block.mlp if kind == "mlp" else block.attention
    if parts.post_norm is not None and parts.residual != "post_norm":
        return parts.post_norm
    if kind != "mlp":
        return block.attention.output.module
    return block.mlp.module if block.mlp.dense is None else block.mlp.dense.down.module
