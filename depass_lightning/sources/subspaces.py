"""A state split by its content: subspaces, which a file may hold, or any components that sum to it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from depass_lightning.engine.record import Recording
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.component import Component
from depass_lightning.sources.base import GroupSource, SplitContext, resolve_layer


def directions_of(basis: Any) -> Float[Tensor, "direction hidden"]:
    """Return directions from any of the forms that they are kept in.

    Args:
        basis: a vector or a matrix of rows (a tensor, an array or lists), a fitted scikit-learn probe
            (`coef_`), or a sparse autoencoder (`W_dec`).

    Raises:
        DePassError: it holds no directions.
    """
    for attribute in ("coef_", "W_dec"):
        if hasattr(basis, attribute):
            basis = getattr(basis, attribute)
            break
    try:
        rows = torch.as_tensor(basis).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DePassError(
            "a basis is a vector, a matrix of rows, a fitted probe or a sparse autoencoder, "
            f"not {type(basis).__name__}"
        ) from error
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
        raise DePassError(
            "a basis is one finite direction or a matrix of them, not all zero; "
            f"this one has shape {tuple(rows.shape)}"
        )
    return rows


@dataclass(frozen=True)
class Subspace(GroupSource):
    """The state's projection onto a subspace, or onto several, and the rest.

    Several subspaces are projected onto independently; where they are not orthogonal, the rest compensates.

    Args:
        layer: the block whose input is split; negative counts from the end.
        basis: directions that span the subspace, in any length: a vector, a matrix of rows, a fitted
            scikit-learn probe, a sparse autoencoder; or a list of these for several subspaces.
        names: the subspaces' labels.
    """

    layer: int
    basis: Any
    names: Sequence[str] | None = None
    kind: ClassVar[str] = "subspace"

    @override
    def layers(self, count: int) -> list[int]:
        return [resolve_layer(self.layer, count, "Subspace")]

    @property
    def bases(self) -> list[Float[Tensor, "direction hidden"]]:
        """Each subspace's directions."""
        several = isinstance(self.basis, (list, tuple)) and not all(
            isinstance(entry, (int, float)) for entry in self.basis
        )
        return [directions_of(entry) for entry in (self.basis if several else [self.basis])]

    @override
    def entering(self, recording: Recording, layer: int, settings: SplitContext) -> Tensor:
        state = recording.state(layer)
        parts = []
        for rows in self.bases:
            if rows.shape[1] != state.shape[-1]:
                raise DePassError(
                    f"Subspace: directions have {rows.shape[1]} numbers, the model's states {state.shape[-1]}"
                )
            _, sizes, span = torch.linalg.svd(rows, full_matrices=False)
            span = span[sizes > sizes[0] * 1e-10].to(state)
            parts.append(state @ span.T @ span)
        rest = state - torch.stack(parts).sum(0)
        return torch.stack([*parts, rest], 1)

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        count = len(self.bases)
        names = (
            list(self.names) if self.names is not None else [f"subspace {index}" for index in range(count)]
        )
        if len(names) != count:
            raise DePassError(f"Subspace: {len(names)} names for {count} subspaces")
        if count == 1 and self.names is None:
            names = ["subspace"]
        parts = [Component("subspace", name, index=index) for index, name in enumerate(names)]
        return [[*parts, Component("rest", "rest")]]


