"""Norms with their scale held fixed, which act linearly on the residual stream's components."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import AffineMap, device_of
from depass_lightning.models.sharding import gathered


@dataclass(frozen=True)
class NormParameters:
    """What a norm does besides scaling, learnt from the module itself by feeding it known vectors.

    So neither the name of its epsilon nor whether its weight is stored as `w` or `1 + w` matters.
    """

    weight: Float[Tensor, "hidden"]
    bias: Float[Tensor, "hidden"] | None
    centred: bool

    @classmethod
    def of(
        cls, norm: nn.Module, near: nn.Module, hidden: int, expects: torch.dtype, dtype: torch.dtype
    ) -> "NormParameters":
        """Probe a norm.

        Args:
            norm: the model's norm module.
            near: a module on the same device, for norms without weights.
            hidden: the size of what it norms.
            expects: the precision of its input.
            dtype: the precision of the result.
        """
        probes = torch.ones(1, 3, hidden, device=device_of(norm, near), dtype=expects)
        probes[0, 0] = 0
        probes[0, 2, 1::2] = -1
        with gathered(norm):
            at_zero, at_ones, at_signs = norm(probes)[0].to(dtype)
        signs = probes[0, 2].to(dtype)
        centred = bool((at_ones - at_zero).abs().max() < 1e-2 * (at_signs - at_zero).abs().max())
        if centred:
            signs = signs - signs.mean()
        bias = at_zero if bool(at_zero.any()) else None
        return cls((at_signs - at_zero) / signs, bias, centred)

    @classmethod
    def nothing(cls, hidden: int, device: torch.device, dtype: torch.dtype) -> "NormParameters":
        """What stands for a norm where a sublayer has none."""
        return cls(torch.ones(hidden, device=device, dtype=dtype), None, False)

    def direction(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The norm's linear part, before the per-position scale."""
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states * self.weight


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its per-position scale held fixed: `x -> scale * weight * (x - mean x) + bias`.

    The mean is subtracted by layer norms only.
    """

    probe: NormParameters
    scale: Float[Tensor, "batch position"]

    @classmethod
    def fit(cls, probe: NormParameters, states: Tensor, normed: Tensor, name: str) -> "FrozenNorm":
        """Fit the scale that maps a norm's recorded input to its recorded output.

        Args:
            probe: what the norm does besides scaling.
            states: `[batch, position, hidden]`, its input.
            normed: `[batch, position, hidden]`, its output.
            name: what the norm is called in an error.

        Raises:
            DePassError: no scale explains the output, so the module is no RMSNorm or LayerNorm.
        """
        dtype = probe.weight.dtype
        states, normed = states.to(dtype), normed.to(dtype)
        direction = probe.direction(states)
        if probe.bias is not None:
            normed = normed - probe.bias
        scale = (normed * direction).sum(-1) / direction.square().sum(-1).clamp_min(torch.finfo(dtype).tiny)
        residual = (normed - scale[..., None] * direction).norm() / normed.norm().clamp_min(
            torch.finfo(dtype).tiny
        )
        # Half-precision outputs are rounded to 2^-9; anything beyond is another kind of norm.
        if residual > 2e-2:
            raise DePassError(f"{name} is neither an RMSNorm nor a LayerNorm (misfit {residual:.1e})")
        return cls(probe, scale)

    @classmethod
    def nothing(cls, states: Float[Tensor, "batch position hidden"]) -> "FrozenNorm":
        """What stands for a norm where states are read as they are."""
        probe = NormParameters.nothing(states.shape[-1], states.device, states.dtype)
        return cls(probe, states.new_ones(states.shape[:2]))

    def __call__(
        self, rows: Float[Tensor, "row hidden"], scale: Float[Tensor, "row"]
    ) -> Float[Tensor, "row hidden"]:
        """Norm components; the bias is not theirs.

        Args:
            rows: `[row, hidden]` components.
            scale: `[row]` this norm's scale at each row's position.
        """
        if self.probe.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows * scale[:, None]).mul_(self.probe.weight)

    def transposed(
        self, states: Float[Tensor, "*any hidden"], scale: Float[Tensor, "*any"]
    ) -> Float[Tensor, "*any hidden"]:
        """Propagate derivatives with respect to the norm's output back to its input."""
        states = states * self.probe.weight
        if self.probe.centred:
            states = states - states.mean(-1, keepdim=True)
        return states.mul_(scale[..., None])

    def constant_through(self, linear: AffineMap) -> Tensor | None:
        """Return what a linear map after this norm adds: its bias, and the norm's bias through it."""
        if self.probe.bias is None:
            return linear.bias
        pushed = linear.weight @ self.probe.bias
        return pushed if linear.bias is None else pushed + linear.bias


def past(skip: FrozenNorm | None, states: Float[Tensor, "batch position hidden"]) -> Tensor:
    """Return what the residual stream keeps of states past a sublayer.

    Args:
        skip: the frozen norm that the stream itself goes through there; None where there is none.
        states: states before the sublayer.
    """
    if skip is None:
        return states
    return skip(states.flatten(0, 1), skip.scale.flatten()).view(states.shape)
