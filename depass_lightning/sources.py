"""What a state is split into before it is carried through the rest of the model."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from depass_lightning.engine.layout import token_layout
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.propagate import Carry
from depass_lightning.engine.record import Recording
from depass_lightning.errors import DePassError


def resolve_layer(layer: int, layers: int, what: str) -> int:
    """Turn a layer that may count from the end into a block index.

    Args:
        layer: a block's index; negative counts from the end.
        layers: the model's number of blocks.
        what: what asks for it, for the error.

    Raises:
        DePassError: the model has no such layer.
    """
    if not -layers <= layer < layers:
        raise DePassError(
            f"{what}: layer {layer} is out of range; the model has {layers} blocks, 0 to {layers - 1} "
            f"(or -{layers} to -1 from the end)"
        )
    return layer % layers


class Source(Protocol):
    """Splits a recorded state into components, and says what they are called."""

    kind: ClassVar[str]

    @property
    def layer(self) -> int: ...

    def split(self, recording: Recording, *, bias: bool, competing: bool, budget: Budget) -> Carry: ...

    def names(self, tokens: list[str]) -> list[str]: ...

    def positions(self, tokens: int) -> list[tuple[int, int] | None]: ...


@dataclass(frozen=True)
class Tokens:
    """Each token's state at a layer is a component; at layer 0 that is input attribution.

    Args:
        layer: the block whose input is split; negative counts from the end.
        exclude_first: under the competing rules the first token, on which attention rests by default,
            takes no share of any MLP behind its own position.
    """

    layer: int = 0
    exclude_first: bool = True
    kind: ClassVar[str] = "tokens"

    def split(self, recording: Recording, *, bias: bool, competing: bool, budget: Budget) -> Carry:
        """Split the recorded state at this layer.

        Args:
            recording: the recorded pass.
            bias: begin a component of constants, at zero; it comes first.
            competing: the rule makes components compete.
            budget: working memory for what follows.
        """
        layer = resolve_layer(self.layer, recording.layers, "Tokens")
        state = recording.state(layer)
        batch, positions, hidden = state.shape
        births = torch.arange(positions).expand(batch, -1)
        births = torch.where(births < recording.lengths.cpu()[:, None], births, positions)
        if bias:
            births = torch.cat([torch.zeros(batch, 1, dtype=births.dtype), births], 1)
        layout = token_layout(
            births,
            recording.lengths,
            positions,
            bias=0 if bias else None,
            first=int(bias),
            exclude_first=self.exclude_first and competing,
            device=state.device,
        )
        rows = state.new_zeros(layout.rows + 1, hidden)
        position = torch.arange(positions)
        rows[layout.index[:, position, position + int(bias)].to(state.device)] = state
        rows[-1] = 0  # padding wrote here
        at = position.expand(batch, -1).to(state.device)
        return Carry(layout, rows, at, budget)

    def names(self, tokens: list[str]) -> list[str]:
        """The components' names: the tokens themselves."""
        return list(tokens)

    def positions(self, tokens: int) -> list[tuple[int, int] | None]:
        """The token range that each component stands for."""
        return [(index, index + 1) for index in range(tokens)]


def dense_components(carry: Carry, bias: bool) -> Tensor:
    """All components `[batch, component, position, hidden]`, the bias component moved last."""
    states = carry.dense()
    return torch.cat([states[:, 1:], states[:, :1]], 1) if bias else states
