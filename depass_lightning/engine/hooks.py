"""Forward hooks on one block that keep what a plain pass computes there (`engine/freeze.py` freezes it)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from depass_lightning.engine.mixture import ScoredMixture
from depass_lightning.models.block import Block
from depass_lightning.models.experts import DenseParts


@dataclass
class Capture:
    """What the hooks of one block recorded.

    Args:
        everything: record all that `freeze` needs; else only what enters and leaves the block, and its
            attention's mixed values.
        mixed_values: attention's mixed values, call by call; of an earlier run of the block where everything
            is recorded, so that they are not recomputed.
    """

    everything: bool
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attention_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    probabilities: Tensor | None = None
    mixture: ScoredMixture | None = None
    mixed_values: list[Tensor] = field(default_factory=list)
    mixed: dict[str, tuple[tuple[Any, ...], Tensor]] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def entered(self) -> Float[Tensor, "batch position hidden"]:
        """The state that entered the block."""
        return self.arguments[0] if self.arguments else self.keywords["hidden_states"]

    @property
    def left(self) -> Float[Tensor, "batch position hidden"]:
        """The state that left the block."""
        return self.seen["left"]

    def mix(self, mixture: ScoredMixture, values: Tensor) -> Float[Tensor, "batch head query size"]:
        """Compute attention's mixed values, if the block's attention goes through `engine/mixture.py`."""
        if self.everything:
            self.mixture = mixture
            return self.mixed_values.pop(0) if self.mixed_values else mixture.mixed(values)
        self.mixed_values.append(mixture.mixed(values))
        return self.mixed_values[-1]

    def hooks(self, block: Block) -> list[RemovableHandle]:
        """Register the hooks on a block."""
        handles = [
            block.entry.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.exit.register_forward_hook(self._leave),
        ]
        if block.attention.in_mask is not None:
            hook = _zeroed_argument(block.attention.in_mask)
            handles.append(block.attention.module.register_forward_pre_hook(hook, with_kwargs=True))
        if not self.everything:
            return handles
        if "output_attentions" in inspect.signature(block.attention.module.forward).parameters:
            hook = _with_probabilities
            handles.append(block.attention.module.register_forward_pre_hook(hook, with_kwargs=True))
        attention, mlp = block.attention, block.mlp
        norms = {
            "attention": attention.norm,
            "latent": attention.latent and attention.latent[1],
            "attention post-norm": attention.post_norm,
            "mlp": mlp.norm,
            "mlp post-norm": mlp.post_norm,
            "values": attention.value_norm,
            "heads": attention.inner_norm,
            "neurons": None if mlp.dense is None else mlp.dense.inner_norm,
        }
        handles += [
            norm.register_forward_hook(self._norm(name)) for name, norm in norms.items() if norm is not None
        ]
        handles.append(attention.module.register_forward_pre_hook(self._call, with_kwargs=True))
        if attention.mixer is None or attention.mixer.softmax is not None:
            hook = self._returned if attention.probabilities is None else self._asked(attention.probabilities)
            handles.append(attention.mixing.register_forward_hook(hook, with_kwargs=True))
        if attention.mixer is not None:
            handles += [
                module.register_forward_hook(self._mixed(name))
                for name, module in attention.mixer.recorded.items()
            ]
        if attention.scaled_heads:
            handles.append(attention.output.module.register_forward_pre_hook(self._input("heads")))
        if attention.gate is not None:
            handles.append(attention.gate.module.register_forward_hook(self._output("attention gate")))
        if mlp.dense is not None:
            handles += self._dense(mlp.dense, "")
        if mlp.experts is not None:
            handles.append(mlp.experts.module.register_forward_pre_hook(self._experts))
            if mlp.experts.shared is not None:
                handles += self._dense(mlp.experts.shared, "shared ")
            if mlp.experts.shared_gate is not None:
                handles.append(mlp.experts.shared_gate.register_forward_hook(self._output("shared scale")))
        return handles

    def _dense(self, parts: DenseParts, name: str) -> list[RemovableHandle]:
        return [
            parts.gate.module.register_forward_hook(self._output(f"{name}gate")),
            parts.reader.register_forward_pre_hook(self._input(f"{name}down")),
        ]

    def _enter(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments, self.keywords = arguments, keywords

    def _leave(self, _module: nn.Module, _arguments: Any, output: Any) -> None:
        self.seen["left"] = output[0] if isinstance(output, tuple | list) else output

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.norms[name] = (arguments[0], output)

        return hook

    def _call(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.attention_call = arguments, keywords

    def _returned(self, _module: nn.Module, _arguments: Any, _keywords: Any, output: Any) -> None:
        self.probabilities = output[1] if isinstance(output, tuple | list) and len(output) > 1 else None

    def _asked(self, probabilities: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, keywords: Any, _output: Any) -> None:
            self.probabilities = probabilities(module, *arguments, **keywords)

        return hook

    def _output(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen[name], self.seen[f"{name} input"] = output, arguments[0]

        return hook

    def _mixed(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            self.mixed[name] = arguments, output

        return hook

    def _input(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.seen[name] = arguments[0]

        return hook

    def _experts(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.seen["experts"] = arguments


def _with_probabilities(_module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
    """Ask for the probabilities, where attention returns them only on request."""
    return arguments, keywords | {"output_attentions": True}


def _zeroed_argument(name: str) -> Callable[..., Any]:
    """Replace a keyword argument that the attention mask already includes by zeros."""

    def hook(_module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
        value = keywords.get(name)
        return arguments, keywords | ({} if value is None else {name: torch.zeros_like(value)})

    return hook
