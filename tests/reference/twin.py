"""A naive float64 twin of the engine: the decomposed forward pass as its definition reads, and nothing else.

It is slow, dense and single-prompt on purpose, and shares no code with the package. A true pass is recorded
from the real model, run in float64 with eager attention; then every component is carried through every block
by plain loops.

Notation: positions `n` and `k`, components `m`, hidden size `d`, heads `h`, neurons `i`. Source: Hong et al.,
"DePass: Unified Feature Attributing by Simple Decomposed Forward Pass", NeurIPS 2025 (arXiv 2510.18462).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.reference.models import stay_in_float64

Rule = Literal["softmax", "max", "relu", "linear", "taylor", "half"]
COMPETING: tuple[Rule, ...] = ("softmax", "max", "relu", "linear")
PUBLISHED: tuple[Rule, ...] = (*COMPETING, "taylor")  # in the paper's code
LINEAR: tuple[Rule, ...] = ("taylor", "half")
RULES: tuple[Rule, ...] = (*COMPETING, *LINEAR)


@dataclass(frozen=True)
class Options:
    """How a state is decomposed; `release` asks for the steps of the paper's published code."""

    layer: int = 0
    rule: Rule = "softmax"
    temperature: float = 0.1
    exclude_first: bool = True
    bias: bool = True
    release: bool = False


@dataclass
class Layer:
    """What one block computed on the prompt, and the block itself."""

    block: Any
    entering: Tensor  # [n, d] the residual state before attention
    middle: Tensor  # [n, d] the residual state between attention and MLP
    leaving: Tensor  # [n, d] the residual state after the MLP
    attention: Tensor  # [h, n, k]
    gate: Tensor  # [n, i] the pre-activations
    up: Tensor  # [n, i]


@dataclass
class Trace:
    """The true pass of a prompt in float64."""

    model: Any
    layers: list[Layer]
    logits: Tensor  # [n, vocabulary]

    @property
    def final(self) -> Tensor:
        """The residual state `[n, d]` after the last block, before the final norm."""
        return self.layers[-1].leaving

    def state(self, layer: int) -> Tensor:
        """The residual state `[n, d]` that enters a block, or (for the number of blocks) leaves the last."""
        return self.final if layer == len(self.layers) else self.layers[layer].entering


