"""Check a family's declaration against a model, by one short pass, before anything is attributed.

A declaration that names the wrong parts may still give components that sum to the state: sums alone do not
distinguish the gate map from the up map. So each part is checked separately:

1. the attention that is recorded gives the same logits as the model's implementation;
2. every norm is an RMSNorm or a LayerNorm (`FrozenNorm.fit`);
3. a block's input plus the outputs of its frozen attention and MLP is the block's output (through the norms
   on the residual stream itself, where there are any);
4. no token's attention reads later tokens, unless the family is declared as an encoder;
5. the gate map gives the recorded pre-activations, an activation function reads these, and its output times
   the up map's output is the recorded activations.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from depass_lightning.engine.frozen import FrozenBlock
from depass_lightning.engine.isolation import alone, undisturbed
from depass_lightning.engine.norms import past
from depass_lightning.engine.record import Recording, record
from depass_lightning.errors import DePassError
from depass_lightning.models.block import Block
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.families import (
    FAMILIES,
    declared_families,
    families_of_class,
    supported_model_types,
)
from depass_lightning.models.spec import FamilySpec
from depass_lightning.models.unwrapping import unwrapped

logger = logging.getLogger(__name__)

LENGTH = 8  # tokens of the pass that checks a model


def bind_checked(model: nn.Module, **options: Any) -> Decoder:
    """Bind a model to its family's declaration, and check that the declaration describes it.

    Args:
        model: a causal language model of transformers, or of a class that is declared.
        options: `compute_dtype` and `max_positions`, see `Decoder`.

    Raises:
        DePassError: the architecture is not supported, or the declaration does not describe this model; the
            message names the block, the sublayer and the error.
    """
    declared = families_of_class(unwrapped(model)) or declared_families(Decoder.config_of(model))
    if not declared:
        kind: Any = Decoder.config_of(model).model_type
        spec, recomputes = _discovered(model, kind)
        return Decoder(model, spec, recomputes=recomputes, **options)
    _, recomputes = _validated(model, declared[0])
    return Decoder(model, declared[0], recomputes=recomputes, **options)


def _validated(model: nn.Module, spec: FamilySpec) -> tuple[float, bool]:
    """Check a declaration; return its error, and whether attention is recomputed rather than eager."""
    decoder = Decoder(model, spec)
    if decoder.recomputes:
        try:
            return validate(decoder), True
        except DePassError:  # its attention may do more than its recorded scores show
            decoder = Decoder(model, spec, recomputes=False)
    return validate(decoder), False


def _discovered(model: nn.Module, kind: str) -> tuple[FamilySpec, bool]:
    """Try every declaration on a model whose type has none."""
    tried: dict[str, str] = {}
    for family in FAMILIES:
        if family.model is not None:
            continue
        for parallel in (family.parallel, not family.parallel):
            spec = replace(family, model_types=(kind,), parallel=parallel)
            try:
                error, recomputes = _validated(model, spec)
            except DePassError as refused:
                tried.setdefault(family.names[0], str(refused))
                continue
            logger.warning(
                "model type '%s' has no declaration; its blocks are built like those of '%s'%s (checked: its "
                "blocks' sums are right to %.0e)",
                kind,
                family.names[0],
                "" if parallel == family.parallel else f", attention and MLP {_order(parallel)}",
                error,
            )
            return spec, recomputes
    closest = next((f"; as '{name}': {why}" for name, why in tried.items() if "no submodule" not in why), "")
    raise DePassError(
        f"model type '{kind}' is not supported: no family declares it, and none of the known ones describes "
        f"its blocks{closest}. Supported: {', '.join(supported_model_types())}; others can be declared with "
        "depass_lightning.register_family"
    )


def _order(parallel: bool) -> str:
    return "in parallel" if parallel else "sequential"


def validate(decoder: Decoder) -> float:
    """Check a bound declaration by one short pass of the model.

    Returns:
        The largest error of a block's sum, relative to what the block adds.

    Raises:
        DePassError: the declaration does not describe the model; the message names the block, the sublayer
            and the error.
    """
    length = min(LENGTH, decoder.max_positions or LENGTH)
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.vocabulary_size, (1, length), generator=numbers).to(decoder.device)
    last = torch.tensor([[length - 1]], device=decoder.device)
    head = decoder.head
    if head.kind == "sequence":
        last[:] = head.position_of(ids[0].tolist())
    with alone(decoder.model):
        with undisturbed(decoder.model, attention=None):
            expected, _, _ = decoder.logits(ids, last)
            if head.labels:
                _check_labels(decoder, ids, expected[:, 0], last)
        with _activations(decoder) as activations:
            recording = record(decoder, ids, torch.tensor([length], device=decoder.device), last)
        limit = tolerance(decoder)
        error = _distance(recording.logits, expected)
        _expect(error, limit, "the attention that is recorded gives other logits than the model's")
        _check_readout(decoder, recording, limit)
        worst = 0.0
        for block in decoder.blocks:
            worst = max(worst, _check_block(decoder, recording, block, activations[block.index], limit))
    return worst


def tolerance(decoder: Decoder) -> float:
    """The relative error that a correct declaration may have in the model's precision."""
    exact_weights = decoder.model_dtype in (torch.float32, torch.float64)
    return 1e-3 if exact_weights and not decoder.quantised else 1e-1


