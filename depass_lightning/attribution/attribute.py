"""From a batch's targets to the `Attribution`s that a call returns."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.forward import described, record_batch
from depass_lightning.attribution.scoring import Readout, Scored, score_batch, score_targets
from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.record import Recording
from depass_lightning.errors import DePassError, DePassWarning
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, read_length
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.sources import Source, resolve_layer
from depass_lightning.targets import (
    Contrast,
    Direction,
    ProbeLogit,
    Target,
    Token,
    finite,
    inner_reading,
    target_ids,
)
from depass_lightning.utils.tokenization import token_text

GAP = 1e-2  # a completeness that is no rounding


@dataclass(frozen=True)
class _Answer:
    """One prompt's target as the model itself has it."""

    position: int
    ids: list[int]
    name: str
    value: float
    logits: Float[Tensor, "vocabulary"]


def reading_layer(target: Target, layers: int) -> int:
    """Where a target stands: the block whose input is read, or the number of blocks.

    Args:
        target: the target.
        layers: the model's number of blocks.

    Raises:
        DePassError: the model has no such layer.
    """
    if isinstance(target, (Token, Contrast)) or target.layer in (None, layers):
        return layers
    return resolve_layer(target.layer, layers, type(target).__name__)


def reading_place(target: Target, layers: int) -> int:
    """What targets that are read together have in common: the layer, and behind it the final norm.

    Args:
        target: the target.
        layers: the model's number of blocks.

    Raises:
        DePassError: the model has no such layer.
    """
    return layers + 1 if isinstance(target, (Token, Contrast)) else reading_layer(target, layers)


def check_target(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, target: Target, first: int
) -> None:
    """Refuse a target that cannot be explained, before anything expensive starts.

    Args:
        decoder: the model.
        tokenizer: its tokenizer, if there is one.
        prompt: the prompt.
        target: its target.
        first: the last layer at which a source begins.

    Raises:
        DePassError: as for `DePass.attribute`.
    """
    position = prompt.resolve_position(target.position)
    if isinstance(target, (Direction, ProbeLogit)):
        inner_reading(target, decoder.hidden_size)
        layer = reading_layer(target, len(decoder.blocks))
        if layer <= first:
            raise DePassError(
                f"{type(target).__name__} is read at layer {layer}, but the source begins at layer {first}; "
                "read it behind the source"
            )
    else:
        target_ids(target, prompt.text_until(position), tokenizer, decoder.vocabulary_size, own=0)


def warn_of_gaps(found: Iterable[Attribution | Attributions], settings: Settings) -> None:
    """Warn once where scores do not sum to the value although they should.

    Args:
        found: a call's results.
        settings: how they were got.
    """
    if not settings.complete:
        return
    each = (own for one in found for own in ([one] if isinstance(one, Attribution) else one))
    worst = max((own.completeness for own in each), default=0.0)
    if worst > GAP:
        warnings.warn(
            f"scores miss the value that they explain by up to {worst:.1e} of it (completeness; at most "
            "about 1e-5 is rounding). Likely causes: the model was changed after DePass(model) was made (a "
            "hook, a replaced or compiled part, an adapter added, merged or removed): make a new one; a "
            "forward hook changes what a part gives; or weights in half precision with values that overflow",
            DePassWarning,
            stacklevel=3,
        )


