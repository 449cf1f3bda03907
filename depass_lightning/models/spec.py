"""What the engine must be told of a decoder family: names of submodules, nothing else.

The engine owns the mathematics; a family is a declaration that says where in a block its norms, its value and
output maps and its MLP maps are found. Biases, epsilon, scaling of weights and numbers of heads are read
from the model itself, so that they need no declaration.
"""

from dataclasses import dataclass, field

from torch import nn

from depass_lightning.errors import DePassError


@dataclass(frozen=True)
class AttentionSpec:
    """Names of an attention sublayer's parts inside a block (dots descend into submodules).

    Args:
        module: the attention module, which returns its probabilities second under eager attention.
        norm: the norm that it reads the residual stream through.
        value: the value projection, inside `module`.
        output: the output projection, inside `module`.
    """

    module: str = "self_attn"
    norm: str = "input_layernorm"
    value: str = "v_proj"
    output: str = "o_proj"


@dataclass(frozen=True)
class MLPSpec:
    """Names of an MLP sublayer's parts inside a block.

    Args:
        module: the MLP.
        norm: the norm that it reads the residual stream through.
        gate: the map whose output is the neurons' pre-activation.
        up: the map whose output the activation is multiplied with; None for an MLP without a gate.
        down: the map that the neurons' values go through, back into the residual stream.
    """

    module: str = "mlp"
    norm: str = "post_attention_layernorm"
    gate: str = "gate_proj"
    up: str | None = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class FamilySpec:
    """One decoder family: which model types it covers and where its parts are.

    Args:
        model_types: the `config.model_type` values that it covers.
        blocks: the list of blocks, inside the decoder that `model.get_decoder()` returns.
        final_norm: the norm before the unembedding, inside the same decoder.
        attention: the attention sublayer of every block.
        mlp: the MLP sublayer of every block.
    """

    model_types: tuple[str, ...]
    blocks: str = "layers"
    final_norm: str = "norm"
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    mlp: MLPSpec = field(default_factory=MLPSpec)


def submodule(parent: nn.Module, path: str, owner: str) -> nn.Module:
    """Find a declared submodule.

    Args:
        parent: where to start.
        path: attribute names joined by dots.
        owner: what the parent is called in an error.

    Raises:
        DePassError: there is no such submodule, so the declaration does not describe this model.
    """
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise DePassError(
            f"{owner} has no submodule '{path}', which its family's declaration names; "
            "declare the model's own names in depass_lightning/models/families.py"
        ) from error
