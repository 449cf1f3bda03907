"""Positions of the prompt as components: single tokens, or spans of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.adjoint import BlockGradients, TargetGradient
from depass_lightning.engine.component_groups import ComponentGroup
from depass_lightning.engine.frozen import FrozenBlock
from depass_lightning.engine.packing import token_layout
from depass_lightning.engine.propagate import Injection, Place
from depass_lightning.engine.record import Recording
from depass_lightning.engine.state import DecomposedState
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.component import Component
from depass_lightning.sources.base import Source, SplitContext, is_whole, resolve_layer
from depass_lightning.sources.segments import Unit, segment
from depass_lightning.utils.sections import parts, tokens_of

LEAST = 8  # components of `Tokens(refine=)`


def summed(
    scores: Float[Tensor, "batch position"], owners: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch component"]:
    """Return the sum over each component's positions."""
    sums = scores.new_zeros(len(scores), int(owners.max()) + 1)
    return sums.scatter_add_(1, owners.to(scores.device), scores)


@dataclass(frozen=True)
class Positional(Source):
    """A source that gives each position of the prompt to one component."""

    layer: int = 0
    exclude_first: bool = True
    positional: ClassVar[bool] = True

    @override
    def layers(self, count: int) -> list[int]:
        return [resolve_layer(self.layer, count, type(self).__name__)]

    def owners(self, prompt: Prompt) -> list[int]:
        """Return the component of each position; the first position alone is component 0.

        Args:
            prompt: the prompt.
        """
        raise NotImplementedError

    def owner_table(
        self, prompts: Sequence[Prompt], lengths: Sequence[int], positions: int, *, first: int
    ) -> Int[Tensor, "batch position"]:
        """Return every position's component; padding, which is on the right, belongs to component 0.

        Args:
            prompts: the batch.
            lengths: the number of positions of each prompt that take part.
            positions: the number of positions with padding.
            first: the index of the first position's component: 1 where the bias is component 0.
        """
        table = torch.zeros(len(prompts), positions, dtype=torch.long)
        for row, prompt, length in zip(table, prompts, lengths, strict=True):
            row[:length] = torch.tensor(self.owners(prompt)[:length]) + first
        return table

    @override
    def entry_scores(
        self, recording: Recording, settings: SplitContext, layer: int, derivative: TargetGradient
    ) -> Tensor:
        products = (recording.state(layer) * derivative.states).sum(-1)  # batch, position
        lengths, offset = recording.lengths.tolist(), int(settings.bias)
        owners = self.owner_table(settings.prompts, lengths, products.shape[1], first=offset)
        scores = summed(products, owners)  # batch, component
        if settings.bias:
            scores[:, 0] += derivative.constants
        return scores

    @override
    def inside_scores(self, derivatives: BlockGradients, settings: SplitContext) -> None:
        return None

    @override
    def split(self, recording: Recording, settings: SplitContext) -> Injection:
        return _PositionInjection(self, self.layers(recording.layers)[0], settings)


@dataclass(frozen=True)
class Tokens(Positional):
    """Each token's state at a layer is a component; at layer 0 that is input attribution.

    Args:
        layer: the block whose input is split; negative counts from the end.
        exclude_first: whether, under the competing rules, the first token (an attention sink) gets no
            share of any MLP at later positions.
        refine: the maximum number of components besides the bias that are propagated under a competing rule:
            the tokens with the largest scores under `half`, and the others between them in spans, which
            may cross sentences and turns. None for every token. Without effect where one backward pass
            scores every token.

    Raises:
        DePassError: `refine` is too small.
    """

    refine: int | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        if self.refine is not None and not (is_whole(self.refine) and self.refine >= LEAST):
            raise DePassError(
                f"Tokens: refine is {self.refine!r}; give the number of components to propagate, "
                f"at least {LEAST}"
            )

    @override
    def owners(self, prompt: Prompt) -> list[int]:
        return list(range(len(prompt.ids)))

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        tokens = enumerate(prompt.tokens)
        return [[Component("token", text, index=i, span=(i, i + 1)) for i, text in tokens]]


@dataclass(frozen=True)
class Partition(Positional):
    """Each prompt's tokens in consecutive ranges, as `Tokens(refine=)` chooses them.

    Args:
        ranges: each prompt's ranges `[start, end)` by the identity of its object; the first is one token.
        refine: that of the `Tokens`.
    """

    ranges: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict, kw_only=True)
    refine: int = field(default=LEAST, kw_only=True)
    kind: ClassVar[str] = "tokens"

    @override
    def owners(self, prompt: Prompt) -> list[int]:
        ranges = self.ranges[id(prompt)]
        return [index for index, (start, end) in enumerate(ranges) for _ in range(start, end)]

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        return [
            [
                Component(
                    "token" if end - start == 1 else "span",
                    "".join(prompt.tokens[start:end]),
                    index=start,
                    span=(start, end),
                )
                for start, end in self.ranges[id(prompt)]
            ]
        ]