def attribute_batch(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: list[Prompt],
    targets: list[Target],
    settings: Settings,
) -> list[list[Attribution]]:
    """Attribute one batch whose targets are read at the same place.

    Args:
        decoder: the model.
        tokenizer: to name tokens by; None shows ids.
        prompts: the prompts, padded here.
        targets: one a prompt.
        settings: how the pass is made.

    Returns:
        For each prompt one attribution a source.

    Raises:
        DePassError: the model's values are not finite.
    """
    at = [prompt.resolve_position(target.position) for prompt, target in zip(prompts, targets, strict=True)]
    with alone(decoder.model):
        lengths = [read_length(decoder, own, place) for own, place in zip(prompts, at, strict=True)]
        recording = record_batch(decoder, prompts, [[place] for place in at], lengths, settings)
        reading, answers = _read(decoder, tokenizer, recording, prompts, targets, at)
        scores = score_batch(recording, prompts, settings, reading)
    naming = _Naming(decoder, tokenizer, settings)
    return [
        [
            naming.attribution(source, prompt, answer, own[row])
            for source, own in zip(settings.sources, scores, strict=True)
        ]
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def attribute_targets(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    targets: Sequence[Target],
    settings: Settings,
) -> list[Attributions]:
    """Attribute several targets of one prompt from one recorded pass.

    Components are carried once for all targets that are read at the same place.

    Args:
        decoder: the model.
        tokenizer: to name tokens by; None shows ids.
        prompt: the prompt.
        targets: at any of its positions and layers.
        settings: how the pass is made.

    Returns:
        For each source one attribution a target.

    Raises:
        DePassError: the model's values are not finite.
    """
    at = [prompt.resolve_position(target.position) for target in targets]
    naming = _Naming(decoder, tokenizer, settings)
    found: list[dict[int, Attribution]] = [{} for _ in settings.sources]
    with alone(decoder.model):
        recording = record_batch(decoder, [prompt], [at], [read_length(decoder, prompt, max(at))], settings)
        read = [
            _read(decoder, tokenizer, recording, [prompt], [target], [position])
            for target, position in zip(targets, at, strict=True)
        ]
        places = [reading_place(target, len(decoder.blocks)) for target in targets]
        for place in sorted(set(places)):
            own = [index for index, other in enumerate(places) if other == place]
            scores = score_targets(recording, prompt, settings, [read[index][0] for index in own])
            for source, each, attributions in zip(settings.sources, scores, found, strict=True):
                for row, index in enumerate(own):
                    attributions[index] = naming.attribution(source, prompt, read[index][1][0], each[row])
    return [Attributions([own[index] for index in range(len(targets))]) for own in found]


def _read(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    recording: Recording,
    prompts: list[Prompt],
    targets: list[Target],
    at: list[int],
) -> tuple[Readout, list[_Answer]]:
    """How a batch's targets are read, and what the model itself has there."""
    vectors, constants, answers = [], [], []
    layer = reading_layer(targets[0], recording.layers)
    for row, (prompt, target, position) in enumerate(zip(prompts, targets, at, strict=True)):
        at_position = row, recording.kept.index(position)
        logits = recording.logits[at_position].to(recording.dtype)
        uncapped = recording.uncapped[at_position].to(recording.dtype)
        if isinstance(target, (Direction, ProbeLogit)):
            vector, constant = inner_reading(target, decoder.hidden_size)
            vector = vector.to(recording.final_state)
            value = float(recording.state(layer)[row, position] @ vector) + constant
            name = "direction" if isinstance(target, Direction) else "probe logit"
            answers.append(_Answer(position, [], f"{name} at layer {layer}", value, logits))
            constants.append(vector.new_tensor(constant))
        else:
            text = prompt.text_until(position)
            ids = target_ids(target, text, tokenizer, decoder.vocabulary_size, int(logits.argmax()))
            rows, biases = decoder.readout(torch.tensor(ids, device=logits.device))
            signs = rows.new_tensor([1, -1][: len(ids)])
            vector = signs @ rows
            name = " − ".join(repr(token_text(token, tokenizer)) for token in ids)
            answers.append(_Answer(position, ids, name, finite(float(signs @ uncapped[ids]), name), logits))
            constants.append(signs @ biases)
        vectors.append(vector)
    normed = isinstance(targets[0], (Token, Contrast))
    positions = torch.tensor(at, device=recording.final_state.device)
    values = torch.tensor(
        [answer.value for answer in answers], device=positions.device, dtype=recording.dtype
    )
    return Readout(layer, positions, torch.stack(vectors), torch.stack(constants), values, normed), answers


@dataclass(frozen=True)
class _Naming:
    """Makes `Attribution`s of scores."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    settings: Settings

    def attribution(self, source: Source, prompt: Prompt, answer: _Answer, scored: Scored) -> Attribution:
        """Name one prompt's scores.

        Args:
            source: what the state was split into.
            prompt: the prompt.
            answer: what the model itself says of the target.
            scored: the scores.
        """
        constant_names, scores = len(self.settings.constant_names), scored.values
        names, positions = described(source, prompt, self.decoder, self.settings)
        members = len(names) // len(scores) - constant_names
        # What begins behind the target's position was cut off and stays at zero: it cannot have contributed.
        # What longer prompts of the batch have more is padding.
        whole = scores.shape[1] - constant_names
        own = scores[:, : min(whole, members)]
        full = scores.new_zeros(len(scores), members)
        full[:, : own.shape[1]] = own
        full = torch.cat([full, scores[:, whole:]], 1)
        logits = answer.logits
        return Attribution(
            scores=full.flatten(),
            names=names,
            value=answer.value,
            target=answer.name,
            text=prompt.text,
            tokens=prompt.tokens,
            token_ids=prompt.ids,
            offsets=prompt.offsets,
            positions=positions,
            source=source.kind,
            rule=self.settings.rule_name,
            layer=source.layers(len(self.decoder.blocks))[0],
            position=answer.position,
            prediction=token_text(int(logits.argmax()), self.tokenizer),
            probability=float(logits.softmax(-1)[answer.ids[0]]) if answer.ids else None,
            rank=1 + int((logits > logits[answer.ids[0]]).sum()) if answer.ids else None,
            groups=len(scores),
            metadata=self._metadata(prompt, answer) | scored.notes,
        )

    def _metadata(self, prompt: Prompt, answer: _Answer) -> dict[str, Any]:
        settings = self.settings
        metadata: dict[str, Any] = {"model": self.decoder.name, "bias": settings.bias_mode}
        if answer.ids:
            metadata["target_ids"] = answer.ids
        if settings.rule_name == "softmax":
            metadata["temperature"] = getattr(settings.rule, "temperature", None)
        if settings.attention_path != "content":
            metadata["attention_path"] = settings.attention_path
        if settings.compat:
            metadata["compat"] = settings.compat
        return metadata | prompt.notes()
