"""Record one plain forward pass and leave the model exactly as it was found.

1. Put the model into evaluation mode, eager attention, outside autocast (`isolation.py`); all of it is undone
   afterwards, also on an exception.
2. Run it once with hooks on every block that keep the norms' inputs and outputs, the attention
   probabilities, the pre-activations and the neurons.
3. Where keeping these for all blocks would not fit, keep only each block's input and run a block again
   when it is asked for.
"""

from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from depass_lightning.engine.freeze import BlockNorms, freeze
from depass_lightning.engine.frozen import AttentionCall, FrozenBlock
from depass_lightning.engine.hooks import Capture
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.engine.mixture import RECORDED, implementation, listening
from depass_lightning.engine.norms import FrozenNorm, NormParameters
from depass_lightning.errors import DePassError
from depass_lightning.models.affine import Projection
from depass_lightning.models.block import Block
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.experts import ExpertsUp
from depass_lightning.models.sharding import gathered, whole


@dataclass
class Recording:
    """One recorded pass over a batch of right-padded prompts.

    Args:
        decoder: the model that was run.
        input_ids: `[batch, position]`.
        lengths: `[batch]` real positions of each prompt.
        logits: the model's logits at each of `kept`, as the model itself gives them.
        uncapped: the same before a soft cap, which is what scores sum to.
        kept: the positions of `logits`.
        final_state: what the last block leaves in the residual stream.
        final_norm: the frozen norm before the unembedding.
        dtype: the precision of everything frozen.
    """

    decoder: Decoder
    input_ids: Int[Tensor, "batch position"]
    lengths: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch kept vocabulary"]
    uncapped: Float[Tensor, "batch kept vocabulary"]
    kept: list[int]
    final_state: Float[Tensor, "batch position hidden"]
    final_norm: FrozenNorm
    dtype: torch.dtype
    _captures: list[Capture]
    _probes: list[BlockNorms]

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self._captures)

    def state(self, layer: int) -> Float[Tensor, "batch position hidden"]:
        """The model's residual stream that enters a block; `layer == layers` is what leaves the last one."""
        if layer == self.layers:
            return self.final_state
        return self._captures[layer].entered.to(self.final_state)

    def block(self, layer: int) -> FrozenBlock:
        """Freeze one block, running it again where only its input was kept.

        A block of a model that is spread over several devices is frozen where it computes, and brought to
        where the token ids are.

        Raises:
            DePassError: the block's attention gives no probabilities, or a norm is of an unknown kind.
        """
        block, capture = self.decoder.blocks[layer], self._captures[layer]
        if not capture.everything:
            capture = self._replay(block, capture)
        state = capture.entered.to(capture.left.device, self.dtype)
        with gathered(block.module):
            frozen = freeze(block, capture, state, self._probes[layer])
        return brought(frozen, self.final_state.device)

    def _replay(self, block: Block, kept: Capture) -> Capture:
        capture = Capture(everything=True, mixed_values=[*kept.mixed_values])
        with undisturbed(self.decoder.model, attention=implementation(self.decoder)), ExitStack() as stack:
            stack.enter_context(listening(block.attention.mixing, capture.mix))
            for handle in capture.hooks(block):
                stack.callback(handle.remove)
            block.module(*kept.arguments, **kept.keywords)
        return capture


