"""A state's part in a subspace and the rest: their states at the end, and the tokens they promote."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.attribution.forward import propagate_to, record_batch
from depass_lightning.attribution.settings import settings_of
from depass_lightning.depass import DePass
from depass_lightning.engine.isolation import alone, exact
from depass_lightning.engine.rules import RuleName
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Subspace
from depass_lightning.utils.batching import in_batches

CHUNK = 64  # states whose logits are in memory together


@dataclass(frozen=True)
class Carried:
    """The parts of prompts' last states, after the frozen final norm.

    Attributes:
        states: `[source, part, prompt, hidden]`: in a subspace, and the rest.
        whole: `[prompt, hidden]`: what the model itself has there.
        error: how far the parts, with the bias component, are from adding up to the model's logits: the
            largest relative distance.
    """

    states: Float[Tensor, "source part prompt hidden"]
    whole: Float[Tensor, "prompt hidden"]
    error: float


def carry_parts(
    depass: DePass,
    prompts: Sequence[Prompt],
    sources: Sequence[Subspace],
    *,
    rule: RuleName = "softmax",
    batch_size: int = 16,
    progress: bool = False,
) -> Carried:
    """Carry the two parts of each source to the end of every prompt; all sources share one recorded pass."""
    decoder = depass.decoder
    settings = settings_of(decoder, sources, rule=rule, memory_budget=depass.memory_budget)
    unembedded = decoder.unembedded()

    def work(batch: list[int]) -> list[tuple[Tensor, float]]:
        batch_prompts, error = [prompts[i] for i in batch], 0.0
        lengths = [len(prompt.ids) for prompt in batch_prompts]
        with alone(decoder.model):
            recording = record_batch(decoder, batch_prompts, [[length - 1] for length in lengths], settings)
            last = torch.tensor(lengths, device=decoder.device)[:, None] - 1
            kept = [recording.kept.index(int(place)) for place in last]
            logits = recording.uncapped[range(len(batch_prompts)), kept].to(recording.dtype)
            parts = []
            context = settings.split_context(batch_prompts)
            for source in sources:
                state = propagate_to(recording, source, settings, context, recording.layers, last)
                states = state.read(recording.final_norm)[:, :, 0]
                whole = states.sum(1)
                reconstructed = whole @ unembedded.weight.T
                if unembedded.bias is not None:
                    reconstructed = reconstructed + unembedded.bias
                error = max(error, float(((reconstructed - logits).norm(dim=1) / logits.norm(dim=1)).max()))
                # A bias component stands before the two parts.
                parts.append(torch.cat([states[:, -2:], whole[:, None]], 1))
        return [(states, error) for states in torch.stack(parts, 1).cpu()]

    results = in_batches(
        [(decoder.regime(len(prompt.ids)), len(prompt.ids)) for prompt in prompts], batch_size, work, progress
    )
    stacked = torch.stack([states for states, _ in results], 2)
    return Carried(stacked[:, :2], stacked[0, 2], max(error for _, error in results))


def decode(
    depass: DePass,
    states: Float[Tensor, "prompt hidden"],
    answers: Sequence[int],
    *,
    top: int,
) -> tuple[Int[Tensor, "prompt top"], list[int]]:
    """Return the logits of normed states, without the unembedding's bias.

    Returns:
        The tokens with the highest logits, and the rank of the answer, from 1 for the highest.
    """
    weight = depass.decoder.unembedded().weight
    tokens, ranks = [], []
    with exact(weight.device):
        for start in range(0, len(states), CHUNK):
            logits = states[start : start + CHUNK].to(weight) @ weight.T
            batch_answers = torch.tensor(answers[start : start + CHUNK], device=weight.device)
            ranks += (1 + (logits > logits.gather(1, batch_answers[:, None])).sum(1)).tolist()
            tokens.append(logits.topk(top).indices.cpu())
    return torch.cat(tokens), ranks
