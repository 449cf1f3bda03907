"""What a block's attention and MLP add to the residual stream: heads, modules, neurons."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.adjoint import BlockGradients
from depass_lightning.engine.component_groups import DenseGroup, NeuronGroup
from depass_lightning.engine.frozen import FrozenBlock
from depass_lightning.engine.norms import past
from depass_lightning.engine.propagate import Place
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.component import Component, block_components
from depass_lightning.sources.base import (
    Begun,
    GroupSource,
    SplitContext,
    is_whole,
    resolve_layer,
    with_constants,
)


@dataclass(frozen=True)
class _Blockwise(GroupSource):
    """A source with one group of components in one block, or in every block."""

    layer: int | None = None

    @override
    def layers(self, count: int) -> list[int]:
        if self.layer is None:
            return list(range(count))
        return [resolve_layer(self.layer, count, type(self).__name__)]


@dataclass(frozen=True)
class Heads(_Blockwise):
    """The state before a block's attention, and what each of its heads adds.

    Args:
        layer: the block; None takes every block in one pass, each with a group whose components compete only
            among themselves, as in a pass of that block alone.
    """

    kind: ClassVar[str] = "heads"

    @override
    def inside(self, block: FrozenBlock, place: Place, settings: SplitContext) -> Begun | None:
        if place != "resid_mid":
            return None
        attention = block.attention
        values, constants = attention.head_values(block.resid_pre)
        heads = attention.head_outputs(values)
        total = attention.bias_terms
        if constants is not None:
            mixed = constants.flatten(2) @ attention.output.weight.T
            total = mixed if total is None else mixed + total
        state = past(attention.skip, block.resid_pre)
        return DenseGroup(torch.cat([state[:, None], heads], 1)), total

    @override
    def inside_scores(self, derivatives: BlockGradients, settings: SplitContext) -> Tensor:
        # A head's score is its values times the gradient with respect to them: no head's state is built.
        block, middle = derivatives.block, derivatives.resid_mid
        values, constants = block.attention.head_values(block.resid_pre)
        scores = (values * derivatives.heads).sum((1, 3))
        state = (past(block.attention.skip, block.resid_pre) * middle.states).sum((1, 2))
        if derivatives.mlp_input is not None:
            state = state + (block.resid_pre * derivatives.mlp_input).sum((1, 2))
        total = middle.constants
        if constants is not None:
            total = total + (constants * derivatives.heads).sum((1, 2, 3))
        if block.attention.bias_terms is not None:
            total = total + (block.attention.bias_terms * middle.states).sum((1, 2))
        return with_constants(torch.cat([state[:, None], scores], 1), total, settings)

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        layers = self.layers(len(decoder.blocks))
        counts = {decoder.blocks[layer].attention.heads for layer in layers}
        if len(counts) > 1:
            raise DePassError(
                f"Heads: the blocks have {', '.join(map(str, sorted(counts)))} heads, as linear mixers and "
                "attention differ; take one block at a time by layer"
            )
        return block_components(tuple(layers), "head", range(counts.pop()))


@dataclass(frozen=True)
class Module(_Blockwise):
    """What a block's attention, linear mixer or MLP adds, with its biases, and the rest of the state there.

    Args:
        module: `attention`; `mixer`, what mixes positions in a block, attention or a linear mixer; or `mlp`.
        layer: the block; None takes every block in one pass.
    """

    layer: int | None = None
    module: Literal["attention", "mixer", "mlp"] = "attention"
    kind: ClassVar[str] = "modules"

    def __init__(self, module: Literal["attention", "mixer", "mlp"], layer: int | None = None) -> None:
        if module not in ("attention", "mixer", "mlp"):
            raise DePassError(f"Module({module!r}): choose 'attention', 'mixer' or 'mlp'")
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "layer", layer)

    @property
    @override
    def after_mlp(self) -> bool:
        return self.module == "mlp"

    @override
    def inside(self, block: FrozenBlock, place: Place, settings: SplitContext) -> Begun | None:
        if place != ("resid_post" if self.after_mlp else "resid_mid"):
            return None
        if self.module != "mlp":
            rest = block.resid_mid - block.attention_output
            return DenseGroup(torch.stack([rest, block.attention_output], 1)), None
        return DenseGroup(torch.stack([block.resid_post - block.mlp_output, block.mlp_output], 1)), None

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        layers = self.layers(len(decoder.blocks))
        mixers = [
            layer for layer in layers if (mixer := decoder.blocks[layer].attention.mixer) and mixer.mixes
        ]
        if self.module == "attention" and mixers:
            raise DePassError(
                f"Module('attention'): block {mixers[0]} has a linear mixer in attention's place; take "
                "Module('mixer')"
            )
        return block_components(tuple(layers), self.module, None)


@dataclass(frozen=True)
class Neurons(_Blockwise):
    """What each neuron of a block's MLP adds, and the rest of the state after the MLP.

    Because the components are many, a competing rule propagates the groups of several blocks one after
    another. Memory is then neurons x tokens x hidden x 4 bytes in float32 (for 11008 neurons, 100
    tokens and 4096 hidden 18 GB); on a CPU it is a temporary file where that is more than half of the free
    memory, see `engine/memory.py`, and on a GPU it must fit. Neurons of the last block before the target,
    and of the one before it, need nothing of that size.

    Args:
        layer: the block; None takes every block, each with a separate group.
        indices: the neurons that are components; by default all.
        top: under the softmax rule, an approximation that is many times faster: this number of each
            block's largest neurons is propagated exactly, the others to first order
            (`engine/variants/top_neurons.py`). It is made with `top` and with twice `top`; the scores are the
            latter's, and `metadata["approximation"]` is the difference between the two (over several blocks
            the largest). The last two blocks before the target are exact. Scores always sum to the target's
            value, so completeness does not measure the error.

    Raises:
        DePassError: `top` is not a positive number.
    """

    indices: Sequence[int] | None = None
    top: int | None = None
    kind: ClassVar[str] = "neurons"

    def __post_init__(self) -> None:
        if self.top is not None and not (is_whole(self.top) and self.top >= 1):
            raise DePassError(
                f"Neurons: top is {self.top!r}; give the number of neurons to propagate exactly, at "
                "least 1, or leave it out for all"
            )

    @property
    @override
    def after_mlp(self) -> bool:
        return True

    @override
    def read_directly(self, distance: int) -> bool:
        return distance <= 1

    @override
    def chosen(self, scores: Tensor) -> Tensor:
        return scores if self.indices is None else scores[..., list(self.indices)]

    @override
    def per_layer(self, count: int) -> "Sequence[Neurons]":
        return [replace(self, layer=layer) for layer in self.layers(count)]

    @override
    def inside(self, block: FrozenBlock, place: Place, settings: SplitContext) -> Begun | None:
        if place != "resid_post":
            return None
        chosen = slice(None) if self.indices is None else list(self.indices)
        values = block.mlp.activations[:, :, chosen]
        weights = block.mlp.down.weight[:, chosen]
        rest = block.resid_post - values @ weights.T
        if settings.release:  # the published code's base has lost the MLP's output
            rest = rest - block.mlp_output
        return NeuronGroup(rest[:, None], values, weights.T[None]), None

    @override
    def inside_scores(self, derivatives: BlockGradients, settings: SplitContext) -> Tensor:
        # A neuron's score is its value times the gradient with respect to it: no neuron's state is built.
        mlp, after = derivatives.block.mlp, derivatives.resid_post
        scores = self.chosen((mlp.activations * derivatives.activations).sum(1))
        total = (derivatives.block.resid_post * after.states).sum((1, 2))
        rest = total - scores.sum(1)
        return with_constants(torch.cat([rest[:, None], scores], 1), after.constants, settings)

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        widths = {decoder.blocks[layer].mlp.width for layer in self.layers(len(decoder.blocks))}
        width = min(widths)
        if self.indices is None and len(widths) > 1:
            raise DePassError(
                f"Neurons: the blocks' MLPs have {', '.join(map(str, sorted(widths)))} neurons; take one "
                "block at a time by layer, or some neurons by indices"
            )
        indices = range(width) if self.indices is None else tuple(self.indices)
        outside = [index for index in indices if not 0 <= index < width]
        if outside:
            raise DePassError(
                f"Neurons: there is no neuron {outside[0]}; the MLP has {width}, 0 to {width - 1}"
            )
        return block_components(tuple(self.layers(len(decoder.blocks))), "neuron", indices)