def brought(value: Any, device: torch.device) -> Any:
    """Bring what is frozen to a device, except the arguments with which the model called its own modules."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, AttentionCall):
        norms = (brought(norm, device) for norm in (value.norm, value.post_norm))
        return replace(value, **dict(zip(("norm", "post_norm"), norms, strict=True)))
    if isinstance(value, Projection | ExpertsUp):
        return replace(value, device=device)
    if isinstance(value, tuple):
        return tuple(brought(item, device) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(
        value, **{field.name: brought(getattr(value, field.name), device) for field in fields(value)}
    )


def recorded_bytes(decoder: Decoder, batch: int, positions: int) -> int:
    """Estimate the bytes that a full recording of a batch holds."""
    hidden, neurons = decoder.hidden_size, decoder.neurons
    # Queries and keys, or the probabilities.
    mixture = 2 * hidden if implementation(decoder) == RECORDED else decoder.heads * positions
    per_position = mixture + 2 * neurons + 4 * hidden
    return len(decoder.blocks) * batch * positions * per_position * decoder.model_dtype.itemsize


def record(
    decoder: Decoder,
    input_ids: Int[Tensor, "batch position"],
    lengths: Int[Tensor, "batch"],
    positions: Int[Tensor, "*any"],
    *,
    keep_everything: bool = True,
) -> Recording:
    """Run the model once, unchanged, and keep what a decomposed pass holds fixed.

    Args:
        decoder: the model.
        input_ids: `[batch, position]`, padded on the right.
        lengths: `[batch]` real positions of each prompt.
        positions: every position at which logits are wanted, in any shape.
        keep_everything: keep all blocks' frozen quantities; else only their inputs, at the cost of a
            second pass.

    Raises:
        DePassError: a block's output is not finite; it is named, and so is a parameter that is not.
    """
    captures = [Capture(everything=keep_everything) for _ in decoder.blocks]
    final: dict[str, tuple[Tensor, Tensor]] = {}

    def keep_final(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        final["norm"] = (arguments[0], output)

    with undisturbed(decoder.model, attention=implementation(decoder)):
        probes, final_probe = _probe_norms(decoder)
        with ExitStack() as stack:
            for block, capture in zip(decoder.blocks, captures, strict=True):
                stack.enter_context(listening(block.attention.mixing, capture.mix))
                for handle in capture.hooks(block):
                    stack.callback(handle.remove)
            if decoder.final_norm is not None:
                stack.callback(decoder.final_norm.register_forward_hook(keep_final).remove)
            logits, uncapped, kept = decoder.logits(input_ids, positions)
        real = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        _check_finite(decoder, captures, real)
        _check_logits(decoder, uncapped[real[:, kept].to(uncapped.device)])
        home = input_ids.device
        final_state = captures[-1].left.to(home, decoder.dtype)
        final_norm = FrozenNorm.nothing(final_state)
        if final_probe is not None:
            states, normed = final["norm"]
            norm = FrozenNorm.fit(final_probe, states.to(normed.device), normed, "the final norm")
            final_norm = brought(norm, home)
    return Recording(
        decoder=decoder,
        input_ids=input_ids,
        lengths=lengths,
        logits=logits.to(home),
        uncapped=uncapped.to(home),
        kept=kept,
        final_state=final_state,
        final_norm=final_norm,
        dtype=decoder.dtype,
        _captures=captures,
        _probes=probes,
    )


def _probe_norms(decoder: Decoder) -> tuple[list[BlockNorms], NormParameters | None]:
    like = decoder.hidden_size, decoder.model_dtype, decoder.dtype
    blocks = [BlockNorms.of(block, *like) for block in decoder.blocks]
    if decoder.final_norm is None:
        return blocks, None
    return blocks, NormParameters.of(decoder.final_norm, decoder.blocks[-1].attention.module, *like)


def _check_finite(decoder: Decoder, captures: list[Capture], real: Tensor) -> None:
    """Name the first block whose output is not finite at a real position."""
    for block, capture in zip(decoder.blocks, captures, strict=True):
        if not bool(torch.isfinite(capture.entered[real.to(capture.entered.device)]).all()):
            raise DePassError(
                f"the state that enters block {block.index} is not finite; check the embedding's weights"
            )
        if bool(torch.isfinite(capture.left[real.to(capture.left.device)]).all()):
            continue
        broken = [
            name
            for name, value in block.module.named_parameters()
            if not bool(torch.isfinite(whole(value)).all())
        ]
        culprit = (
            f"its parameter '{broken[0]}' is not" if broken else "its parameters are: activations overflow"
        )
        raise DePassError(
            f"block {block.index} gives values that are not finite; {culprit}. "
            "Restore an earlier checkpoint, or load the model in float32"
        )


def _check_logits(decoder: Decoder, logits: Float[Tensor, "row vocabulary"]) -> None:
    """Name the tokens whose logits are not numbers; minus infinity only rules a token out."""
    broken = (logits.isnan() | (logits == torch.inf)).any(0).nonzero()[:, 0].tolist()
    if broken:
        some = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        raise DePassError(
            f"the unembedding gives {len(broken)} of {logits.shape[1]} tokens a logit that is NaN or "
            f"infinite (token {some}), though the states that it reads are finite; check the rows of these "
            f"tokens in the weights of {type(decoder.model).__name__}'s unembedding"
        )
