"""Bind a family's declaration to one block, or to the modules between the blocks and the unembedding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import Projection, device_of, features
from depass_lightning.models.block import AttentionParts, Block, MLPParts
from depass_lightning.models.experts import DenseParts, ExpertsParts
from depass_lightning.models.mixers import MIXERS
from depass_lightning.models.mixers.absent import NoMixing
from depass_lightning.models.spec import (
    AttentionSpec,
    FamilySpec,
    HeadSpec,
    MLPSpec,
    configured,
    submodule,
)


def bind(spec: FamilySpec, index: int, module: nn.Module, config: Any, owner: str) -> Block:
    """Bind a declaration to one block, which errors call `owner`.

    Raises:
        DePassError: the block lacks a declared submodule.
    """
    parts, mlp = (spec.attention, spec.mlp) if spec.by_block is None else spec.by_block(module)
    inside = None if mlp is None else _mlp(mlp, module, config, owner)
    if parts is not None:
        probabilities = None if spec.model is None else parts.probabilities
        attention = _attention(parts, module, config, owner, probabilities)
    else:
        assert inside is not None
        sizes = inside.every_dense[0].down.shape[0], config.num_attention_heads
        attention = _absent_attention(module, sizes)
    if inside is None:
        inside = _absent_mlp(module, attention.output.shape[0])
    return Block(
        index=index,
        module=module,
        attention=attention,
        mlp=inside,
        parallel=spec.parallel,
        scale=configured(config, spec.residual_scale),
    )


def bind_head(
    spec: HeadSpec, index: int, norm: nn.Module | None, module: nn.Module, sizes: tuple[int, int]
) -> Block:
    """Bind the modules between a decoder and its unembedding as a block without attention.

    Args:
        spec: the declaration.
        index: the block's number.
        norm: the decoder's final norm, if it has one.
        module: the module that has the map, the activation and the norm.
        sizes: the size of the residual stream, and the number of heads of other blocks.

    Raises:
        DePassError: the module lacks a declared submodule, or its output is not as wide as the stream.
    """
    owner = type(module).__name__
    dense, last = submodule(module, spec.dense, owner), submodule(module, spec.norm, owner)
    if spec.activation is not None:
        module = nn.Sequential(dense, submodule(module, spec.activation, owner), last)
    hidden = sizes[0]
    same = nn.Linear(hidden, hidden, bias=False, device=device_of(dense))
    nn.init.eye_(same.weight)
    if features(dense) != (hidden, hidden):
        raise DePassError(
            f"{owner} maps the residual stream's {hidden} dimensions to {features(dense)[1]}; a decomposed "
            "pass needs the same number"
        )
    first = dense if norm is None else norm
    return Block(
        index=index,
        module=module if norm is None else nn.Sequential(norm, module),
        attention=_absent_attention(first, sizes),
        mlp=MLPParts(
            module=module,
            norm=norm,
            post_norm=None if isinstance(last, nn.Identity) else last,
            dense=DenseParts(Projection(dense), None, Projection(same), follows=last),
            residual_weight=torch.zeros(()),
        ),
        parallel=False,
        scale=1.0,
        ends=(first, last),
    )


def _absent_attention(module: nn.Module, sizes: tuple[int, int]) -> AttentionParts:
    """A stand-in for the attention of a block without one; it adds zero."""
    mixer = NoMixing(sizes)
    return AttentionParts(
        module=module, value=mixer.value, output=mixer.output, heads=mixer.heads, mixer=mixer
    )


def _absent_mlp(module: nn.Module, hidden: int) -> MLPParts:
    """A stand-in for the MLP of a block without one: a single neuron that adds zero."""
    maps = nn.Linear(hidden, 1, bias=False), nn.Linear(1, hidden, bias=False)
    for linear in maps:
        nn.init.zeros_(linear.weight)
    gate, down = (Projection(linear) for linear in maps)
    return MLPParts(module=module, dense=DenseParts(gate, None, down), absent=True)


def _optional(module: nn.Module, path: str | None, owner: str) -> nn.Module | None:
    return None if path is None else submodule(module, path, owner)


def _past(spec: AttentionSpec | MLPSpec, module: nn.Module, owner: str) -> dict[str, Any]:
    """What happens to the residual stream past a sublayer, and to the sublayer's output."""
    fields: dict[str, Any] = {"residual": spec.residual}
    for field in ("residual_weight", "output_weight"):
        name: str | None = getattr(spec, field)
        if name is not None:
            *path, last = name.split(".")
            fields[field] = getattr(submodule(module, ".".join(path), owner), last, None)
            if not isinstance(fields[field], Tensor | float | int):
                raise DePassError(f"{owner} has no factor '{name}', which its family's declaration names")
    return fields


