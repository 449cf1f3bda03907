"""Attention's control path: how a target depends on queries and keys (Jantsch et al., arXiv 2603.19742).

Attention moves values by probabilities held fixed, and its queries and keys choose these: with the values
`v` held fixed and `g` a target's derivative with respect to a head's output, the derivative with respect to
the score of query `n` for key `k` is `A[n,k] (g[n] . v[k] - sum_j A[n,j] g[n] . v[j])`, and queries and keys
share the scores.

1. Call the block's own attention once more as the model called it, with gradients, its values detached.
   So rotary positions, windows, grouped heads and scales need no second implementation. Probabilities are
   recomputed for some queries at a time (`engine/mixture.py`).
2. Hold norms on queries and keys fixed at their recorded scale, as all norms are.
3. Take the derivative with respect to the normed state, and what the queries' and keys' biases add.

A rule with a weight for even attention takes the softmax's mean derivative instead of the one at the recorded
scores (`engine/score_path.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.engine.frozen import AttentionCall, FrozenAttention
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.engine.mixture import (
    RECORDED,
    DenseMixture,
    Listener,
    ScoredMixture,
    implementation,
    listening,
)
from depass_lightning.engine.norms import FrozenNorm, NormParameters
from depass_lightning.engine.score_path import OneSide, ScorePath, Side
from depass_lightning.errors import DePassError
from depass_lightning.models.affine import Projection, bias_of, features, has_bias
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.sharding import gathered

ADDED = ("attention_mask", "alibi")  # arguments that attention adds to its scores


@dataclass(frozen=True)
class ScoreGradient:
    """A target's derivative through a block's attention scores.

    Args:
        normed: with respect to the normed state that attention reads.
        constants: what the biases of queries and keys (not the norm's) add to the target; with the mean
            derivative, also everything else that is constant in scores.
        uniform: the even mixture over what each query sees, for the mean derivative of eager attention.
    """

    normed: Float[Tensor, "batch position hidden"]
    constants: Float[Tensor, "batch"]
    uniform: Float[Tensor, "batch head query key"] | None


def through_scores(
    decoder: Decoder,
    attention: FrozenAttention,
    outputs: Sequence[Float[Tensor, "batch position hidden"]],
    *,
    mean: bool = False,
) -> list[ScoreGradient]:
    """Propagate targets' derivatives back through a block's attention scores, in the model's precision.

    Queries and keys are not linear together: along this path alone a state's product with its derivative
    counts each score twice, once by its query and once by its key.

    Args:
        decoder: the model.
        attention: the block's frozen attention.
        outputs: each target's derivative with respect to what attention adds to the residual stream.
        mean: take the softmax's mean derivative on the line from zero scores.

    Raises:
        DePassError: a norm inside attention is neither an RMSNorm nor a LayerNorm, or the mean derivative
            cannot be taken.
    """
    with _called(decoder, attention, outputs[0], mean=mean) as call:
        return [call.pull(call.result, call.gradient(output)) for output in outputs]


def through_scores_in_parts(
    decoder: Decoder,
    attention: FrozenAttention,
    output: Float[Tensor, "batch position hidden"],
    parts: Sequence[Float[Tensor, "#batch #position head"]],
    side: Side,
    *,
    mean: bool = False,
) -> list[ScoreGradient]:
    """Propagate parts of a target's derivative back through a block's queries alone, or its keys alone.

    Args:
        decoder: the model.
        attention: the block's frozen attention.
        output: the target's derivative with respect to what attention adds to the residual stream.
        parts: factors for the derivative with respect to each head's mixed values, one set for each part.
        side: `query` or `key`; the other one is held fixed.
        mean: as for `through_scores`. Half of what is constant in scores is counted on each side.

    Raises:
        DePassError: as for `through_scores`, or attention does not multiply queries and keys in one product.
    """
    with _called(decoder, attention, output, mean=mean, side=side) as call:
        (gradient,) = torch.autograd.grad(call.result, call.mixed, call.gradient(output), retain_graph=True)
        by_head = gradient.unflatten(-1, (attention.heads, -1))
        return [
            call.pull(call.mixed[0], (by_head * part[..., None].to(by_head)).flatten(-2)) for part in parts
        ]


@dataclass
class _Call:
    """One call of a block's attention with gradients."""

    call: AttentionCall
    like: Tensor  # has the precision and device of derivatives
    result: Tensor
    mixed: list[Tensor]  # what the output map read
    normed: Tensor
    biases: list[tuple[Tensor, Tensor]]
    uniform: Tensor | None

    def gradient(self, output: Float[Tensor, "batch position hidden"]) -> Tensor:
        """Propagate a derivative from the residual stream back through a norm on attention's output."""
        return _ordinary(self.call.before_post_norm(output).to(self.result))

    def pull(self, values: Tensor, gradient: Tensor) -> ScoreGradient:
        """Propagate a derivative from what the call computed back to the normed state and the constants."""
        leaves = [self.normed, *(leaf for leaf, _ in self.biases)]
        back, *others = torch.autograd.grad(
            values, leaves, gradient, materialize_grads=True, retain_graph=True
        )
        constants = self.like.new_zeros(len(self.like))
        for (_, bias), by_bias in zip(self.biases, others, strict=True):
            added = _products(by_bias, bias, len(constants), constants.dtype)
            constants = constants + added.to(constants.device)
        return ScoreGradient(back.to(self.like), constants, self.uniform)


@contextmanager
def _called(
    decoder: Decoder, attention: FrozenAttention, like: Tensor, *, mean: bool, side: Side | None = None
) -> Iterator[_Call]:
    """Call a block's attention as the model called it, with gradients through its scores alone."""
    with (
        undisturbed(decoder.model, attention=implementation(decoder)),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        ExitStack() as stack,
    ):
        call, attending = attention.call, attention.call.block.attention
        stack.enter_context(gathered(attending.module))
        biases: list[tuple[Tensor, Tensor]] = []
        mixed: list[Tensor] = []
        for module, hook in _hooks(call, like.dtype, biases):
            stack.callback(module.register_forward_hook(hook).remove)
        if side is not None:
            keep = attending.output.module.register_forward_pre_hook(
                lambda _module, arguments: mixed.append(arguments[0])
            )
            stack.callback(keep.remove)
        projected: list[Tensor] = []  # attention's output, before any norm that its module has
        after = attending.output.module.register_forward_hook(lambda *seen: projected.append(seen[2]))
        stack.callback(after.remove)
        arguments, keywords, normed = _from_normed(call)
        bias = keywords.get("position_bias")
        causal = decoder.causal
        path = ScorePath(attending.module, attention.heads, bias, causal=causal) if mean else None
        stack.enter_context(listening(attending.mixing, _with_gradient(path, side)))
        # Eager attention multiplies queries and keys in its forward method.
        one_side = (
            None if side is None or implementation(decoder) == RECORDED else OneSide(attending.module, side)
        )
        added = [] if path is None else _added_to_scores(keywords, len(like))
        with path or nullcontext(), one_side or nullcontext():
            attending.module(*arguments, **keywords)
        (result,) = projected
        if path is not None:
            _check_mean(path, attention)
            # A product is counted by its query and by its key, so with both sides its constants are doubled.
            once = 2 if side is None else 1
            biases += [(leaf, once * constant) for leaf, constant in (*path.constants, *added)]
        if one_side is not None and (one_side.products != 1 or len(mixed) != 1):
            raise DePassError(
                f"queries and keys cannot be separated: {type(attending.module).__name__} of "
                f"block {call.block.index} does not multiply them in one product; take rule='half'"
            )
        uniform = None if path is None or path.uniform is None else path.uniform.to(like)
        yield _Call(call, like, result, mixed, normed, biases, uniform)


def _with_gradient(path: ScorePath | None, side: Side | None) -> Listener:
    """Return a listener that mixes values so that derivatives reach queries, keys and sinks.

    Args:
        path: computes the softmax's mean derivative; None for its derivative.
        side: the side that keeps its derivative; None for both.
    """

    def mix(mixture: ScoredMixture, values: Tensor) -> Tensor:
        sinks = None
        if mixture.sinks is not None:
            constant = mixture.sinks.detach().view(1, -1, 1, 1).expand(len(values), -1, -1, -1)
            sinks = torch.zeros_like(constant, requires_grad=True)
            if path is not None:
                path.constants.append((sinks, constant))
        added, mask = None, mixture.mask
        if path is not None and mask is not None and mask.is_floating_point():
            added = torch.zeros(
                len(values), 1, 1, 1, dtype=mask.dtype, device=mask.device, requires_grad=True
            )
            path.constants.append((added, torch.ones_like(added)))
        if side is not None:
            fixed = "key" if side == "query" else "query"
            mixture = replace(mixture, **{fixed: getattr(mixture, fixed).detach()})
        return mixture.with_gradient(values, sinks, added, path)

    return mix


def _added_to_scores(keywords: dict[str, Any], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Make what a call adds to its scores (a mask, ALiBi's slopes) differentiable, for each prompt."""
    added = []
    for name in ADDED:
        value = keywords.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.expand(batch, *value.shape[1:]) if len(value) == 1 else value
            leaf = torch.zeros_like(value, requires_grad=True)
            keywords[name] = value + leaf
            added.append((leaf, value))
    return added


def _products(gradient: Tensor, constant: Tensor, batch: int, dtype: torch.dtype) -> Float[Tensor, "batch"]:
    """A constant times its derivative; what a mask hides has none, however low the mask is."""
    constant = torch.where(gradient == 0, 0, constant).to(dtype)
    return (gradient.to(dtype) * constant).reshape(batch, -1).sum(1)


def _check_mean(path: ScorePath, attention: FrozenAttention) -> None:
    """Refuse an attention whose softmax was not seen."""
    mixture = attention.mixture
    unseen = isinstance(mixture, DenseMixture) and (
        path.uniform is None or path.uniform.shape != mixture.matrix.shape
    )
    if unseen or attention.call.block.attention.scaled_heads:  # sinks outside of the softmax
        kind = type(attention.call.block.attention.module).__name__
        raise DePassError(
            f"rule='shap' is not exact here: {kind} of block {attention.call.block.index} does not take one "
            "softmax over its scores by torch's own function; take rule='half'"
        )


Hook = Callable[[nn.Module, Any, Tensor], Tensor]


def _hooks(
    call: AttentionCall, dtype: torch.dtype, biases: list[tuple[Tensor, Tensor]]
) -> list[tuple[nn.Module, Hook]]:
    """What holds values and inner norms fixed, and leaves a gradient at every other bias in `biases`."""
    parts = call.block.attention
    kept = _outside_values(parts.value)

    def detached(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if kept is None:
            return output.detach()
        mask = kept.to(output.device)
        if has_bias(module):
            output = at_bias(module, arguments, output)
        return torch.where(mask, output, output.detach())

    def without_gates(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        assert parts.gate is not None
        queries, fixed = _outside_values(parts.gate), output.detach()
        return fixed if queries is None else torch.where(queries.to(output.device), output, fixed)

    def at_bias(module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(output, requires_grad=True)
        biases.append((leaf, bias_of(module, dtype).to(output.device)))
        return output + leaf

    def held(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.detach()

    hooks: list[tuple[nn.Module, Hook]] = []
    if parts.value_norm is not None:  # the map before it may be that of the keys
        hooks.append((parts.value_norm, held))
    within = None
    for name, module in parts.module.named_modules():
        weight = getattr(module, "weight", None)
        if (within is not None and name.startswith(within)) or not isinstance(weight, Tensor):
            continue
        within = f"{name}."  # a layer with adapters is one layer
        if module is parts.value.module and parts.value_norm is None:
            hooks.append((module, detached))
        elif module is not parts.output.module:
            if weight.ndim == 1:
                hooks.append((module, _frozen(module, weight, dtype, f"block {call.block.index}: {name}")))
            if has_bias(module):
                hooks.append((module, at_bias))
            if parts.gate is not None and module is parts.gate.module:
                hooks.append((module, without_gates))
    return hooks


def _outside_values(value: Projection) -> Tensor | None:
    """Which outputs of the value map's module are not values; None if all are."""
    if value.rows is None:
        return None
    mask = torch.ones(features(value.module)[1], dtype=torch.bool)
    mask[value.rows] = False
    return mask


def _frozen(norm: nn.Module, weight: Tensor, dtype: torch.dtype, name: str) -> Hook:
    """Replace a norm's output by the same from its scale held fixed."""
    with torch.no_grad():
        probe = NormParameters.of(norm, norm, len(weight), weight.dtype, dtype)

    def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = arguments[0]
        scale = FrozenNorm.fit(probe, states.detach(), output.detach(), name).scale
        linear = probe.direction(states.to(dtype)) * scale[..., None]
        return (linear if probe.bias is None else linear + probe.bias).to(output.dtype)

    return hook


def _from_normed(call: AttentionCall) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The call's arguments with the normed state, which comes first or by its name, as a leaf."""
    arguments, keywords = _ordinary(call.arguments), _ordinary(call.keywords)
    states, attention = arguments[0] if arguments else keywords.get("hidden_states"), call.block.attention
    # BERT's pre-norm variants have the norm inside: their attention is called with the state before it.
    if not isinstance(states, Tensor) or any(part is attention.norm for part in attention.module.modules()):
        raise DePassError(
            f"block {call.block.index}: {type(attention.module).__name__} is not called with the normed "
            "state first or as hidden_states, so that queries and keys cannot be followed; take rule='half'"
        )
    normed = states.detach().requires_grad_()
    if not arguments:
        return arguments, keywords | {"hidden_states": normed}, normed
    # CTRL's attention is called with the same state for queries, keys and values.
    same = [argument is call.arguments[0] for argument in call.arguments]
    return tuple(normed if it else other for it, other in zip(same, arguments, strict=True)), keywords, normed


def _ordinary(value: Any) -> Any:
    """The same with tensors made in inference mode, which no gradient can pass, copied."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_ordinary, value))
    if isinstance(value, dict):
        return {key: _ordinary(entry) for key, entry in value.items()}
    return value
