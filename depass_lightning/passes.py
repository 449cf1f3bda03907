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
from depass_lightning.engine.carry import Carry
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, exact, record, recorded_bytes
from depass_lightning.engine.rules import Rule, Taylor
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad, token_text
from depass_lightning.sources import Pass, Source
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
        positions = torch.tensor(at, device=decoder.device)[:, None]
        carry = _carry(recording, prompts, settings, recording.layers, positions)
        scores, constants = _scores(decoder, carry.read(recording.final_norm)[:, :, 0], wanted)
        groups = scores.unflatten(1, (carry.layout.groups, -1))
        if settings.bias:
            groups[:, :, 0] += constants[:, None]
            groups = torch.cat([groups[:, :, 1:], groups[:, :, :1]], 2)
    reading = _Reading(decoder, tokenizer, settings)
    return [
        reading.attribution(prompt, position, ids, row, score)
        for prompt, position, ids, row, score in zip(prompts, at, wanted, logits, groups, strict=True)
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
        carry = _carry(recording, prompts, settings, stop)
        states = carry.dense().unflatten(1, (carry.layout.groups, -1))
    results = []
    for prompt, own, count in zip(prompts, states, lengths, strict=True):
        names, _ = _described(prompt, decoder, settings)
        members = len(names) // len(own)
        # The bias component is carried first and named last; what longer prompts have more is padding.
        kept = torch.cat([own[:, 1:members], own[:, :1]], 1) if settings.bias else own[:, :members]
        results.append(Decomposition(kept.flatten(0, 1)[:, :count], names, stop))
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


def _carry(
    recording: Recording,
    prompts: list[Prompt],
    settings: Settings,
    stop: int,
    positions: Tensor | None = None,
) -> Carry:
    begin = Pass(
        prompts,
        bias=settings.bias,
        competing=not isinstance(settings.rule, Taylor),
        release=settings.compat == "release",
        budget=settings.budget,
    )
    split = settings.source.split(recording, begin)
    carry = None
    for _, reached in propagate(recording, split, settings.rule, stop=stop, positions=positions):
        carry = reached
    assert carry is not None
    return carry


def _described(
    prompt: Prompt, decoder: Decoder, settings: Settings
) -> tuple[list[str], list[tuple[int, int] | None]]:
    """The names and token ranges of all components, each group's bias component last."""
    described = settings.source.describe(prompt, decoder)
    layers = settings.source.layers(len(decoder.blocks))
    names, positions = [], []
    for layer, group in zip(layers, described.names, strict=True):
        bias = [f"layer {layer} bias" if len(layers) > 1 else "bias"] if settings.bias else []
        names += [*group, *bias]
        positions += [*described.positions, *([None] * len(bias))]
    return names, positions


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
        settings = self.settings
        names, positions = _described(prompt, self.decoder, settings)
        members = len(names) // len(scores) - int(settings.bias)
        # What begins behind the target's position was cut off and stays at zero: it cannot have contributed.
        # What longer prompts of the batch have more is padding.
        own = (scores[:, :-1] if settings.bias else scores)[:, :members]
        full = scores.new_zeros(len(scores), members)
        full[:, : own.shape[1]] = own
        if settings.bias:
            full = torch.cat([full, scores[:, -1:]], 1)
        return Attribution(
            scores=full.flatten(),
            names=names,
            value=float(logits[ids[0]] - (logits[ids[1]] if len(ids) == 2 else 0)),
            target=" − ".join(repr(token_text(token, self.tokenizer)) for token in ids),
            text=prompt.text,
            tokens=prompt.tokens,
            token_ids=prompt.ids,
            offsets=prompt.offsets,
            positions=positions,
            source=settings.source.kind,
            rule=settings.rule_name,
            layer=settings.source.layers(len(self.decoder.blocks))[0],
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
