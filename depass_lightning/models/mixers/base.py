"""What a linear mixer, in attention's place, leaves of one pass: a frozen linear map over positions.

Gated delta rules, state spaces and short convolutions are linear in their values once their gates, keys,
decays and steps are held fixed. A mixer's file reads these from what its modules computed, and returns the
matrix that mixes positions, and the factors before and after it, channel by channel.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.models.affine import Projection, has_bias, parameter_of

Seen = Mapping[str, tuple[tuple[Any, ...], Tensor]]


@dataclass(frozen=True)
class Mixing:
    """A mixer's frozen way from values to what its output map reads.

    Values times `before`, convolved, plus `constants`, times `slopes`, mixed over positions by each head's
    matrix, times `gates`.

    Args:
        matrix: of each query for each key.
        before: factors of the values, if any.
        taps: the causal convolution of each channel, the position itself last.
        constants: what the convolution adds to each channel, if anything.
        slopes: the activation after the convolution over its input, if there is one.
        gates: factors after mixing: a frozen norm's, and a gate's.
    """

    matrix: Float[Tensor, "batch head query key"]
    before: Float[Tensor, "batch position channel"] | None
    taps: Float[Tensor, "channel tap"]
    constants: Float[Tensor, "channel"] | None
    slopes: Float[Tensor, "batch position channel"] | None
    gates: Float[Tensor, "batch position channel"]


class Mixer(ABC):
    """The modules of a linear mixer.

    Args:
        module: the mixer.

    Attributes:
        value: the value map.
        output: the output map.
        heads: the number of heads.
        recorded: the modules whose inputs and outputs `mixing` reads.
        convolution: the module that has the convolution's weights.
        mixes: whether there is anything to mix.
        softmax: the attention module whose probabilities `mixing` reads, if any.
    """

    kind: ClassVar[str]
    mixes: ClassVar[bool] = True
    softmax: nn.Module | None = None
    value: Projection
    output: Projection
    heads: int
    recorded: dict[str, nn.Module]
    convolution: nn.Module

    @abstractmethod
    def __init__(self, module: Any) -> None: ...

    @classmethod
    def fits(cls, module: nn.Module | None) -> bool:
        """Return whether a block's module of the declared name is this mixer."""
        return module is not None

    @abstractmethod
    def mixing(self, seen: Seen, dtype: torch.dtype) -> Mixing:
        """Freeze the mixer.

        Args:
            seen: the arguments and the output of each recorded module.
            dtype: the precision of the result.
        """

    @property
    def has_biases(self) -> bool:
        """Whether it adds constants to its values."""
        return has_bias(self.convolution)

    def _taps(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "channel tap"], Float[Tensor, "channel"] | None]:
        (weight,) = parameters_of(self.convolution, dtype, "weight")
        return weight[:, 0], parameter_of(self.convolution, "bias", dtype)

    def _convolved(
        self, values: Float[Tensor, "batch position channel"]
    ) -> tuple[Float[Tensor, "channel tap"], Float[Tensor, "channel"] | None, Tensor]:
        """The convolution's taps and bias, and the values after it."""
        taps, bias = self._taps(values.dtype)
        after = convolved(values, taps)
        return taps, bias, after if bias is None else after + bias


def parameters_of(module: nn.Module, dtype: torch.dtype, *names: str) -> list[Tensor]:
    """Read the parameters of a module that a mixer always has."""
    tensors = []
    for name in names:
        tensor = parameter_of(module, name, dtype)
        assert tensor is not None
        tensors.append(tensor)
    return tensors


def convolved(
    values: Float[Tensor, "batch position *rest channel"], taps: Float[Tensor, "channel tap"]
) -> Float[Tensor, "batch position *rest channel"]:
    """Convolve each channel over positions, by taps of which the position itself has the last."""
    count, total = values.shape[1], torch.zeros_like(values)
    for tap in range(taps.shape[1]):
        back = taps.shape[1] - 1 - tap
        if back < count:
            total[:, back:] += values[:, : count - back] * taps[:, tap]
    return total


def decays(logs: Float[Tensor, "batch position head"]) -> Float[Tensor, "batch head query key"]:
    """How much of each earlier position's input is left at each position, from decays' logarithms."""
    sums = logs.transpose(1, 2).cumsum(2)  # [batch, head, position]
    between = sums[..., :, None] - sums[..., None, :]
    later = torch.ones_like(between[0, 0], dtype=torch.bool).triu(1)
    return between.masked_fill(later, -torch.inf).exp()


def gates_of_norm(
    call: tuple[tuple[Any, ...], Tensor],
    weight: Tensor,
    group: int,
    shape: torch.Size,
    activation: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
) -> Float[Tensor, "batch position channel"]:
    """What a norm multiplies each of its inputs with: its weight, its activated gate and its scale.

    Args:
        call: the norm's arguments (states, and a gate if it has one) and its output.
        weight: its weight.
        group: the number of channels that share a scale.
        shape: of the result.
        activation: the gate's.
    """
    (states, *gate), output = call
    states, output = states.to(weight), output.to(weight)
    factor = activation(gate[0].to(weight)) * weight if gate else weight
    direction = (states * factor).unflatten(-1, (-1, group))
    tiny = torch.finfo(weight.dtype).tiny
    fitted = (direction * output.unflatten(-1, (-1, group))).sum(-1) / direction.square().sum(-1).clamp_min(
        tiny
    )
    return (factor.unflatten(-1, (-1, group)) * fitted[..., None]).reshape(shape)
