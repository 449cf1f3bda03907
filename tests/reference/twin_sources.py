"""A naive float64 twin for every kind of component: what each source's components are, and where they go.

Like `tests/reference/twin.py`, from which it takes the recorded pass only, it follows the definition, dense
and one prompt at a time, and shares no code with the package. A group of components starts at a block input,
between its attention and its MLP, or after its MLP, and is propagated alone.

Notation: positions `n` and `k`, components `m`, hidden size `d`, heads `h`, a head's values `s`, neurons
`i`. Constants are a component of their own, the last one, in models that have any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tests.reference.twin import Layer, Rule, Trace, frozen_norm, has_bias

Place = Literal["entry", "middle", "behind"]


@dataclass
class Group:
    """Components that compete among themselves, where they begin."""

    layer: int
    place: Place
    components: Tensor  # [m, n, d]
    constants: Tensor | None = None  # [n, d] what belongs to none of them from the start
    positional: bool = False  # the first is the first position's, which takes no share after it


# What the components are


def tokens(trace: Trace, layer: int) -> Group:
    """`C[m, n] = X[n]` where `n = m`, else 0."""
    return spans(trace, layer, list(range(len(trace.state(layer)))))


def spans(trace: Trace, layer: int, owners: Sequence[int]) -> Group:
    """`C[m, n] = X[n]` where position `n` belongs to component `m`, else 0."""
    belongs = torch.tensor(owners)[None] == torch.arange(max(owners) + 1)[:, None]
    state = trace.state(layer)
    return Group(layer, "entry", belongs[:, :, None] * state, positional=True)


def heads(trace: Trace, layer: int) -> Group:
    """The state before a block's attention, and what each head adds by its own part of the output map."""
    own = trace.layers[layer]
    normed = frozen_norm(own.block.input_layernorm, own.entering, own.entering)
    value, output = value_and_output(own)
    added = torch.einsum("hnk,hsd,kd,ehs->hne", own.attention, value, normed, output)
    components = torch.cat([own.entering[None], added])
    return Group(layer, "middle", components, attention_constants(own))


def attention_module(trace: Trace, layer: int) -> Group:
    own = trace.layers[layer]
    return Group(layer, "middle", torch.stack([own.entering, own.middle - own.entering]))


def mlp_module(trace: Trace, layer: int) -> Group:
    own = trace.layers[layer]
    return Group(layer, "behind", torch.stack([own.middle, own.leaving - own.middle]))


def neurons(trace: Trace, layer: int, indices: Sequence[int] | None = None) -> Group:
    """The state after the MLP without the chosen neurons, and each neuron by its column of the down map."""
    own = trace.layers[layer]
    mlp = own.block.mlp
    chosen = list(range(own.gate.shape[1])) if indices is None else list(indices)
    values = mlp.act_fn(own.gate) * own.up
    parts = torch.stack([torch.outer(values[:, i], mlp.down_proj.weight[:, i]) for i in chosen])
    return Group(layer, "behind", torch.cat([(own.leaving - parts.sum(0))[None], parts]))


def subspaces(trace: Trace, layer: int, bases: Sequence[Tensor]) -> Group:
    """`X P` for each subspace's projector `P`, and what they leave."""
    state = trace.state(layer)
    parts = []
    for basis in bases:
        rows = basis.double().reshape(-1, basis.shape[-1])
        parts.append(state @ torch.linalg.pinv(rows) @ rows)
    return Group(layer, "entry", torch.stack([*parts, state - sum(parts)]))


# Where they go


@torch.no_grad()
def propagate(trace: Trace, group: Group, rule: Rule, temperature: float = 0.1) -> dict[int, Tensor]:
    """Carries a group to the end.

    Returns:
        For each layer from the first that the whole group enters to the number of blocks, the components
        `[m, n, d]` there, the constants' last if the model has any.
    """
    states = group.components
    constants = has_bias(trace.model)
    if constants:
        begun = torch.zeros_like(states[0]) if group.constants is None else group.constants
        states = torch.cat([states, begun[None]])
    found = {}
    for index in range(group.layer, len(trace.layers)):
        layer = trace.layers[index]
        place = group.place if index == group.layer else "entry"
        if place == "entry":
            found[index] = states
            states = states + attention_parts(layer, states, constants)
        if place != "behind":
            states = states + mlp_parts(layer, states, constants, group.positional, rule, temperature)
    found[len(trace.layers)] = states
    return found


