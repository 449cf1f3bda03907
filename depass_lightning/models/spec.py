"""The declaration of a decoder family: names of submodules and the order of its parts.

The engine has the mathematics. A declaration names a block's norms, its value and output maps and its MLP
maps, and states whether attention and MLP are sequential or parallel. Biases, epsilon, scaling of norm
weights and numbers of heads are read from the model and need no declaration. `engine/validate.py` checks a
declaration against the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from depass_lightning.errors import DePassError
from depass_lightning.models.probabilities import seen_probabilities

ProjectionLayout = Literal["own", "concatenated", "interleaved", "quarters"]
ResidualNorm = Literal["none", "norm", "post_norm"]


@dataclass(frozen=True)
class AttentionSpec:
    """Names of an attention sublayer's parts inside a block (dots descend into submodules).

    Args:
        module: the attention module, which returns its probabilities second under eager attention.
        norm: the norm that it reads the residual stream through; None where it reads it as it is.
        post_norm: the norm of its output, before that is added to the residual stream.
        value: the value projection, inside `module`.
        layout: which of that projection's outputs are values: all of them (`own`), those after all queries
            and keys (`concatenated`), those after each group's queries and keys (`interleaved`), or those
            between the queries and keys of each quarter of the heads (`quarters`).
        latent: the projection and the norm before `value`, inside `module`, where values come from a latent.
        output: the output projection, inside `module`.
        in_mask: the name of an argument that the mask holds already, but that eager attention adds once more.
        residual: which of its norms is on the residual stream itself: none; `norm`, so that its output is
            added to the normed stream; or `post_norm`, of the sum of the stream and its output.
        residual_weight: the block's attribute, after any such norm, that the residual stream is multiplied
            by past it.
        output_weight: the block's attribute that its output is multiplied by.
        value_norm: the norm of each head's values, inside `module`.
        value_scale: the attribute of `module` that is a factor of the values.
        gate: the map, inside `module`, whose activation the heads' outputs are multiplied by, with one output
            per dimension of these or per head; or the query map, if it gives each head's queries, then gates.
        gate_activation: the activation function after that map.
        inner_norm: the norm of the concatenated heads' outputs, inside `module`, before the output map.
        scaled_heads: each head's output has a factor that is not in its probabilities, as in some sinks.
        output_bias: a parameter of `module` that is added to the output map's output.
        weights: the module, inside `module`, that returns the probabilities, if `module` does not.
        mixers: linear mixers that blocks may have in its place: the module's name, and its kind in
            `models/mixers`.
        probabilities: a function of `module` and the arguments of its call that returns the probabilities
            `[batch, head, query, key]`, for a class that is not of transformers; by default they are read
            from attention's softmax.
    """

    module: str = "self_attn"
    norm: str | None = "input_layernorm"
    post_norm: str | None = None
    value: str = "v_proj"
    layout: ProjectionLayout = "own"
    latent: tuple[str, str] | None = None
    output: str = "o_proj"
    in_mask: str | None = None
    residual: ResidualNorm = "none"
    residual_weight: str | None = None
    output_weight: str | None = None
    value_norm: str | None = None
    value_scale: str | None = None
    gate: str | None = None
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"
    inner_norm: str | None = None
    scaled_heads: bool = False
    output_bias: str | None = None
    weights: str | None = None
    mixers: tuple[tuple[str, str], ...] = ()
    probabilities: Callable[..., Tensor] = seen_probabilities


@dataclass(frozen=True)
class ExpertsSpec:
    """Names of a mixture of experts' parts, inside the MLP of a block that has one.

    Args:
        module: the experts, which are called with states, the chosen experts' indices and their weights.
        shared: an MLP that every position goes through, named inside like the family's dense MLP.
        shared_gate: the map whose sigmoid the shared MLP's output is multiplied with.
        scale: the configuration's name for a factor of the experts' output.
        post_norm: the norm of the sum of the experts' and the shared MLP's outputs, inside the MLP.
    """

    module: str = "experts"
    shared: str | None = None
    shared_gate: str | None = None
    scale: str | None = None
    post_norm: str | None = None


@dataclass(frozen=True)
class MLPSpec:
    """Names of an MLP sublayer's parts inside a block.

    Args:
        module: the MLP; empty where its maps are attributes of the block.
        norm: the norm that it reads the residual stream through; None where it reads it as it is.
        post_norm: the norm of its output, before that is added to the residual stream.
        gate: the map whose output is the neurons' pre-activation.
        up: the map whose output the activation is multiplied with; None for an MLP without a gate. The same
            name as `gate` where one map gives both, the gate first.
        gate_scale: the attribute of `module` that is a factor of the pre-activation.
        down: the map that the neurons' values go through, back into the residual stream.
        inner_norm: the norm of the neurons' values, inside `module`, before that map.
        experts: the family's blocks may have a mixture of experts in place of these.
        residual: which of its norms is on the residual stream itself; see `AttentionSpec`.
        residual_weight: see `AttentionSpec`.
        output_weight: the block's attribute that its output is multiplied by.
    """

    module: str = "mlp"
    norm: str | None = "post_attention_layernorm"
    post_norm: str | None = None
    gate: str = "gate_proj"
    up: str | None = "up_proj"
    down: str = "down_proj"
    gate_scale: str | None = None
    inner_norm: str | None = None
    experts: ExpertsSpec | None = None
    residual: ResidualNorm = "none"
    residual_weight: str | None = None
    output_weight: str | None = None


@dataclass(frozen=True)
class HeadSpec:
    """Names of the modules between a decoder and its unembedding: a map, an activation and a norm.

    They are bound as an additional block that has only an MLP, whose output replaces the residual stream.

    Args:
        module: the module that has them, inside the model; empty for the model itself.
        dense: the map, inside `module`.
        norm: the norm, inside `module`.
        activation: the activation, inside `module`, where `module` has other parts, too.
    """

    module: str
    dense: str = "dense"
    norm: str = "LayerNorm"
    activation: str | None = None


def _always(_config: Any) -> bool:
    return True


def _none(_model: Any) -> None:
    return None


def _call(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids)


@dataclass(frozen=True)
class ModelSpec:
    """What the configuration and methods of a model of transformers give, for another `nn.Module` class.

    Args:
        embedding: the token embedding, inside the model.
        unembedding: the map to the logits, inside the model.
        heads: the number of query heads, a function of the model.
        positions: the maximum length of a prompt in tokens, a function of the model; None for no limit.
        soft_cap: the bound of a soft cap on the logits, a function of the model; None for none.
        logits: a function of the model and `[batch, position]` ids that returns
            `[batch, position, vocabulary]`; by default the model's output.
    """

    embedding: str
    unembedding: str
    heads: Callable[[Any], int]
    positions: Callable[[Any], int | None] = _none
    soft_cap: Callable[[Any], float | None] = _none
    logits: Callable[[Any, Tensor], Tensor] = _call


@dataclass(frozen=True)
class FamilySpec:
    """One decoder family: which model types it covers and where its parts are.

    Args:
        model_types: the `config.model_type` values that it covers; for a class that is not of transformers,
            the class, or its name qualified by its module.
        blocks: the list of blocks, inside the decoder that `model.get_decoder()` returns, or inside a model
            that is not of transformers.
        decoder: the decoder inside the model, where `model.get_decoder()` returns something else.
        final_norm: the norm before the unembedding, inside the same decoder; None where there is none.
        final_projection: a linear map before the unembedding, inside the same decoder, where a model has one.
        head: further modules before the unembedding, if any.
        attention: the attention sublayer of every block.
        mlp: the MLP sublayer of every block; None where blocks have none.
        by_block: the sublayers of a block in place of these two, a function of the block, if blocks differ in
            more than their mixer; None for one that it has not.
        parallel: the MLP reads what enters the block, in parallel with attention, and not its output.
        residual_scale: the configuration's name for the factor of both sublayers' outputs, or a function
            of the configuration.
        logit_scale: the configuration's name for the factor of the logits.
        logit_divisor: the configuration's name for the divisor of the logits.
        when: whether it covers a configuration of these model types, `model.config`.
        causal: whether a token sees only those before it, a function of `model.config`; an encoder's also see
            those after it.
        model: the parts of a model that is not of transformers.
    """

    model_types: tuple[str | type[nn.Module], ...]
    blocks: str = "layers"
    decoder: str | None = None
    final_norm: str | None = "norm"
    final_projection: str | None = None
    head: HeadSpec | None = None
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    mlp: MLPSpec | None = field(default_factory=MLPSpec)
    by_block: Callable[[Any], tuple[AttentionSpec | None, MLPSpec | None]] | None = None
    parallel: bool = False
    residual_scale: str | Callable[[Any], float] | None = None
    logit_scale: str | Callable[[Any], float] | None = None
    logit_divisor: str | None = None
    when: Callable[[Any], bool] = _always
    causal: Callable[[Any], bool] = _always
    model: ModelSpec | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model types; those of classes are qualified by their modules."""
        return tuple(kind if isinstance(kind, str) else class_name(kind) for kind in self.model_types)

    def mlp_with(self, **changes: Any) -> MLPSpec:
        """Return the MLP's declaration with some fields changed.

        Args:
            changes: fields of `MLPSpec`.
        """
        assert self.mlp is not None
        return replace(self.mlp, **changes)


def class_name(kind: type) -> str:
    """Return the name of a class, qualified by its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def submodule(parent: nn.Module, path: str, owner: str) -> nn.Module:
    """Find a declared submodule.

    Raises:
        DePassError: there is no such submodule, so the declaration does not describe this model.
    """
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise DePassError(
            f"{owner} has no submodule '{path}', which its family's declaration names; "
            "declare the model's own names with depass_lightning.register_family"
        ) from error


def configured(config: Any, name: str | Callable[[Any], float] | None) -> float:
    """Read a declared number of a configuration; 1 where none is declared.

    Args:
        config: the model's configuration.
        name: the number's name in the configuration, or what computes it; None where none is declared.

    Raises:
        DePassError: the configuration has no such number.
    """
    if name is None:
        return 1.0
    if callable(name):
        try:
            return name(config)
        except AttributeError as error:
            raise DePassError(
                f"the configuration of '{config.model_type}' lacks a number: {error}"
            ) from error
    value = getattr(config, name, None)
    if not isinstance(value, int | float):
        raise DePassError(f"the configuration of '{config.model_type}' has no number '{name}'")
    return float(value)
