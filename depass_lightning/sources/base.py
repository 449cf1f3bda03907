"""What every source shares: the layers of its components, their description, and how they begin."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.adjoint import BlockGradients, TargetGradient
from depass_lightning.engine.component_groups import ComponentGroup, DenseGroup
from depass_lightning.engine.frozen import FrozenBlock
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.parallel import ComponentParallel
from depass_lightning.engine.propagate import Injection, Place
from depass_lightning.engine.record import Recording
from depass_lightning.engine.state import DecomposedState
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.component import Component


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, of Python or of another library.

    Args:
        value: anything; True and False are no whole numbers.
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def resolve_layer(layer: int, layers: int, what: str) -> int:
    """Turn a layer that may count from the end into a block index.

    Args:
        layer: a block's index; negative counts from the end.
        layers: the model's number of blocks.
        what: the name of the argument or class, for the error.

    Raises:
        DePassError: the layer is no whole number, or the model has no such layer.
    """
    if not is_whole(layer):
        raise DePassError(f"{what}: layer is {layer!r}, a {type(layer).__name__}; it must be a whole number")
    if not -layers <= layer < layers:
        raise DePassError(
            f"{what}: layer {layer} is out of range; the model has {layers} blocks, 0 to {layers - 1} "
            f"(or -{layers} to -1 from the end)"
        )
    return layer % layers


@dataclass(frozen=True)
class SplitContext:
    """The pass that a source begins.

    Args:
        prompts: the batch.
        bias: whether a component of constants is propagated too, as the first of each group.
        competing: whether components compete for neurons under the rule.
        release: whether components begin as in the published code, faults included.
        budget: working memory.
        spread: the processes that share the components; None for one process.
    """

    prompts: Sequence[Prompt]
    bias: bool
    competing: bool
    release: bool
    budget: Budget
    spread: ComponentParallel | None = None


class Source(ABC):
    """Splits a recorded state into components that sum to it.

    Attributes:
        kind: the source's name: `tokens`, `heads`.
        positional: whether the components are positions of the prompt, each of them zero before it begins.
        top: the number of components of each group that are propagated exactly, where the others are
            approximated, so that there are no states of all; None for exact scores.
    """

    kind: ClassVar[str]
    positional: ClassVar[bool] = False
    top: int | None = None

    @property
    def after_mlp(self) -> bool:
        """Whether the components begin after a block's MLP."""
        return False

    def read_directly(self, distance: int) -> bool:  # noqa: ARG002
        """Return whether scores are read where the components begin, without propagating them.

        Args:
            distance: the number of blocks from the one in which they begin to the layer where the target is
                read.
        """
        return False

    def chosen(self, scores: Tensor) -> Tensor:
        """Return the scores of the components that were asked for.

        Args:
            scores: of all components that the block has, last axis.
        """
        return scores

    @abstractmethod
    def layers(self, count: int) -> list[int]:
        """Return the blocks at or in which groups of components begin, in order.

        Args:
            count: the model's number of blocks.

        Raises:
            DePassError: the model has no such layer.
        """

    def per_layer(self, count: int) -> "Sequence[Source]":  # noqa: ARG002
        """Return sources that are propagated one after another; together they are this one.

        Args:
            count: the model's number of blocks.
        """
        return [self]

    @abstractmethod
    def split(self, recording: Recording, settings: SplitContext) -> Injection:
        """Split a recorded batch's state into components.

        Args:
            recording: the recorded pass.
            settings: what else the source needs of the pass.

        Returns:
            The components, which the engine takes where they begin.
        """

    @abstractmethod
    def entry_scores(
        self, recording: Recording, settings: SplitContext, layer: int, derivative: TargetGradient
    ) -> Float[Tensor, "batch component"] | None:
        """Score the components that begin at a block's input, the bias component first.

        Args:
            recording: the recorded pass.
            settings: what else the source needs of the pass.
            layer: the block.
            derivative: the target's gradient at the block's input.

        Returns:
            None where no components begin there.
        """

    @abstractmethod
    def inside_scores(
        self, derivatives: BlockGradients, settings: SplitContext
    ) -> Float[Tensor, "batch component"] | None:
        """Score the group that begins inside a block, the bias component first.

        Args:
            derivatives: the target's gradients inside the block.
            settings: what the source needs of the pass.

        Returns:
            None where no group begins there.
        """

    @abstractmethod
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        """Describe one prompt's components.

        Args:
            prompt: the prompt.
            decoder: the model.

        Returns:
            `[group][component]` what each is, without the components of constants.

        Raises:
            DePassError: the prompt cannot be split like this.
        """