def _check_labels(decoder: Decoder, ids: Tensor, logits: Tensor, position: Tensor) -> None:
    """Check that a classifier reads its labels at the position and with the map of its output head."""
    whole = decoder.model(input_ids=ids).logits  # [1, label], or [1, position, label]
    expected = whole if decoder.head.kind == "sequence" else whole[:, position[0, 0]]
    name = type(decoder.model).__name__
    _expect(
        _distance(logits, expected),
        tolerance(decoder),
        f"{name} gives other logits than its map to the labels reads from the last hidden state at position "
        f"{int(position)}",
    )


def _check_block(
    decoder: Decoder, recording: Recording, block: Block, activations: "_Activations", limit: float
) -> float:
    """Check one block's sum and its gate map, and return the error of the sum."""
    frozen = recording.block(block.index)
    name = f"block {block.index} of {type(decoder.model).__name__}"
    leaving = recording.state(block.index + 1)
    difference = leaving - past(frozen.mlp.skip, frozen.resid_mid) - frozen.mlp_output
    _check_gate(frozen, block, activations, limit, name)
    if decoder.causal and bool(frozen.attention.probabilities.triu(1).any()):
        raise DePassError(
            f"{name}: attention reads later tokens, but its family is declared as causal; declare it as an "
            "encoder (causal=) with depass_lightning.register_family"
        )
    # The model rounds the residual stream, which may be far larger than what a block adds.
    grain = torch.finfo(decoder.model_dtype).eps
    stream = frozen.resid_pre.norm(dim=-1) + frozen.resid_post.norm(dim=-1)
    added = (leaving - frozen.resid_pre).norm(dim=-1)
    error = float((difference.norm(dim=-1) / (added + stream * grain / limit)).max())
    if not error <= limit:
        # Report attention's error separately, so that the message shows which sublayer is wrong.
        alone = _distance(frozen.attention_output, frozen.attention_output + difference)
        raise DePassError(
            f"{name} does not add up as its family's declaration says: attention and MLP "
            f"{_order(block.parallel)} give its output up to {error:.1e} (attention's part alone is off by "
            f"{alone:.1e}); declare it with depass_lightning.register_family"
        )
    return error