@dataclass(frozen=True)
class Spans(Positional):
    """The tokens of a word, a sentence or a range together are one component.

    Few components are propagated, whatever the prompt's length. The first position is a separate
    component, and tokens that no range covers form one more, "rest". In a conversation and in documents these
    are the tokens of the template, and the component is called "template". A span's score is not the sum of
    its tokens' scores: neurons are shared by what the components sum to.

    Args:
        by: `word`, `sentence`, `paragraph`, `turn` (of a conversation, named by its role), `document` (by its
            name), or ranges `[(start, end), ...]`.
        unit: what the ranges count: `character` of the prompt's text, or `token`.
        layer: the block whose input is split; negative counts from the end.
        exclude_first: whether, under the competing rules, the first token gets no share of any MLP at later
            positions.
    """

    by: Unit | Sequence[tuple[int, int]] = "word"
    unit: Literal["character", "token"] = "character"
    layer: int = field(default=0, kw_only=True)
    exclude_first: bool = field(default=True, kw_only=True)
    kind: ClassVar[str] = "spans"

    @override
    def owners(self, prompt: Prompt) -> list[int]:
        owners = [0] * len(prompt.ids)
        for component, tokens in enumerate(segment(prompt, self.by, self.unit)):
            for position in tokens:
                owners[position] = component
        return owners

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        components = []
        groups = segment(prompt, self.by, self.unit)
        names = self._names(prompt)
        for index, tokens in enumerate(groups):
            span = (tokens[0], tokens[-1] + 1)
            template = bool(names) and index > 0 and tokens[0] not in names
            if span[1] - span[0] == len(tokens) and not template:
                text = "".join(prompt.tokens[slice(*span)])
                label = (names.get(tokens[0]) if index else "") or text
                components.append(Component("span", label, index=index, span=span))
            else:
                components.append(Component("rest", "template" if template else "rest"))
        return [components]

    def _names(self, prompt: Prompt) -> dict[int, str]:
        """Return the name of each token's turn or document, "" for other units; none without sections."""
        if not prompt.sections or prompt.offsets is None or self.by == "word" or not isinstance(self.by, str):
            return {}
        inside = parts(prompt.text, prompt.sections, self.by)
        named = zip(inside, tokens_of(inside, prompt.text, prompt.offsets), strict=True)
        known = self.by in ("turn", "document")
        return {position: part.name if known else "" for part, tokens in named for position in tokens}


@dataclass(frozen=True)
class _PositionInjection:
    """Begins the components of positions at the input of one block."""

    source: Positional
    first: int
    settings: SplitContext

    def at_entry(self, recording: Recording) -> DecomposedState:
        state = recording.state(self.first)
        batch, positions, hidden = state.shape
        lengths, offset = recording.lengths.tolist(), int(self.settings.bias)
        owners = self.source.owner_table(self.settings.prompts, lengths, positions, first=offset)
        start_positions = self._start_positions(owners, recording.lengths.cpu())
        if not recording.decoder.causal:  # tokens also reach those before them
            start_positions[start_positions < positions] = 0
        if self.settings.spread is not None:
            start_positions = self.settings.spread.keep_own(
                start_positions, recording.lengths.cpu(), positions
            )
        layout = token_layout(
            start_positions,
            recording.lengths,
            positions,
            bias=0 if self.settings.bias else None,
            first=offset,
            exclude_first=self.source.exclude_first and self.settings.competing,
            device=state.device,
        )
        rows = state.new_zeros(layout.rows + 1, hidden)
        index = layout.index.gather(2, owners[:, :, None])[:, :, 0]
        real = torch.arange(positions) < recording.lengths.cpu()[:, None]
        index = torch.where(real, index, layout.rows)
        rows[index.to(state.device)] = state
        rows[-1] = 0  # padding wrote here
        everywhere = torch.arange(positions, device=state.device).expand(batch, -1)
        return DecomposedState(layout, rows, everywhere, self.settings.budget)

    def _start_positions(self, owners: Tensor, lengths: Tensor) -> Tensor:
        """Return the first position of each component; the bias component begins with the prompt."""
        batch, positions = owners.shape
        start_positions = torch.full((batch, int(owners.max()) + 1), positions)
        position = torch.arange(positions).expand(batch, -1)
        position = torch.where(position < lengths[:, None], position, positions)
        start_positions.scatter_reduce_(1, owners, position, "amin")
        if self.settings.bias:
            start_positions[:, 0] = 0
        return start_positions

    def inside(self, block: FrozenBlock, place: Place) -> None:
        """No component of a position begins inside a block."""

    def begin(self, recording: Recording, group: ComponentGroup, positions: Tensor) -> DecomposedState:
        raise NotImplementedError("positions begin at a block's input only")
