"""One batch's way through a decomposed pass: record, split, carry, read.

The functions take what `depass.py` has checked; they know neither the order of a call's prompts nor its
defaults.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution import Attribution
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.propagate import Carry, propagate
from depass_lightning.engine.record import Recording, exact, record, recorded_bytes
from depass_lightning.engine.rules import Rule, Taylor
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad, token_text
from depass_lightning.sources import Source, dense_components, resolve_layer
from depass_lightning.targets import Target, target_ids


@dataclass(frozen=True)
class Decomposition:
    """Every component's state at one layer.

    Attributes:
        states: `[component, position, hidden]`; they sum to the model's residual stream there.
        names: the components' names.
        layer: the block that this state enters; the number of blocks means behind the last one.
    """

    states: Float[Tensor, "component position hidden"]
    names: list[str]
    layer: int


@dataclass(frozen=True)
class Settings:
    """How a pass is made: the same for every prompt of a call.

    Args:
        source: what the state is split into.
        rule: how neurons are shared.
        rule_name: what the rule is called.
        bias: whether constants have a component of their own.
        bias_mode: what becomes of constants: component, drop, or none where the model has none.
        compat: `release` for the published code's behaviour, else None.
        budget: the engine's memory.
    """

    source: Source
    rule: Rule
    rule_name: str
    bias: bool
    bias_mode: str
    compat: str | None
    budget: Budget


def attribute_batch(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: list[Prompt],
    targets: list[Target],
    settings: Settings,
) -> list[Attribution]:
    """Attribute one batch.

    Args:
        decoder: the model.
        tokenizer: to name tokens by; None shows ids.
        prompts: the prompts, padded here.
        targets: one a prompt.
        settings: how the pass is made.

    Raises:
        DePassError: the model's values are not finite.
    """
    at = [prompt.resolve_position(target.position) for prompt, target in zip(prompts, targets, strict=True)]
    with exact(decoder.device):
        # Nothing behind the target's position can reach it: it is cut off.
        recording = _record(decoder, prompts, at, [position + 1 for position in at], settings)
        logits = torch.stack(
            [recording.logits[i, recording.kept.index(position)] for i, position in enumerate(at)]
        ).to(decoder.dtype)
        wanted = [
            target_ids(
                target, prompt.text_until(position), tokenizer, decoder.vocabulary_size, int(row.argmax())
            )
            for prompt, target, position, row in zip(prompts, targets, at, logits, strict=True)
        ]
        carry = _carry(
            recording, settings, recording.layers, torch.tensor(at, device=decoder.device)[:, None]
        )
        scores, constants = _scores(decoder, carry.read(recording.final_norm)[:, :, 0], wanted)
        if settings.bias:
            scores[:, 0] += constants
            scores = torch.cat([scores[:, 1:], scores[:, :1]], 1)
    reading = _Reading(decoder, tokenizer, settings)
    return [
        reading.attribution(prompt, position, ids, row, score)
        for prompt, position, ids, row, score in zip(prompts, at, wanted, logits, scores, strict=True)
    ]


def decompose_batch(
    decoder: Decoder, prompts: list[Prompt], settings: Settings, stop: int
) -> list[Decomposition]:
    """Decompose one batch.

    Args:
        decoder: the model.
        prompts: the prompts, padded here.
        settings: how the pass is made.
        stop: the layer whose components are wanted.

    Raises:
        DePassError: the model's values are not finite.
    """
    lengths = [len(prompt.ids) for prompt in prompts]
    with exact(decoder.device):
        recording = _record(decoder, prompts, [length - 1 for length in lengths], lengths, settings)
        states = dense_components(_carry(recording, settings, stop), settings.bias)
    results = []
    for prompt, own, count in zip(prompts, states, lengths, strict=True):
        kept = torch.cat([own[:count], own[-1:]]) if settings.bias else own[:count]
        names = settings.source.names(prompt.tokens) + (["bias"] if settings.bias else [])
        results.append(Decomposition(kept[:, :count], names, stop))
    return results


def _record(
    decoder: Decoder, prompts: list[Prompt], positions: list[int], lengths: list[int], settings: Settings
) -> Recording:
    ids = pad([prompt.ids[:length] for prompt, length in zip(prompts, lengths, strict=True)])
    return record(
        decoder,
        ids.to(decoder.device),
        torch.tensor(lengths, device=decoder.device),
        torch.tensor(positions, device=decoder.device)[:, None],
        keep_everything=recorded_bytes(decoder, *ids.shape) <= settings.budget.recording,
    )


def _carry(recording: Recording, settings: Settings, stop: int, positions: Tensor | None = None) -> Carry:
    first = resolve_layer(settings.source.layer, recording.layers, type(settings.source).__name__)
    carry = settings.source.split(
        recording,
        bias=settings.bias,
        competing=not isinstance(settings.rule, Taylor),
        budget=settings.budget,
    )
    for _, reached in propagate(recording, carry, settings.rule, first=first, stop=stop, positions=positions):
        carry = reached
    return carry


def _scores(
    decoder: Decoder, states: Float[Tensor, "batch component hidden"], wanted: list[list[int]]
) -> tuple[Float[Tensor, "batch component"], Float[Tensor, "batch"]]:
    """Each component's part of its prompt's target, and what the unembedding's bias adds."""
    vectors, constants = [], []
    for ids in wanted:
        rows, biases = decoder.readout(torch.tensor(ids, device=states.device))
        signs = rows.new_tensor([1, -1][: len(ids)])
        vectors.append(signs @ rows)
        constants.append(signs @ biases)
    return (states @ torch.stack(vectors)[:, :, None])[:, :, 0], torch.stack(constants)


