"""Freeze a mixture of experts: one wide MLP, in which a position has the neurons that it was routed to."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.engine.frozen import Expert
from depass_lightning.engine.hooks import Capture
from depass_lightning.models.affine import AffineMap
from depass_lightning.models.experts import ExpertsParts


@dataclass(frozen=True)
class FrozenExperts:
    """A mixture of experts as one dense layer, with its routing held fixed."""

    parts: ExpertsParts
    capture: Capture
    dtype: torch.dtype
    shape: torch.Size

    def routed(self) -> tuple[Expert, ...]:
        """Which neurons are each expert's, and which positions were routed to it."""
        width, active = self.parts.width, self._weights() != 0
        return tuple(
            Expert(slice(expert * width, (expert + 1) * width), mask.view(self.shape))
            for expert, mask in enumerate(active.T)
        )

    def _weights(self) -> Float[Tensor, "at expert"]:
        """How much each expert counts at each position, flattened."""
        states, indices, weights = self.capture.seen["experts"]
        count = states.numel() // states.shape[-1]
        routed = torch.zeros(count, self.parts.count, device=states.device, dtype=self.dtype)
        weights = weights.reshape(count, -1).to(self.dtype) * self.parts.scale
        return routed.scatter_add_(1, indices.view(count, -1), weights)

    def frozen(self) -> tuple[Tensor, Tensor, AffineMap, AffineMap, Tensor | None]:
        """Pre-activations, neurons, the gate map, the down map, and what experts' biases add."""
        states, indices, _ = self.capture.seen["experts"]
        states = states.reshape(-1, states.shape[-1]).to(self.dtype)
        count, width, routed = self.parts.count, self.parts.width, self._weights()
        gate_up, bias, down, down_bias = self.parts.weights(self.dtype)
        gate_rows = self.parts.gate_rows
        gates, neurons = states.new_zeros(2, len(states), count, width)
        for expert in indices.unique().tolist():
            rows = (indices.view(len(states), -1) == expert).any(1)
            both = torch.nn.functional.linear(
                states[rows], gate_up[expert], None if bias is None else bias[expert]
            )
            gates[rows, expert] = both[:, gate_rows]
            neurons[rows, expert] = self.parts.activated(both) * routed[rows, expert, None]
        return (
            gates.view(*self.shape, -1),
            neurons.view(*self.shape, -1),
            AffineMap(
                gate_up[:, gate_rows].flatten(0, 1), None if bias is None else bias[:, gate_rows].flatten()
            ),
            AffineMap(down.transpose(0, 1).flatten(1), None),
            None if down_bias is None else (routed @ down_bias).view(*self.shape, -1),
        )
