"""Record one plain forward pass and leave the model exactly as it was found.

1. Put the model into evaluation mode, eager attention, outside autocast; all of it is undone
   afterwards, also on an exception.
2. Run it once with hooks on every block that keep the norms' inputs and outputs, the attention
   probabilities, the pre-activations and the neurons.
3. Where keeping these for all blocks would not fit, keep only each block's input and run a block again
   when it is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from depass_lightning.engine.frozen import (
    AttentionCall,
    FrozenAttention,
    FrozenBlock,
    FrozenMLP,
    FrozenNorm,
    NormProbe,
)
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Block, Decoder, linear_of


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own precision and without gradients, whatever surrounds it.

    Args:
        device: where the computation runs.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def undisturbed(decoder: Decoder) -> Iterator[None]:
    """Run the model for looking at: no dropout, no gradients, no autocast, eager attention; undone on
    leaving.

    Each module's training flag and each configuration's attention implementation are put back one by one,
    since a model may mix them.
    """
    training = [module for module in decoder.model.modules() if module.training]
    found = (getattr(module, "config", None) for module in decoder.model.modules())
    configs = {id(config): config for config in found if isinstance(config, PretrainedConfig)}
    implementations = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for module in training:
            module.training = False
        for config, _ in implementations:
            config._attn_implementation_internal = "eager"
        with exact(decoder.device):
            yield
    finally:
        for module in training:
            module.training = True
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation


@dataclass
class _Capture:
    """What the hooks of one block have seen."""

    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    state: Tensor | None = None
    result: Tensor | None = None
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attention_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    probabilities: Tensor | None = None
    pre_activations: Tensor | None = None
    neurons: Tensor | None = None

    def enter(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments, self.keywords = arguments, keywords
        self.state = arguments[0] if arguments else keywords["hidden_states"]

    def leave(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self.result = output[0] if isinstance(output, tuple) else output

    def norm(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.norms[name] = (arguments[0], output)

        return hook

    def call(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.attention_call = arguments, keywords

    def attention(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self.probabilities = output[1]

    def gate(self, _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        self.pre_activations = output

    def down(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.neurons = arguments[0]

    def hooks(self, block: Block, *, everything: bool) -> list[RemovableHandle]:
        """Hang this capture on a block; without `everything` it keeps the block's input and output only."""
        handles = [
            block.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.module.register_forward_hook(self.leave),
        ]
        if everything:
            handles += [
                block.attention_norm.register_forward_hook(self.norm("attention")),
                block.mlp_norm.register_forward_hook(self.norm("mlp")),
                block.attention.register_forward_pre_hook(self.call, with_kwargs=True),
                block.attention.register_forward_hook(self.attention),
                block.gate.register_forward_hook(self.gate),
                block.down.register_forward_pre_hook(self.down),
            ]
        return handles


@dataclass
class Recording:
    """One recorded pass over a batch of right-padded prompts.

    Args:
        decoder: the model that was run.
        input_ids: `[batch, position]`.
        lengths: `[batch]` real positions of each prompt.
        logits: the model's logits at each of `kept`, as the model itself gives them.
        kept: the positions of `logits`.
        final_state: what the last block leaves in the residual stream.
        final_norm: the frozen norm before the unembedding.
        dtype: the precision of everything frozen.
    """

    decoder: Decoder
    input_ids: Int[Tensor, "batch position"]
    lengths: Int[Tensor, "batch"]
    logits: Float[Tensor, "batch kept vocabulary"]
    kept: list[int]
    final_state: Float[Tensor, "batch position hidden"]
    final_norm: FrozenNorm
    dtype: torch.dtype
    _captures: list[_Capture]
    _probes: list[tuple[NormProbe, NormProbe]]

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self._captures)

    def state(self, layer: int) -> Float[Tensor, "batch position hidden"]:
        """The model's residual stream that enters a block; `layer == layers` is what leaves the last one."""
        if layer == self.layers:
            return self.final_state
        state = self._captures[layer].state
        assert state is not None
        return state.to(self.dtype)

    def block(self, layer: int) -> FrozenBlock:
        """Freeze one block, running it again where only its input was kept.

        Args:
            layer: the block's index.

        Raises:
            DePassError: the block's attention gives no probabilities, or a norm is of an unknown kind.
        """
        block, capture = self.decoder.blocks[layer], self._captures[layer]
        if capture.neurons is None:
            capture = self._replay(block, capture)
        if capture.probabilities is None:
            raise DePassError(f"block {layer}: attention returned no probabilities under eager attention")
        assert capture.pre_activations is not None
        assert capture.neurons is not None
        assert capture.attention_call is not None
        attention_probe, mlp_probe = self._probes[layer]
        dtype, name = self.dtype, f"block {layer}: the norm before"
        return FrozenBlock(
            index=layer,
            state=self.state(layer),
            attention=FrozenAttention(
                norm=FrozenNorm.fit(attention_probe, *capture.norms["attention"], f"{name} attention"),
                probabilities=capture.probabilities.to(dtype),
                value=linear_of(block.value).to(dtype),
                output=linear_of(block.output).to(dtype),
                call=AttentionCall(block, *capture.attention_call),
            ),
            mlp=FrozenMLP(
                norm=FrozenNorm.fit(mlp_probe, *capture.norms["mlp"], f"{name} the MLP"),
                gate=linear_of(block.gate).to(dtype),
                up=None if block.up is None else linear_of(block.up).to(dtype),
                down=linear_of(block.down).to(dtype),
                pre_activations=capture.pre_activations.to(dtype),
                neurons=capture.neurons.to(dtype),
                normed=capture.norms["mlp"][1],
            ),
        )

    def _replay(self, block: Block, kept: _Capture) -> _Capture:
        capture = _Capture()
        with undisturbed(self.decoder), ExitStack() as stack:
            for handle in capture.hooks(block, everything=True):
                stack.callback(handle.remove)
            block.module(*kept.arguments, **kept.keywords)
        return capture


