"""What targets of encoders need before the pass: where a text's mask is, and another text's embedding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from depass_lightning.engine.isolation import alone, undisturbed
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, prompts_of
from depass_lightning.targets import Similarity


def only_mask(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> int:
    """Return the position of a prompt's only mask token.

    Raises:
        DePassError: there is none or there are several, or no tokenizer shows which token it is.
    """
    mask = None if tokenizer is None else tokenizer.mask_token_id
    if tokenizer is None or mask is None:
        raise DePassError(
            f"{prompt.name}: no tokenizer shows which token is the mask; give its position, Masked(position)"
        )
    places = [place for place, token in enumerate(prompt.ids) if token == mask]
    if len(places) == 1:
        return places[0]
    if not places:
        raise DePassError(
            f"{prompt.name} has no mask token; put {tokenizer.mask_token!r} in place of the word that the "
            "model predicts, or give a position, Masked(position)"
        )
    raise DePassError(
        f"{prompt.name} has {len(places)} mask tokens, at positions {', '.join(map(str, places))}; give the "
        f"one to explain, such as Masked({places[0]}) in Python; a command takes texts with one mask"
    )


def embedding_of(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, target: Similarity
) -> Float[Tensor, "hidden"]:
    """Return the embedding of a similarity's other text, divided by its norm.

    Raises:
        DePassError: the model has a head, there is no tokenizer, or the text cannot be read.
    """
    if decoder.head.kind != "embedding":
        raise DePassError(
            f"{type(decoder.model).__name__} is no encoder without a head, which a Similarity takes; load "
            "one with AutoModel"
        )
    if tokenizer is None:
        raise DePassError("the other text of a Similarity needs a tokenizer; use DePass(model, tokenizer)")
    try:
        (prompt,) = prompts_of(decoder, tokenizer, target.text, None, None)
    except DePassError as error:
        raise DePassError(f"Similarity, the other text {target.text!r:.60}: {error}") from error
    ids = torch.tensor([prompt.ids], device=decoder.device)
    with alone(decoder.model), undisturbed(decoder.model, attention=None):
        states, _, _ = decoder.logits(ids, torch.arange(ids.shape[1], device=ids.device))
    states = states[0].to(decoder.dtype)  # [position, hidden]
    return nn.functional.normalize(states.mean(0) if target.pooling == "mean" else states[0], dim=0)