@contextmanager
def hooked(pairs: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(model: Any, input_ids: Tensor) -> Trace:
    """Runs a float64 copy of the model on `input_ids` `[n]`, and keeps what the decomposition holds fixed."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    stay_in_float64(model)

    seen: dict[tuple[int, str], Tensor] = {}
    pairs: list[tuple[nn.Module, Callable[..., None]]] = []
    for index, block in enumerate(model.model.layers):

        def keep(name: str, pick: Callable[[Any, Any], Tensor], index: int = index) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                seen[index, name] = pick(inputs, output)[0].clone()

            return hook

        pairs += [
            (block.input_layernorm, keep("entering", lambda inputs, output: inputs[0])),
            (block.self_attn, keep("attention", lambda inputs, output: output[1])),
            (block.post_attention_layernorm, keep("middle", lambda inputs, output: inputs[0])),
            (block.mlp.gate_proj, keep("gate", lambda inputs, output: output)),
            (block.mlp.up_proj, keep("up", lambda inputs, output: output)),
            (block, keep("leaving", lambda inputs, output: output if output.dim() == 3 else output[None])),
        ]
    with hooked(pairs):
        logits = model(input_ids[None], use_cache=False).logits[0]

    layers = []
    for index, block in enumerate(model.model.layers):
        kept = {name: value for (layer, name), value in seen.items() if layer == index}
        layers.append(Layer(block=block, **kept))
    return Trace(model, layers, logits)


def has_bias(model: Any) -> bool:
    """Whether any bias of the model reaches the residual stream other than through an attention pattern."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for linear in (attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj):
            if linear.bias is not None:
                return True
    return False


def frozen_norm(norm: Any, true: Tensor, state: Tensor) -> Tensor:
    """The norm of a component's `state` `[n, d]`, with the statistics of the `true` one."""
    rms = torch.sqrt((true**2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return state * norm.weight / rms


@torch.no_grad()
def decompose(trace: Trace, options: Options) -> dict[int, Tensor]:
    """Carries the token components of `options.layer` to the end.

    Returns:
        For each layer from `options.layer` to the number of blocks, the components `[m, n, d]` of the state
        there: one for each token, then the bias if there is one.
    """
    true = trace.state(options.layer)
    positions = len(true)
    components = [torch.zeros_like(true) for _ in range(positions)]
    for position in range(positions):
        components[position][position] = true[position]
    bias = None
    if options.release:
        components.append(torch.zeros_like(true))  # the release's remainder
    elif options.bias and has_bias(trace.model):
        components.append(torch.zeros_like(true))
        bias = positions

    kept = positions if options.release else len(components)
    states = {options.layer: torch.stack(components[:kept])}
    for index in range(options.layer, len(trace.layers)):
        layer = trace.layers[index]
        components = [c + attention_part(layer, c, m == bias) for m, c in enumerate(components)]
        normed = [frozen_norm(layer.block.post_attention_layernorm, layer.middle, c) for c in components]
        if options.release:
            parts = release_mlp_parts(layer, normed, options)
        else:
            parts = mlp_parts(layer, normed, bias, options)
        components = [c + part for c, part in zip(components, parts, strict=True)]
        states[index + 1] = torch.stack(components[:kept])
    return states


def attention_part(layer: Layer, state: Tensor, is_bias: bool) -> Tensor:
    """What the attention of a block adds to a component: `sum_h W_O^h sum_k A[h,n,k] W_V^h Ĉ[k]`."""
    attention = layer.block.self_attn
    heads = len(layer.attention)
    size = attention.o_proj.weight.shape[1] // heads
    group = heads // (attention.v_proj.weight.shape[0] // size)
    normed = frozen_norm(layer.block.input_layernorm, layer.entering, state)
    added = torch.zeros_like(state)
    for head in range(heads):
        group_rows = slice(head // group * size, (head // group + 1) * size)
        values = normed @ attention.v_proj.weight[group_rows].T
        if is_bias and attention.v_proj.bias is not None:
            values = values + attention.v_proj.bias[group_rows]
        output = attention.o_proj.weight[:, head * size : (head + 1) * size]
        added = added + layer.attention[head] @ values @ output.T
    if is_bias and attention.o_proj.bias is not None:
        added = added + attention.o_proj.bias
    return added


def mlp_parts(layer: Layer, normed: list[Tensor], bias: int | None, options: Options) -> list[Tensor]:
    """What the MLP of a block adds to each component, by the package's own definition."""
    mlp = layer.block.mlp
    gates = torch.stack([c @ mlp.gate_proj.weight.T for c in normed])  # [m, n, i]
    if bias is not None and mlp.gate_proj.bias is not None:
        gates[bias] += mlp.gate_proj.bias
    activated = mlp.act_fn(layer.gate)
    if options.rule == "taylor":
        slope = torch.where(layer.gate == 0, torch.zeros_like(activated), activated / layer.gate)
        neurons = gates * slope * layer.up
    elif options.rule == "half":
        ups = torch.stack([c @ mlp.up_proj.weight.T for c in normed])
        if bias is not None and mlp.up_proj.bias is not None:
            ups[bias] += mlp.up_proj.bias
        slope = torch.where(layer.gate == 0, torch.zeros_like(activated), activated / layer.gate)
        neurons = 0.5 * gates * slope * layer.up + 0.5 * activated * ups
    else:
        neurons = shares(gates, options) * activated * layer.up
    parts = [part @ mlp.down_proj.weight.T for part in neurons]
    if bias is not None and mlp.down_proj.bias is not None:
        parts[bias] = parts[bias] + mlp.down_proj.bias
    return parts


def shares(gates: Tensor, options: Options) -> Tensor:
    """The share `[m, n, i]` of every neuron that each component takes under a competing rule.

    Who competes at a position: the components whose gates there are not all exactly zero, without the first
    where it is excluded, unless it is the only one.
    """
    result = torch.zeros_like(gates)
    for n in range(gates.shape[1]):
        present = [m for m in range(len(gates)) if bool((gates[m, n] != 0).any())]
        competing = [m for m in present if not (options.exclude_first and m == 0 and n > 0)]
        competing = competing or present
        if competing:
            result[competing, n] = shares_of_competing(gates[competing, n], options)
    return result


def shares_of_competing(gates: Tensor, options: Options) -> Tensor:
    """The shares `[m, i]` of components that all compete, from their gates `[m, i]`."""
    winner = torch.zeros_like(gates).scatter(0, gates.argmax(0, keepdim=True), 1.0)
    if options.rule == "softmax":
        return torch.softmax(gates / options.temperature, 0)
    if options.rule == "max":
        return winner
    if options.rule == "relu":
        positive = gates.clamp(min=0)
        return torch.where(positive.sum(0) > 0, positive / positive.sum(0), winner)
    if options.rule == "linear":
        above = gates - gates.min(0).values
        return torch.where(above.sum(0) > 0, above / above.sum(0), 1 / len(gates))
    raise ValueError(options.rule)


def release_mlp_parts(layer: Layer, normed: list[Tensor], options: Options) -> list[Tensor]:
    """What the MLP of a block adds to each component, the remainder last, in the published code's steps."""
    mlp = layer.block.mlp
    gates = torch.stack([mlp.gate_proj(c) for c in normed])  # [m, n, i], with the gate's bias in each
    activated = mlp.act_fn(layer.gate)
    if options.rule == "taylor":
        share = gates / (layer.gate + 1e-8)
        return [mlp.down_proj(s * activated * layer.up) for s in share]  # with the bias in each
    if options.exclude_first:
        gates[0] = 0
    gates[0, 0] = 1
    gates[-1][gates[-1].abs() < 1e-5] = 0
    gates[-1][(gates == 0).all(0)] = 1
    share = release_shares(gates, options)
    return [s * activated * layer.up @ mlp.down_proj.weight.T for s in share]


def release_shares(gates: Tensor, options: Options) -> Tensor:
    """The published code's shares `[m, n, i]`, where a gate of exactly zero means an absent component."""
    absent = gates == 0
    if options.rule == "softmax":
        return torch.softmax((gates / options.temperature).masked_fill(absent, -torch.inf), 0)
    if options.rule == "relu":
        positive = gates.clamp(min=0)
        return positive / (positive.sum(0) + 1e-6)
    if options.rule == "max":
        winner = gates.masked_fill(absent, -torch.inf).argmax(0)
        return torch.zeros_like(gates).scatter(0, winner[None], 1.0)
    if options.rule == "linear":
        above = gates - gates.min(0).values
        complete = above / (above.sum(0) + 1e-6)
        alone = (~absent & ((~absent).sum(0) == 1)).to(gates.dtype)
        return torch.where(absent.any(0), alone, complete)
    raise ValueError(options.rule)


@torch.no_grad()
def read(trace: Trace, components: Tensor) -> Tensor:
    """The components `[m, n, d]` after the frozen final norm."""
    norm = trace.model.model.norm
    return torch.stack([frozen_norm(norm, trace.final, component) for component in components])


@torch.no_grad()
def scores(trace: Trace, components: Tensor, position: int, token: int, foil: int | None = None) -> Tensor:
    """The components' scores `[m]` for a token's logit, or for the difference between it and a foil's."""
    unembedding = trace.model.lm_head.weight
    direction = unembedding[token] - (unembedding[foil] if foil is not None else 0)
    return read(trace, components)[:, position] @ direction