def recorded_bytes(decoder: Decoder, batch: int, positions: int) -> int:
    """Estimate the bytes that a full recording of a batch holds.

    Args:
        decoder: the model.
        batch: the number of prompts.
        positions: the number of tokens of the longest.
    """
    block = decoder.blocks[0]
    hidden, neurons = linear_of(block.down).weight.shape
    heads = decoder.heads
    per_position = heads * positions + 2 * neurons + 5 * hidden
    size = linear_of(block.down).weight.element_size()
    return len(decoder.blocks) * batch * positions * per_position * size


def record(
    decoder: Decoder,
    input_ids: Int[Tensor, "batch position"],
    lengths: Int[Tensor, "batch"],
    positions: Int[Tensor, "batch target"],
    *,
    keep_everything: bool = True,
) -> Recording:
    """Run the model once, unchanged, and keep what a decomposed pass holds fixed.

    Args:
        decoder: the model.
        input_ids: `[batch, position]`, padded on the right.
        lengths: `[batch]` real positions of each prompt.
        positions: `[batch, target]` where logits are wanted.
        keep_everything: keep all blocks' frozen quantities; else only their inputs, at the cost of a
            second pass.

    Raises:
        DePassError: a block's output is not finite; it is named, and so is a parameter that is not.
    """
    captures = [_Capture() for _ in decoder.blocks]
    final: dict[str, tuple[Tensor, Tensor]] = {}

    def keep_final(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        final["norm"] = (arguments[0], output)

    with undisturbed(decoder):
        probes, final_probe = _probe_norms(decoder)
        with ExitStack() as stack:
            for block, capture in zip(decoder.blocks, captures, strict=True):
                for handle in capture.hooks(block, everything=keep_everything):
                    stack.callback(handle.remove)
            stack.callback(decoder.final_norm.register_forward_hook(keep_final).remove)
            logits, kept = decoder.logits(input_ids, positions)
        real = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        _check_finite(decoder, captures, real)
        final_state = final["norm"][0].to(decoder.dtype)
        final_norm = FrozenNorm.fit(final_probe, *final["norm"], "the final norm")
    return Recording(
        decoder, input_ids, lengths, logits, kept, final_state, final_norm, decoder.dtype, captures, probes
    )


def _probe_norms(decoder: Decoder) -> tuple[list[tuple[NormProbe, NormProbe]], NormProbe]:
    like = decoder.embedding
    hidden = linear_of(decoder.blocks[0].down).weight.shape[0]

    def probe(norm: nn.Module) -> NormProbe:
        return NormProbe.of(norm, hidden, like, decoder.dtype)

    blocks = [(probe(block.attention_norm), probe(block.mlp_norm)) for block in decoder.blocks]
    return blocks, probe(decoder.final_norm)


def _check_finite(decoder: Decoder, captures: list[_Capture], real: Tensor) -> None:
    """Name the first block whose output is not finite at a real position."""
    for block, capture in zip(decoder.blocks, captures, strict=True):
        assert capture.state is not None
        assert capture.result is not None
        if not bool(torch.isfinite(capture.state[real]).all()):
            raise DePassError(
                f"the state that enters block {block.index} is not finite; check the embedding's weights"
            )
        if bool(torch.isfinite(capture.result[real]).all()):
            continue
        broken = [
            name for name, value in block.module.named_parameters() if not bool(torch.isfinite(value).all())
        ]
        culprit = (
            f"its parameter '{broken[0]}' is not" if broken else "its parameters are: activations overflow"
        )
        raise DePassError(
            f"block {block.index} gives values that are not finite; {culprit}. "
            "Restore an earlier checkpoint, or load the model in float32"
        )