@dataclass
class GroupInjection:
    """Groups of components at every position that begin inside blocks, or at the first one's input."""

    source: "GroupSource"
    recording: Recording
    settings: SplitContext

    @property
    def first(self) -> int:
        """The first block at or in which a group begins."""
        return self.source.layers(self.recording.layers)[0]

    def at_entry(self, recording: Recording) -> DecomposedState | None:
        """Return the components that begin at the first block's input, if any do."""
        components = self.source.entering(recording, self.first, self.settings)
        if components is None:
            return None
        device = components.device
        positions = torch.arange(components.shape[2], device=device).expand(len(components), -1)
        group = self._with_bias(DenseGroup(components), torch.zeros_like(components[:, 0]))
        return self.begin(recording, group, positions)

    def inside(self, block: FrozenBlock, place: Place) -> ComponentGroup | None:
        """Return the group that begins inside a block, if one does."""
        if block.index not in self.source.layers(self.recording.layers):
            return None
        begun = self.source.inside(block, place, self.settings)
        if begun is None:
            return None
        group, constants = begun
        return self._with_bias(group, torch.zeros_like(block.resid_pre) if constants is None else constants)

    def begin(
        self, recording: Recording, group: ComponentGroup, positions: Int[Tensor, "batch position"]
    ) -> DecomposedState:
        """Return the state of a group alone."""
        real = positions < recording.lengths[:, None]
        bias = 0 if self.settings.bias else None
        return DecomposedState.begin(group, real, positions, bias=bias, budget=self.settings.budget)

    def _with_bias(self, group: ComponentGroup, constants: Tensor) -> ComponentGroup:
        """Put the bias component first, with the constants that belong to no component from the start."""
        return group.prepend(constants) if self.settings.bias else group


Begun = tuple[ComponentGroup, Float[Tensor, "batch position hidden"] | None]


class GroupSource(Source):
    """A source whose components are present at every position."""

    @override
    def split(self, recording: Recording, settings: SplitContext) -> Injection:
        return GroupInjection(self, recording, settings)

    @override
    def entry_scores(
        self, recording: Recording, settings: SplitContext, layer: int, derivative: TargetGradient
    ) -> Tensor | None:
        components = self.entering(recording, layer, settings)
        if components is None:
            return None
        return with_constants(derivative.of(components), derivative.constants, settings)

    @override
    def inside_scores(self, derivatives: BlockGradients, settings: SplitContext) -> Tensor | None:
        places: tuple[tuple[Place, TargetGradient], ...] = (
            ("resid_mid", derivatives.resid_mid),
            ("resid_post", derivatives.resid_post),
        )
        for place, derivative in places:
            begun = self.inside(derivatives.block, place, settings)
            if begun is not None:
                group, constants = begun
                everywhere = torch.arange(derivative.states.shape[1], device=derivative.states.device)
                components = group.states(slice(None), everywhere.expand(len(derivative.states), -1))
                total = derivative.constants
                if constants is not None:
                    total = total + derivative.of(constants[:, None])[:, 0]
                scores = derivative.of(components)
                if place == "resid_mid" and derivatives.mlp_input is not None:
                    # Only the base was there already when the MLP read the block's input.
                    scores[:, 0] += (components[:, 0] * derivatives.mlp_input).sum((1, 2))
                return with_constants(scores, total, settings)
        return None

    def entering(self, recording: Recording, layer: int, settings: SplitContext) -> Tensor | None:
        """Return the components at the input of the first block.

        Returns:
            `[batch, component, position, hidden]`, or None where none begin there.
        """

    def inside(self, block: FrozenBlock, place: Place, settings: SplitContext) -> Begun | None:
        """Return the components that begin inside a block, and constants that belong to none of them."""


def with_constants(
    scores: Float[Tensor, "batch component"], constants: Float[Tensor, "batch"], settings: SplitContext
) -> Float[Tensor, "batch component"]:
    """Put the bias component's score first, where there is one."""
    return torch.cat([constants[:, None], scores], 1) if settings.bias else scores