def _check_gate(
    frozen: FrozenBlock, block: Block, activations: "_Activations", limit: float, name: str
) -> None:
    """Check that the gate map gives what the activation function reads, and the up map the other factor."""
    mlp = frozen.mlp
    if block.mlp.absent:
        return
    read = frozen.resid_pre if frozen.parallel else frozen.resid_mid
    normed = mlp.norm(read.flatten(0, 1), mlp.norm.scale.flatten())
    constant = mlp.norm.constant_through(mlp.gate)
    gates = (normed @ mlp.gate.weight.T).view(*read.shape[:2], -1) + (0 if constant is None else constant)
    routed = (
        mlp.activations != 0 if block.mlp.experts is not None else torch.ones_like(gates, dtype=torch.bool)
    )
    error = _distance(gates[routed], mlp.pre_activations[routed])
    _expect(error, limit, f"{name}, MLP: the gate map does not give the pre-activations from what it reads")
    if block.mlp.dense is None or not activations.seen:
        return
    shape = mlp.pre_activations.shape
    outputs = [
        output.reshape(shape).to(gates)
        for read, output in activations.seen
        if read.numel() == mlp.pre_activations.numel()
        and _distance(read.reshape(shape).to(gates), mlp.pre_activations) < limit
    ]
    if not outputs:
        raise DePassError(
            f"{name}, MLP: no activation function reads what is declared as the gate's output; declare the "
            "map whose output goes into the activation, with depass_lightning.register_family"
        )
    neurons = outputs[0]
    if mlp.up is not None:
        neurons = neurons * torch.nn.functional.linear(mlp.normed.to(gates), mlp.up.weight, mlp.up.bias)
    recorded = activations.neurons.reshape(shape).to(gates)
    _expect(_distance(neurons, recorded), limit, f"{name}, MLP: activation times up map are not its neurons")


def _check_readout(decoder: Decoder, recording: Recording, limit: float) -> None:
    """Check that the final norm and the unembedding give the logits."""
    states = recording.final_state[:, recording.kept].flatten(0, 1)
    scale = recording.final_norm.scale[:, recording.kept].flatten()
    normed = recording.final_norm(states, scale)
    if recording.final_norm.probe.bias is not None:
        normed = normed + recording.final_norm.probe.bias
    rows, biases = decoder.readout(torch.arange(min(decoder.outputs, 256), device=normed.device))
    if rows.shape[1] != normed.shape[1]:
        raise DePassError(
            f"the unembedding of {type(decoder.model).__name__} reads {rows.shape[1]} numbers and its last "
            f"block gives {normed.shape[1]}; declare the map between them as final_projection"
        )
    logits = normed @ rows.T + biases
    expected = recording.uncapped.flatten(0, 1)[:, : len(rows)].to(logits)
    _expect(
        _distance(logits, expected),
        limit,
        f"the final norm and the unembedding of {type(decoder.model).__name__} do not give its logits",
    )


def _expect(error: float, limit: float, otherwise: str) -> None:
    if not error <= limit:
        raise DePassError(f"{otherwise} (error {error:.1e}); its family's declaration does not describe it")


def _distance(values: Tensor, expected: Tensor) -> float:
    expected = expected.to(values)
    # A token that is ruled out has the logit minus infinity on both sides.
    difference = torch.where(values == expected, 0, values - expected)
    scale = expected.where(expected.isfinite(), 0).norm()
    return float(difference.norm() / scale.clamp_min(torch.finfo(values.dtype).tiny))


@dataclass
class _Activations:
    """Inputs and outputs of an MLP's modules without weights, and the MLP's activations."""

    seen: list[tuple[Tensor, Tensor]]
    neurons: Tensor

    def keep(self, _module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
            self.seen.append((arguments[0], output))

    def down(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.neurons = arguments[0]


@contextmanager
def _activations(decoder: Decoder) -> Iterator[list[_Activations]]:
    """Record the inputs and outputs of every dense MLP's activation function."""
    watched = [_Activations([], torch.empty(0)) for _ in decoder.blocks]
    with ExitStack() as stack:
        for block, activations in zip(decoder.blocks, watched, strict=True):
            if block.mlp.dense is None:
                continue
            reader = block.mlp.dense.inner_norm or block.mlp.dense.reader
            stack.callback(reader.register_forward_pre_hook(activations.down).remove)
            for module in _elementwise(block):
                stack.callback(module.register_forward_hook(activations.keep).remove)
        yield watched


def _elementwise(block: Block) -> list[nn.Module]:
    """The leaf modules of a block's MLP that may be its activation function: no matrix, norm or dropout."""
    mixer = block.attention.module  # where attention and a state space are side by side, the block
    attention = set() if mixer is block.module else set(mixer.modules())
    norms = {block.attention.norm, block.attention.post_norm, block.mlp.norm, block.mlp.post_norm}
    return [
        module
        for module in block.mlp.module.modules()
        if not any(True for _ in module.children())
        and module not in attention
        and module not in norms
        and not isinstance(module, nn.Dropout | nn.Identity)
        and not any(parameter.ndim > 1 for parameter in module.parameters())
    ]
