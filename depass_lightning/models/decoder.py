"""A causal language model seen as what the method needs: blocks, norms, linear maps and an unembedding."""

import inspect
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from depass_lightning.errors import DePassError
from depass_lightning.models.families import family_of
from depass_lightning.models.spec import FamilySpec, submodule


@dataclass(frozen=True)
class Linear:
    """An affine map of the model as plain tensors, `x -> x weight^T + bias`."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"] | None

    def to(self, dtype: torch.dtype) -> "Linear":
        """Give the same map in another precision, without a copy where it already has it."""
        return Linear(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def linear_of(module: nn.Module) -> Linear:
    """Read a module's affine map.

    Args:
        module: a linear layer of the model.

    Raises:
        DePassError: the module has no weight matrix.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise DePassError(f"{type(module).__name__} is not a linear layer with a weight matrix")
    bias = getattr(module, "bias", None)
    return Linear(weight.detach(), bias.detach() if isinstance(bias, Tensor) else None)


@dataclass(frozen=True)
class Block:
    """The modules of one decoder block that take part in a decomposed pass."""

    index: int
    module: nn.Module
    attention_norm: nn.Module
    attention: nn.Module
    value: nn.Module
    output: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module | None
    down: nn.Module

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The maps whose biases belong to no component; the gate's pushes the bias component's shares."""
        return (self.value, self.output, self.gate, self.down)


class Decoder:
    """Binds a family's declaration to one model.

    Args:
        model: a Hugging Face causal language model, compiled or not.

    Raises:
        DePassError: the architecture is not supported, or its declaration does not fit.
    """

    def __init__(self, model: nn.Module) -> None:
        # A compiled model runs its original module's code; hooks must stand on that.
        original = getattr(model, "_orig_mod", model)
        if not isinstance(original, PreTrainedModel):
            raise DePassError(
                f"{type(original).__name__} is not a Hugging Face causal language model; "
                "pass the model itself, for instance AutoModelForCausalLM.from_pretrained(...)"
            )
        self.model = original
        owner = type(self.model).__name__
        self.spec: FamilySpec = family_of(self.config.model_type)
        unembedding = self.model.get_output_embeddings()
        if unembedding is None:
            raise DePassError(f"{owner} has no unembedding; load it with AutoModelForCausalLM")
        self.unembedding: nn.Module = unembedding
        inner = self.model.get_decoder()
        self.final_norm = submodule(inner, self.spec.final_norm, owner)
        modules = submodule(inner, self.spec.blocks, owner)
        self.blocks = [self._bind(index, module) for index, module in enumerate(modules.children())]
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _bind(self, index: int, module: nn.Module) -> Block:
        attention, mlp = self.spec.attention, self.spec.mlp
        owner = f"block {index} of {type(self.model).__name__}"
        return Block(
            index=index,
            module=module,
            attention_norm=submodule(module, attention.norm, owner),
            attention=submodule(module, attention.module, owner),
            value=submodule(module, f"{attention.module}.{attention.value}", owner),
            output=submodule(module, f"{attention.module}.{attention.output}", owner),
            mlp_norm=submodule(module, mlp.norm, owner),
            gate=submodule(module, f"{mlp.module}.{mlp.gate}", owner),
            up=None if mlp.up is None else submodule(module, f"{mlp.module}.{mlp.up}", owner),
            down=submodule(module, f"{mlp.module}.{mlp.down}", owner),
        )

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def name(self) -> str:
        """What the model is called: the name or folder that it was loaded from, or its class."""
        return str(getattr(self.config, "_name_or_path", "") or type(self.model).__name__)

    @property
    def embedding(self) -> Float[Tensor, "vocabulary hidden"]:
        """The token embedding's weights."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that components are carried in: the model's own, and float32 at least."""
        own = self.embedding.dtype
        return own if own == torch.float64 else torch.float32

    @property
    def has_biases(self) -> bool:
        """Whether any constant enters the residual stream, so that a bias component exists."""
        modules = [module for block in self.blocks for module in block.linears]
        norms = [norm for block in self.blocks for norm in (block.attention_norm, block.mlp_norm)]
        outer = (self.final_norm, self.unembedding)
        return any(getattr(module, "bias", None) is not None for module in (*modules, *norms, *outer))

    @property
    def hidden_size(self) -> int:
        """The size of the residual stream."""
        return self.embedding.shape[1]

    @property
    def heads(self) -> int:
        """The number of query heads of a block."""
        return self.config.num_attention_heads

    @property
    def max_positions(self) -> int | None:
        """The model's context in tokens, where its configuration states it."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocabulary_size(self) -> int:
        """The number of rows of the unembedding."""
        return linear_of(self.unembedding).weight.shape[0]

    def readout(
        self, tokens: Int[Tensor, "target"]
    ) -> tuple[Float[Tensor, "target hidden"], Float[Tensor, "target"]]:
        """The unembedding's rows and biases of some tokens: a logit is `row . state + bias`.

        Args:
            tokens: `[target]` token ids.
        """
        linear = linear_of(self.unembedding)
        rows = linear.weight[tokens].to(self.dtype)
        biases = rows.new_zeros(len(tokens)) if linear.bias is None else linear.bias[tokens].to(self.dtype)
        return rows, biases

    def logits(
        self, input_ids: Tensor, positions: Tensor
    ) -> tuple[Float[Tensor, "batch kept vocabulary"], list[int]]:
        """Run the model once on right-padded ids.

        Padding needs no mask there: attention is causal, so no real token sees what follows it.

        Args:
            input_ids: `[batch, position]`.
            positions: every position at which logits are wanted, in any shape.

        Returns:
            The logits and the positions that they stand at.
        """
        kept: Tensor = positions.unique()
        arguments = {"logits_to_keep": kept} if self._takes_logits_to_keep else {}
        output = self.model(input_ids=input_ids, use_cache=False, **arguments)
        logits = output.logits if self._takes_logits_to_keep else output.logits[:, kept]
        return logits, kept.tolist()
