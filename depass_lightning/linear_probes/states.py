"""The states that probes read: what stands in the residual stream where a block begins."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.engine.isolation import exact
from depass_lightning.engine.record import record
from depass_lightning.errors import DePassError
from depass_lightning.prompts import IdsLike, Prompt, pad, prompts_of
from depass_lightning.sources import resolve_layer
from depass_lightning.utils.batching import in_batches


@overload
def hidden_states(
    depass: DePass,
    texts: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    position: int = -1,
    batch_size: int = 32,
    input_ids: IdsLike | None = None,
    attention_mask: IdsLike | None = None,
) -> Float[Tensor, "layer text hidden"]: ...


@overload
def hidden_states(
    depass: DePass,
    texts: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    position: Literal["all"],
    batch_size: int = 32,
    input_ids: IdsLike | None = None,
    attention_mask: IdsLike | None = None,
) -> list[Tensor]: ...


def hidden_states(
    depass: DePass,
    texts: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    position: int | Literal["all"] = -1,
    batch_size: int = 32,
    input_ids: IdsLike | None = None,
    attention_mask: IdsLike | None = None,
) -> Float[Tensor, "layer text hidden"] | list[Tensor]:
    """Return the residual stream of texts at layers, as a decomposed pass has it.

    Args:
        depass: the model.
        texts: the texts.
        layers: the blocks whose input is meant; negative counts from the end, the number of blocks is what
            leaves the last one. None means all of them, that included.
        position: the token whose state is meant; negative counts from each text's end. "all" means each.
        batch_size: how many texts go through the model at once.
        input_ids: token ids instead of texts, padded on either side.
        attention_mask: 1 at the real positions of `input_ids`.

    Returns:
        `[layer, text, hidden]`, or for all positions one `[layer, position, hidden]` a text; on the CPU.

    Raises:
        DePassError: a layer or a position is out of range, or a text cannot be read.
    """
    decoder, count = depass.decoder, len(depass.decoder.blocks)
    wanted = layers_of(count, layers)
    prompt_texts = None if texts is None else list(texts)
    prompts = prompts_of(decoder, depass.tokenizer, prompt_texts, input_ids, attention_mask)
    if position != "all":
        for prompt in prompts:
            prompt.resolve_position(position)

    def states(batch: list[int]) -> list[Tensor]:
        return _batch(depass, [prompts[i] for i in batch], wanted, position)

    rows = in_batches(
        [(decoder.regime(len(prompt.ids)), len(prompt.ids)) for prompt in prompts],
        batch_size,
        states,
        progress=False,
    )
    return rows if position == "all" else torch.stack(rows, 1)


def layers_of(count: int, layers: Sequence[int] | None) -> list[int]:
    """Return layers as indices.

    Raises:
        DePassError: there is none, or the model has no such layer.
    """
    if layers is None:
        return list(range(count + 1))
    if not layers:
        raise DePassError("the list of layers is empty; give at least one, or None for all")
    return [layer if layer == count else resolve_layer(layer, count, "layers") for layer in layers]


def spread(count: int, most: int) -> list[int]:
    """Return at most `count` layers, evenly spread; the last is what leaves the last block."""
    most = min(most, count)
    return [round(count * (place + 1) / most) for place in range(most)]


def _batch(
    depass: DePass, prompts: list[Prompt], layers: list[int], position: int | Literal["all"]
) -> list[Tensor]:
    device = depass.decoder.device
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    ids = pad([prompt.ids for prompt in prompts]).to(device)
    with exact(device):
        recording = record(depass.decoder, ids, lengths, lengths[:, None] - 1, keep_everything=False)
        if position != "all":
            positions = torch.tensor([prompt.resolve_position(position) for prompt in prompts], device=device)
            rows = torch.arange(len(prompts), device=device)
            picked = torch.stack([recording.state(layer)[rows, positions] for layer in layers], 1)
            return list(picked.cpu())
        states = [recording.state(layer).cpu() for layer in layers]
    return [
        torch.stack([layer_states[row, : len(prompt.ids)] for layer_states in states])
        for row, prompt in enumerate(prompts)
    ]