def value_and_output(layer: Layer) -> tuple[Tensor, Tensor]:
    """Each query head's value map `[h, s, d]` and output map `[d, h, s]`."""
    attention = layer.block.self_attn
    count = len(layer.attention)
    output = attention.o_proj.weight
    output = output.reshape(len(output), count, -1)
    value = attention.v_proj.weight.reshape(-1, output.shape[2], attention.v_proj.weight.shape[1])
    of_head = torch.arange(count) * len(value) // count
    return value[of_head], output


def attention_constants(layer: Layer) -> Tensor:
    """What value and output biases add `[n, d]`."""
    attention = layer.block.self_attn
    total = torch.zeros_like(layer.entering)
    if attention.v_proj.bias is not None:
        _, output = value_and_output(layer)
        size = output.shape[2]
        by_value_head = attention.v_proj.bias.reshape(-1, size)
        of_head = torch.arange(len(layer.attention)) * len(by_value_head) // len(layer.attention)
        total = total + torch.einsum("hnk,hs,dhs->nd", layer.attention, by_value_head[of_head], output)
    if attention.o_proj.bias is not None:
        total = total + attention.o_proj.bias
    return total


def attention_parts(layer: Layer, states: Tensor, constants: bool) -> Tensor:
    """`sum_h W_O^h sum_k A[h,n,k] W_V^h Ĉ[m,k]`, and the biases' part last."""
    normed = frozen_norm(layer.block.input_layernorm, layer.entering, states)
    value, output = value_and_output(layer)
    mixed = torch.einsum("hnk,mkhs->mnhs", layer.attention, torch.einsum("hsd,mkd->mkhs", value, normed))
    added = torch.einsum("mnhs,dhs->mnd", mixed, output)
    if constants:
        added[-1] += attention_constants(layer)
    return added


def mlp_parts(
    layer: Layer, states: Tensor, constants: bool, positional: bool, rule: Rule, temperature: float
) -> Tensor:
    """`W_down (share[m,n] a[n])`, and the biases' part last."""
    mlp = layer.block.mlp
    normed = frozen_norm(layer.block.post_attention_layernorm, layer.middle, states)
    gates = torch.einsum("id,mnd->mni", mlp.gate_proj.weight, normed)
    present = (states != 0).any(-1)
    if constants and mlp.gate_proj.bias is not None:
        gates[-1] += mlp.gate_proj.bias
        present[-1] = True
    if positional:
        others = present[1:].any(0)
        others[0] = False  # at its own position the first competes
        present[0] &= ~others
    values = mlp.act_fn(layer.gate) * layer.up
    if rule == "taylor":
        shares = gates / layer.gate
    elif rule == "half":
        ups = torch.einsum("id,mnd->mni", mlp.up_proj.weight, normed)
        if constants and mlp.up_proj.bias is not None:
            ups[-1] += mlp.up_proj.bias
        shares = (gates / layer.gate + ups / layer.up) / 2
    else:
        shares = competing_shares(gates, present[:, :, None].expand_as(gates), rule, temperature)
    added = torch.einsum("di,mni->mnd", mlp.down_proj.weight, shares * values)
    if constants and mlp.down_proj.bias is not None:
        added[-1] += mlp.down_proj.bias
    return added


def competing_shares(gates: Tensor, present: Tensor, rule: Rule, temperature: float) -> Tensor:
    """Each present component's share `[m, n, i]` of every neuron."""
    highest = gates.masked_fill(~present, -torch.inf)
    winner = torch.zeros_like(gates).scatter(0, highest.argmax(0, keepdim=True), 1.0)
    if rule == "max":
        return winner
    if rule == "softmax":
        weights = torch.exp((highest - highest.amax(0)) / temperature)
        return weights / weights.sum(0)
    if rule == "relu":
        positive = gates.clamp(min=0) * present
        return torch.where(positive.sum(0) > 0, positive / positive.sum(0), winner)
    if rule == "linear":
        lowest = gates.masked_fill(~present, torch.inf).amin(0)
        above = (gates - lowest) * present
        return torch.where(above.sum(0) > 0, above / above.sum(0), present / present.sum(0))
    raise ValueError(rule)


# What is read of them


@torch.no_grad()
def token_scores(trace: Trace, states: Tensor, position: int, token: int, foil: int | None = None) -> Tensor:
    """The components' scores `[m]` for a logit, or for the difference of two, after the frozen norm."""
    normed = frozen_norm(trace.model.model.norm, trace.final, states)[:, position]
    logits = torch.einsum("vd,md->mv", trace.model.lm_head.weight, normed)
    return logits[:, token] - (0 if foil is None else logits[:, foil])
