"""What a model's own rounding adds to the residual stream: a component of its own, so that sums stay exact.

A model in half precision, or a quantised one, rounds what each block adds. Components are carried in a finer
precision, so their sum leaves the recorded states by as much. That difference belongs to no component:

1. at each block, take the recorded output less what the frozen block gives for the recorded input;
2. propagate it through attention, as any component is, and under a linear rule through the MLPs too; under a
   competing rule it takes no share of any neuron, or something next to nothing would get an even share.

It is found from the plain states alone, so that it adds up with the components only if these are right.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.engine.adjoint import BlockGradients, TargetGradient, backward
from depass_lightning.engine.frozen import FrozenBlock, FrozenMLP
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.mlp import linear_paths
from depass_lightning.engine.norms import past
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import CompetingRule, Rule
from depass_lightning.models.affine import AffineMap


class _AttentionOnly(LinearPaths):
    """Nothing goes through an MLP."""

    name = "attention only"

    def __init__(self) -> None:
        super().__init__(gate=0.0, up=0.0, value=1.0, control=0.0)


class RoundingScores:
    """What the rounding error of each block and all later ones adds to targets, from the last block down.

    Attributes:
        sums: for each block the sums from there to the targets `[batch, target]`, where components begin
            before its MLP and where they start after it.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.sums: dict[int, tuple[Float[Tensor, "batch target"], Float[Tensor, "batch target"]]] = {}

    def add(self, gradients: Sequence[BlockGradients]) -> None:
        """Add one block."""
        block = gradients[0].block
        rounded = _rounded(block, self.rule)
        scores = torch.stack([(target.resid_post.states * rounded).sum((1, 2)) for target in gradients], 1)
        later = self.sums[block.index + 1][0] if block.index + 1 in self.sums else torch.zeros_like(scores)
        self.sums[block.index] = (later + scores, later)

    def sweep(
        self, recording: Recording, targets: Sequence[TargetGradient], *, layer: int, first: int
    ) -> None:
        """Add all blocks by a backward pass, if components were propagated forward.

        Args:
            recording: the recorded pass.
            targets: each target's derivative with respect to the state that enters block `layer`.
            layer: where the targets are read.
            first: the first block that is wanted.
        """
        paths = self.rule if isinstance(self.rule, LinearPaths) else _AttentionOnly()
        for gradients in backward(recording, paths, targets, layer=layer, first=first):
            self.add(gradients)


def rounding_states(
    recording: Recording, rule: Rule, starts: Sequence[int], *, after_mlp: bool, stop: int
) -> Float[Tensor, "batch start position hidden"]:
    """What rounding from each of some blocks on has added to the state at a layer."""
    states = [torch.zeros_like(recording.final_state) for _ in starts]
    for index in range(min(starts), stop):
        block = recording.block(index)
        added = _rounded(block, rule)
        for row, start in enumerate(starts):
            if start < index + (not after_mlp):
                states[row] = _through(block, rule, states[row]) + added
    return torch.stack(states, 1)


def summed_gates(
    block: FrozenBlock, rounded: Float[Tensor, "batch position hidden"], rule: CompetingRule
) -> tuple[Float[Tensor, "batch position neuron"], Float[Tensor, "batch position hidden"]]:
    """What the gates of all components sum to in a block, which rounding keeps from the recorded ones.

    Returns:
        The sum, and what rounding has added to the state that leaves the block.
    """
    resid_mid = _after_attention(block, rounded)
    read = block.resid_pre - rounded if block.parallel else block.resid_mid - resid_mid
    mlp = block.mlp
    gates = _read(mlp, mlp.gate, read, mlp.norm.constant_through(mlp.gate))
    return gates, past(mlp.skip, resid_mid) + _rounded(block, rule)


def _rounded(block: FrozenBlock, rule: Rule) -> Float[Tensor, "batch position hidden"]:
    """The recorded output of a block less what the frozen block gives for its input."""
    left = block.resid_post - past(block.mlp.skip, block.resid_mid)
    if isinstance(rule, CompetingRule):
        return left - block.mlp_output
    # The neurons as the rule's slopes give them, which rounding has moved too.
    read = block.resid_pre if block.parallel else block.resid_mid
    mlp = _through_slopes(block, rule, read, constants=True)
    return left - (mlp if block.mlp.bias_terms is None else mlp + block.mlp.bias_terms)


def _through(block: FrozenBlock, rule: Rule, states: Tensor) -> Tensor:
    """A component through a block."""
    resid_mid = _after_attention(block, states)
    skipped = past(block.mlp.skip, resid_mid)
    if isinstance(rule, CompetingRule):
        return skipped
    return skipped + _through_slopes(block, rule, states if block.parallel else resid_mid, constants=False)


def _after_attention(block: FrozenBlock, states: Tensor) -> Float[Tensor, "batch position hidden"]:
    """A component through a block's attention."""
    values, _ = block.attention.head_values(states)
    return past(block.attention.skip, states) + values.flatten(2) @ block.attention.output.weight.T


def _through_slopes(block: FrozenBlock, rule: LinearPaths, states: Tensor, *, constants: bool) -> Tensor:
    """The MLP's output for a state under a linear rule, with the constants of its maps or without."""
    mlp, total = block.mlp, torch.zeros_like(block.mlp.activations)
    for linear, slopes in linear_paths(mlp, rule.for_block(block.index)):
        constant = mlp.norm.constant_through(linear) if constants else None
        total += _read(mlp, linear, states, constant) * slopes
    return total @ mlp.down.weight.T


def _read(
    mlp: FrozenMLP, linear: AffineMap, states: Tensor, constant: Tensor | None
) -> Float[Tensor, "batch position neuron"]:
    values = mlp.norm(states.flatten(0, 1), mlp.norm.scale.flatten()) @ linear.weight.T
    return values.view(*states.shape[:2], -1) + (0 if constant is None else constant)
