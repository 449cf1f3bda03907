"""What neurons and directions say by themselves: the tokens that they promote through the unembedding."""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.depass import DePass
from depass_lightning.engine.frozen import NormParameters
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.sources import Neurons, Source, Subspace, resolve_layer
from depass_lightning.utils.tokenization import token_text

NEURON = re.compile(r"(?:layer (\d+) )?neuron (\d+)")
AT_ONCE = 64  # directions, whose logits over the whole vocabulary are held together


def promoted_tokens(
    depass: DePass, directions: Float[Tensor, "direction hidden"], count: int = 5
) -> list[tuple[list[str], list[str]]]:
    """Read directions of the residual stream in tokens, through the final norm's weights and the unembedding.

    As in Geva et al. (2022, arXiv 2203.14680, section 3): what the direction alone adds to each logit, blocks
    behind it left out.

    Args:
        depass: the model, with its tokenizer.
        directions: what is read, in any length.
        count: how many tokens at each end.

    Returns:
        For each direction the tokens whose logits it raises most, and those that it lowers most.

    Raises:
        DePassError: the directions are not of the model's hidden size.
    """
    decoder = depass.decoder
    if directions.ndim != 2 or directions.shape[1] != decoder.hidden_size:
        raise DePassError(
            f"directions of shape {tuple(directions.shape)} cannot be read by a model whose states have "
            f"{decoder.hidden_size} numbers; give [direction, {decoder.hidden_size}]"
        )
    with torch.no_grad():
        unembedding = decoder.unembedded().weight
        norm = _probe(decoder, decoder.final_norm)
        found = []
        for some in directions.to(unembedding.device, decoder.dtype).split(AT_ONCE):
            logits = norm.direction(some).to(unembedding.dtype) @ unembedding.T
            # Twice as many: a word with and without its space is shown once.
            ends = [logits.topk(min(2 * count, logits.shape[1]), largest=up).indices for up in (True, False)]
            found += zip(*(end.tolist() for end in ends), strict=True)
    return [(_words(depass, up, count), _words(depass, down, count)) for up, down in found]


def notes_on(depass: DePass, source: Source, names: Sequence[str]) -> dict[str, str]:
    """Say of neurons and of single directions, by their components' names, what they promote.

    Args:
        depass: the model, with its tokenizer.
        source: what the state was split into.
        names: which of its components to read; what is no neuron and no single direction is left out.
    """
    read: dict[str, Tensor] = {}
    decoder = depass.decoder
    if isinstance(source, Neurons):
        only = None if source.layer is None else resolve_layer(source.layer, len(decoder.blocks), "Neurons")
        for name in names:
            match = NEURON.fullmatch(name)
            layer = only if match is None or match[1] is None else int(match[1])
            if match is not None and layer is not None:
                block = decoder.blocks[layer]
                column = block.mlp.column(int(match[2]), decoder.dtype)
                read[name] = _probe(decoder, block.mlp.post_norm).direction(column)
    elif isinstance(source, Subspace):
        named = source.names if source.names is not None else ["subspace"]
        read = {name: basis[0] for name, basis in zip(named, source.bases, strict=False) if len(basis) == 1}
    if not read:
        return {}
    directions = torch.stack([direction.to(decoder.device, torch.float32) for direction in read.values()])
    ends = promoted_tokens(depass, directions)
    return {
        name: f"promotes {', '.join(up)}; demotes {', '.join(down)}"
        for name, (up, down) in zip(read, ends, strict=True)
    }


def _probe(decoder: Decoder, norm: nn.Module | None) -> NormParameters:
    """What a norm does besides scaling, or nothing where there is none."""
    if norm is None:
        return NormParameters.nothing(decoder.hidden_size, decoder.device, decoder.dtype)
    return NormParameters.of(norm, decoder.hidden_size, decoder.model_dtype, decoder.dtype)


def _words(depass: DePass, tokens: Sequence[int], count: int) -> list[str]:
    texts = [token_text(token, depass.tokenizer) for token in tokens]
    return list(dict.fromkeys(text.strip() or text for text in texts))[:count]