def _attention(
    spec: AttentionSpec,
    module: nn.Module,
    config: Any,
    owner: str,
    probabilities: Callable[..., Tensor] | None,
) -> AttentionParts:
    names = dict(spec.mixers)
    mixers = [
        name
        for name, kind in names.items()
        if MIXERS[kind].fits(getattr(module, name, None) if name else module)
    ]
    inside = submodule(module, mixers[0] if mixers else spec.module, owner)
    if mixers:
        return _mixer(spec, module, inside, names[mixers[0]], owner)
    # An encoder-decoder's decoder, or single blocks, may differ from the configuration's number of heads.
    stated = getattr(inside, "num_heads", None)
    heads = stated if isinstance(stated, int) else config.num_attention_heads
    output = Projection(submodule(inside, spec.output, owner))
    size = output.shape[1] // heads
    value = submodule(inside, spec.value, owner)
    latent = None
    if spec.latent is not None:
        projection, norm = (submodule(inside, name, owner) for name in spec.latent)
        latent = Projection(projection, slice(0, features(value)[0])), norm
    rows = _value_rows(spec, features(value)[1], heads, size, owner)
    return AttentionParts(
        module=inside,
        norm=_optional(module, spec.norm, owner),
        post_norm=_optional(module, spec.post_norm, owner),
        value=Projection(value, rows),
        latent=latent,
        output=output,
        heads=heads,
        in_mask=spec.in_mask,
        **_past(spec, module, owner),
        gate=_gate(inside, spec.gate, heads, size, owner),
        probabilities=probabilities,
        weights=_optional(inside, spec.weights, owner),
        inner_norm=_optional(inside, spec.inner_norm, owner),
        output_bias=None if spec.output_bias is None else getattr(inside, spec.output_bias, None),
        value_norm=_optional(inside, spec.value_norm, owner),
        value_scale=1.0 if spec.value_scale is None else float(getattr(inside, spec.value_scale, 1.0)),
        gate_activation=spec.gate_activation,
        scaled_heads=spec.scaled_heads,
    )


def _gate(inside: nn.Module, name: str | None, heads: int, size: int, owner: str) -> Projection | None:
    """The map to attention's gates, which may be part of the query map."""
    if name is None or getattr(inside, name, inside) is None:  # absent in some configurations
        return None
    gate = submodule(inside, name, owner)
    outputs = features(gate)[1]
    if outputs == 2 * heads * size:  # each head's queries, then its gates
        return Projection(gate, torch.arange(outputs).view(heads, 2, size)[:, 1].flatten())
    return Projection(gate)


def _mixer(
    spec: AttentionSpec, module: nn.Module, inside: nn.Module, kind: str, owner: str
) -> AttentionParts:
    """The parts of a linear mixer, with the norms that attention would have."""
    try:
        mixer = MIXERS[kind](inside)
    except AttributeError as error:
        raise DePassError(
            f"{owner}: {type(inside).__name__} is no mixer of kind '{kind}': {error}"
        ) from error
    return AttentionParts(
        module=inside,
        norm=_optional(module, spec.norm, owner),
        post_norm=_optional(module, spec.post_norm, owner),
        value=mixer.value,
        output=mixer.output,
        heads=mixer.heads,
        **_past(spec, module, owner),
        mixer=mixer,
        weights=mixer.softmax,
    )


def _value_rows(spec: AttentionSpec, outputs: int, heads: int, size: int, owner: str) -> Tensor | None:
    """Which outputs of a fused projection are values."""
    if spec.layout == "own":
        return None
    if spec.layout == "quarters":
        return torch.arange(outputs).view(4, 3, -1)[:, 1].flatten()
    # Queries have `heads` parts; keys and values, or groups of queries, keys and values, share the rest.
    groups = heads if spec.latent is not None else (outputs // size - heads) // 2
    if groups < 1 or outputs % groups:
        raise DePassError(f"{owner}: '{spec.value}' has {outputs} outputs, too few for {heads} heads' values")
    everything = torch.arange(outputs)
    if spec.layout == "concatenated":
        return everything[-groups * size :]
    return everything.view(groups, -1)[:, -size:].flatten()


def _mlp(spec: MLPSpec, module: nn.Module, config: Any, owner: str) -> MLPParts:
    inside = submodule(module, spec.module, owner)
    experts = None
    names = spec.experts
    if names is not None and any(path == names.module for path, _ in inside.named_modules()):
        shared = getattr(inside, names.shared, None) if names.shared else None
        experts = ExpertsParts(
            module=submodule(inside, names.module, owner),
            shared=None if shared is None else _dense(spec, shared, f"{owner}'s shared expert"),
            shared_gate=_optional(inside, names.shared_gate, owner),
            scale=configured(config, names.scale),
        )
    post_norm = _optional(module, spec.post_norm, owner)
    if names is not None and experts is not None and names.post_norm is not None:
        post_norm = submodule(inside, names.post_norm, owner)
    return MLPParts(
        module=inside,
        norm=_optional(module, spec.norm, owner),
        post_norm=post_norm,
        dense=_dense(spec, inside, owner) if experts is None else None,
        experts=experts,
        **_past(spec, module, owner),
    )


def _dense(spec: MLPSpec, inside: nn.Module, owner: str) -> DenseParts:
    gate = submodule(inside, spec.gate, owner)
    down = Projection(submodule(inside, spec.down, owner))
    norm = _optional(inside, spec.inner_norm, owner)
    scale = 1.0 if spec.gate_scale is None else float(getattr(inside, spec.gate_scale))
    if spec.up == spec.gate:
        half = features(gate)[1] // 2
        return DenseParts(
            Projection(gate, slice(0, half)), Projection(gate, slice(half, 2 * half)), down, norm
        )
    up = _optional(inside, spec.up, owner)
    return DenseParts(Projection(gate), None if up is None else Projection(up), down, norm, gate_scale=scale)