def load_subspace(path: str | os.PathLike[str], layer: int) -> Subspace:
    """Read a `Subspace` from a file of directions.

    Args:
        path: a `.safetensors` file, where each tensor spans a subspace of the tensor's name; or a `.npy` file
            with one array, whose subspace has the file's name. Each is a direction `[hidden]` or a matrix
            `[direction, hidden]`.
        layer: the block whose input is split; negative counts from the end.

    Raises:
        DePassError: there is no such file, or it holds no directions.
    """
    path = Path(path)
    if not path.is_file():
        raise DePassError(f"there is no file {path} of directions")
    if path.suffix not in (".safetensors", ".npy"):
        raise DePassError(
            f"{path.name} is neither a .safetensors nor a .npy file; save the directions as one"
        )
    try:
        if path.suffix == ".npy":
            tensors = {path.stem: torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            tensors = load_file(path)
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise DePassError(f"{path.name} cannot be read: {error}") from error
    if not tensors:
        raise DePassError(f"{path.name} holds no directions")
    bases = []
    for name, tensor in tensors.items():
        try:
            bases.append(directions_of(tensor))
        except DePassError as error:
            raise DePassError(f"{path.name}, {name!r}: {error}") from error
    return Subspace(layer, bases, names=list(tensors))


@dataclass(frozen=True, eq=False)
class Components(GroupSource):
    """Any components that sum to the state at a layer.

    Args:
        layer: the block whose input is split; negative counts from the end.
        tensor: `[component, position, hidden]`, or one such tensor for each prompt in the call's order, in a
            list or in one tensor that is padded on the right.
        names: the components' labels.
    """

    layer: int
    tensor: Float[Tensor, "*prompt component position hidden"] | Sequence[Tensor]
    names: Sequence[str] | None = None
    kind: ClassVar[str] = "components"

    @override
    def layers(self, count: int) -> list[int]:
        return [resolve_layer(self.layer, count, "Components")]

    @override
    def entering(self, recording: Recording, layer: int, settings: SplitContext) -> Tensor:
        state = recording.state(layer)
        lengths = recording.lengths.tolist()
        split = state.new_zeros(len(state), self._of(settings.prompts[0]).shape[0], *state.shape[1:])
        for row, (prompt, length) in enumerate(zip(settings.prompts, lengths, strict=True)):
            # Positions after the target were cut off; those after the prompt are padding.
            components = self._of(prompt)[:, :length].to(state)
            if components.shape[1] < length:
                raise DePassError(
                    f"Components: the tensor for {prompt.name} has {components.shape[1]} positions, but the "
                    f"state has {length}; give [component, position, hidden]"
                )
            split[row, :, :length] = components
            total = state[row, :length]
            error = float((components.sum(0) - total).norm() / total.norm())
            if not error < 1e-4:
                raise DePassError(
                    f"Components: they do not sum to the state of {prompt.name} at layer {layer} (relative "
                    f"error {error:.2g}); add what is missing as one more component"
                )
        return split

    def _of(self, prompt: Prompt) -> Float[Tensor, "component position hidden"]:
        """Return one prompt's components."""
        tensors = self.tensor
        if isinstance(tensors, Tensor) and tensors.ndim == 3:
            return tensors
        if not isinstance(tensors, Tensor) and not (
            isinstance(tensors, Sequence) and all(isinstance(tensor, Tensor) for tensor in tensors)
        ):
            raise DePassError(
                f"Components: tensor is a {type(tensors).__name__}; give [component, position, hidden], or a "
                "list of such tensors, one for each prompt"
            )
        if not prompt.index < len(tensors):
            raise DePassError(f"Components: there is no tensor for {prompt.name}; give one for each prompt")
        return tensors[prompt.index]

    @override
    def describe(self, prompt: Prompt, decoder: Decoder) -> list[list[Component]]:
        tensor = self._of(prompt)
        expected = [len(prompt.ids), decoder.hidden_size]
        if tensor.ndim != 3 or tensor.shape[2] != expected[1]:
            raise DePassError(
                f"Components: the tensor's shape for {prompt.name} is {tuple(tensor.shape)}, but its state "
                f"at layer {self.layer} is [position, hidden] = {expected}; give [component, position, "
                "hidden]"
            )
        count = len(tensor)
        names = (
            list(self.names) if self.names is not None else [f"component {index}" for index in range(count)]
        )
        if len(names) != count:
            raise DePassError(f"Components: {len(names)} names for {count} components")
        return [[Component("component", name, index=index) for index, name in enumerate(names)]]