@dataclass(frozen=True)
class _Reading:
    """Makes `Attribution`s of what a batch's pass gave."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    settings: Settings

    def attribution(
        self, prompt: Prompt, position: int, ids: list[int], logits: Tensor, scores: Tensor
    ) -> Attribution:
        """Name one prompt's scores; `ids` are the token that is explained and, for a contrast, its foil."""
        settings, count = self.settings, len(prompt.ids)
        own = scores[:-1] if settings.bias else scores
        full = scores.new_zeros(count + int(settings.bias))
        # Tokens behind the target's position stay at zero: they cannot have contributed.
        full[: position + 1] = own[: position + 1]
        if settings.bias:
            full[-1] = scores[-1]
        return Attribution(
            scores=full,
            names=settings.source.names(prompt.tokens) + (["bias"] if settings.bias else []),
            value=float(logits[ids[0]] - (logits[ids[1]] if len(ids) == 2 else 0)),
            target=" − ".join(repr(token_text(token, self.tokenizer)) for token in ids),
            text=prompt.text,
            tokens=prompt.tokens,
            token_ids=prompt.ids,
            offsets=prompt.offsets,
            positions=settings.source.positions(count) + ([None] if settings.bias else []),
            source=settings.source.kind,
            rule=settings.rule_name,
            layer=resolve_layer(settings.source.layer, len(self.decoder.blocks), settings.source.kind),
            position=position,
            prediction=token_text(int(logits.argmax()), self.tokenizer),
            probability=float(logits.softmax(-1)[ids[0]]),
            rank=int((logits > logits[ids[0]]).sum()),
            metadata=self._metadata(ids),
        )

    def _metadata(self, ids: list[int]) -> dict[str, Any]:
        settings = self.settings
        metadata: dict[str, Any] = {
            "model": self.decoder.name,
            "bias": settings.bias_mode,
            "target_ids": ids,
        }
        if settings.rule_name == "softmax":
            metadata["temperature"] = getattr(settings.rule, "temperature", None)
        if settings.compat:
            metadata["compat"] = settings.compat
        return metadata
