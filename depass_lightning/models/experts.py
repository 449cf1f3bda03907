"""The maps of a dense MLP, and the experts of a mixture as one wide MLP."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import AffineMap, Projection, base_of, parameter_of


@dataclass(frozen=True)
class DenseParts:
    """The maps of an MLP, and the norm of its neurons, as `MLPSpec` names them.

    Args:
        follows: the module that reads the neurons, if `down` is an identity that the model does not have.
    """

    gate: Projection
    up: Projection | None
    down: Projection
    inner_norm: nn.Module | None = None
    follows: nn.Module | None = None
    gate_scale: float = 1.0

    @property
    def reader(self) -> nn.Module:
        """The module whose input is the neurons."""
        return self.follows or self.down.module


@dataclass(frozen=True)
class ExpertsParts:
    """The modules that `ExpertsSpec` names, and the factor of their output."""

    module: nn.Module
    shared: DenseParts | None
    shared_gate: nn.Module | None
    scale: float = 1.0

    @property
    def count(self) -> int:
        """The number of experts."""
        return self._stored("down_proj").shape[0]

    @property
    def transposed(self) -> bool:
        """Whether the weights are stored `[expert, in, out]`."""
        return bool(getattr(base_of(self.module), "is_transposed", False))

    @property
    def _interleaved(self) -> bool:
        """Whether the outputs for gate and up alternate."""
        return not getattr(base_of(self.module), "is_concatenated", True)

    @property
    def has_biases(self) -> bool:
        """Whether the experts add constants."""
        return hasattr(base_of(self.module), "down_proj_bias")

    @property
    def width(self) -> int:
        """The number of one expert's neurons."""
        return self._stored("down_proj").shape[1 if self.transposed else 2]

    def _stored(self, name: str) -> Tensor:
        weight = getattr(base_of(self.module), name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            kind = type(base_of(self.module)).__name__
            raise DePassError(f"{kind} keeps no weights of all experts in '{name}'")
        return weight

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return the weights of all experts with their biases: gate and up together, and down."""
        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        self._stored(names[0])
        gate_up, first, down, second = (parameter_of(self.module, name, dtype) for name in names)
        assert gate_up is not None
        assert down is not None
        if self.transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return gate_up, first, down, second

    def column(self, expert: int, neuron: int, dtype: torch.dtype) -> Float[Tensor, "hidden"]:
        """What one neuron of one expert writes."""
        down = parameter_of(self.module, "down_proj", None)
        assert down is not None
        return (down[expert, neuron] if self.transposed else down[expert, :, neuron]).to(dtype)

    @property
    def gate_rows(self) -> slice:
        """Where gates stand among the outputs of gates and ups together."""
        return slice(0, None, 2) if self._interleaved else slice(0, self.width)

    @property
    def up_rows(self) -> slice:
        """Where ups stand among the outputs of gates and ups together."""
        return slice(1, None, 2) if self._interleaved else slice(self.width, 2 * self.width)

    def activated(self, gate_up: Tensor) -> Tensor:
        """One expert's neurons from its gates and ups, by the module's own code.

        Args:
            gate_up: `[*rows, 2 neuron]`.
        """
        module: Any = base_of(self.module)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return module.act_fn(gate) * up


@dataclass(frozen=True)
class ExpertsUp:
    """The map to the second factor of all experts' neurons, and a shared expert's last, read when needed.

    Args:
        parts: the experts.
        device: where it is read to; None for where it is.
    """

    parts: ExpertsParts
    device: torch.device | None = None

    def linear(self, dtype: torch.dtype) -> AffineMap:
        """Read the map."""
        rows = self.parts.up_rows
        gate_up, bias, _, _ = self.parts.weights(dtype)
        offset = self._offset(gate_up)
        biases = None if bias is None else bias[:, rows].flatten()
        weight = gate_up[:, rows].flatten(0, 1)
        if offset:
            biases = offset + (weight.new_zeros(len(weight)) if biases is None else biases)
        affine = AffineMap(weight, biases)
        if self.parts.shared is not None:
            assert self.parts.shared.up is not None
            affine = affine.joined(self.parts.shared.up.linear(dtype).to(weight.device))
        return affine if self.device is None else affine.to(self.device)

    def _offset(self, like: Tensor) -> float:
        """What the experts add to their second factor, learnt from their own code: gpt-oss adds one."""
        gate_up = torch.ones(2, 2 * self.parts.width, device=like.device, dtype=like.dtype)
        gate_up[0, self.parts.up_rows] = 0
        at_zero, at_one = self.parts.activated(gate_up)[:, 0].tolist()
        return at_zero / (at_one - at_zero)
