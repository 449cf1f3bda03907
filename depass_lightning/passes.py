"""One batch's way through a decomposed pass: record, split, carry, read (or read, and carry back).

The functions take what `depass.py` has checked; they know neither the order of a call's prompts nor its
defaults.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.engine.adjoint import at_readout, pull_back
from depass_lightning.engine.bulk import Bulk
from depass_lightning.engine.carry import Carry
from depass_lightning.engine.groups import RankOne
from depass_lightning.engine.memory import Budget
from depass_lightning.engine.propagate import propagate
from depass_lightning.engine.record import Recording, exact, record, recorded_bytes
from depass_lightning.engine.rounding import rounding_scores, rounding_states
from depass_lightning.engine.rules import LinearPaths, Rule, Softmax
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad
from depass_lightning.sources import Neurons, Pass, Source


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
        sources: what the state is split into, each by itself.
        rule: how neurons are shared.
        rule_name: what the rule is called.
        bias: whether constants have a component of their own.
        rounding: whether the model's own rounding has one.
        bias_mode: what becomes of constants: component, drop, or none where the model has none.
        compat: `release` for the published code's behaviour, else None.
        adjoint: take scores back from the target instead of carrying components to it.
        path: content, or control for what comes on top where attention's probabilities are not held fixed.
        budget: the engine's memory.

    Raises:
        DePassError: a source approximates what this pass has exact, or does not have.
    """

    sources: tuple[Source, ...]
    rule: Rule
    rule_name: str
    bias: bool
    rounding: bool
    bias_mode: str
    compat: str | None
    adjoint: bool
    path: str
    budget: Budget

    def __post_init__(self) -> None:
        softmax = self.rule_name == "softmax" and self.compat is None and self.bias_mode != "drop"
        if not softmax and any(_top(source) is not None for source in self.sources):
            raise DePassError(
                "Neurons(top=) approximates rule='softmax' with every constant carried (bias='component', no "
                "compat); leave top out"
            )

    @property
    def extras(self) -> list[str]:
        """The components that stand behind a source's own in each group."""
        return ["bias"] * self.bias + ["rounding"] * self.rounding

    def begin(self, prompts: list[Prompt]) -> Pass:
        """What sources must know of a batch's pass."""
        return Pass(
            prompts,
            bias=self.bias,
            competing=not isinstance(self.rule, LinearPaths),
            release=self.compat == "release",
            budget=self.budget,
        )


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
    with exact(decoder.device):
        recording = _record_whole(decoder, prompts, settings)
        carry = _carry(recording, settings.sources[0], settings, settings.begin(prompts), stop)
        return _decompositions(carry, recording, prompts, settings, stop)


def decompose_layers(decoder: Decoder, prompt: Prompt, settings: Settings) -> Iterator[Decomposition]:
    """Decompose one prompt at every layer, one after another, from the first where all components are there.

    Args:
        decoder: the model.
        prompt: the prompt.
        settings: how the pass is made.

    Yields:
        The decompositions, of which none is kept here.

    Raises:
        DePassError: the model's values are not finite.
    """
    source = settings.sources[0]
    recording = _record_whole(decoder, [prompt], settings)
    split = source.split(recording, settings.begin([prompt]))
    for layer, carry in propagate(recording, split, settings.rule, stop=recording.layers):
        if carry.layout.groups == len(source.layers(recording.layers)):
            yield _decompositions(carry, recording, [prompt], settings, layer)[0]


def _record_whole(decoder: Decoder, prompts: list[Prompt], settings: Settings) -> Recording:
    if _top(settings.sources[0]) is not None:
        raise DePassError("Neurons(top=) gives scores, not states; leave top out to decompose")
    lengths = [len(prompt.ids) for prompt in prompts]
    return record_batch(decoder, prompts, [[length - 1] for length in lengths], lengths, settings)


def _decompositions(
    carry: Carry, recording: Recording, prompts: list[Prompt], settings: Settings, layer: int
) -> list[Decomposition]:
    states = carry.dense().unflatten(1, (carry.layout.groups, -1))
    decoder, results = recording.decoder, []
    rounded = torch.empty(0)
    if settings.rounding:
        (source,) = settings.sources
        starts, behind = source.layers(recording.layers), source.behind_mlp
        rounded = rounding_states(recording, settings.rule, starts, behind_mlp=behind, stop=layer)
    for row, (prompt, own) in enumerate(zip(prompts, states, strict=True)):
        names, _ = described(settings.sources[0], prompt, decoder, settings)
        members = len(names) // len(own) - int(settings.rounding)
        # The bias component is carried first and named last; what longer prompts have more is padding.
        kept = torch.cat([own[:, 1:members], own[:, :1]], 1) if settings.bias else own[:, :members]
        if settings.rounding:
            kept = torch.cat([kept, rounded[row][:, None]], 1)
        results.append(Decomposition(kept.flatten(0, 1)[:, : len(prompt.ids)], names, layer))
    return results


@dataclass(frozen=True)
class Reading:
    """How the targets of a batch are read from the states where they stand.

    Args:
        layer: where they stand; the number of blocks is behind the last one.
        positions: `[batch]` each prompt's position.
        vectors: `[batch, hidden]` what the state is multiplied with.
        constants: `[batch]` what is added.
        values: `[batch]` the model's own values of the targets.
        normed: the state is read behind the final norm.
    """

    layer: int
    positions: Tensor
    vectors: Float[Tensor, "batch hidden"]
    constants: Float[Tensor, "batch"]
    values: Float[Tensor, "batch"]
    normed: bool


@dataclass(frozen=True)
class Scored:
    """One prompt's scores for one source.

    Args:
        values: the scores, the bias component's last in each group.
        notes: what is to be said about how they were got.
    """

    values: Float[Tensor, "group component"]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """A batch's scores for one source, one `Scored` a prompt (or a target)."""

    values: Float[Tensor, "batch group component"]
    notes: list[dict[str, Any]]

    def __getitem__(self, row: int) -> Scored:
        return Scored(self.values[row], self.notes[row])


def score_batch(
    recording: Recording, prompts: list[Prompt], settings: Settings, reading: Reading
) -> list[Scores]:
    """Score every source's components for a batch's targets.

    Args:
        recording: the recorded pass.
        prompts: the prompts, in the recording's order.
        settings: how the pass is made.
        reading: how the targets are read.
    """
    begin = settings.begin(prompts)
    if settings.adjoint:
        assert isinstance(settings.rule, LinearPaths)
        groups = _pulled_back(recording, settings, settings.rule, begin, reading)
        if settings.path == "control":
            free = _pulled_back(recording, settings, replace(settings.rule, control=1.0), begin, reading)
            groups = [both - content for both, content in zip(free, groups, strict=True)]
        scores = [Scores(own, [{} for _ in prompts]) for own in groups]
    else:
        scores = [_carried(recording, source, settings, begin, reading) for source in settings.sources]
    return finished(recording, scores, settings, [reading])


def finished(
    recording: Recording, scores: list[Scores], settings: Settings, readings: Sequence[Reading]
) -> list[Scores]:
    """Put the bias component, which is carried first, behind the others of its group, and rounding last.

    Args:
        recording: the recorded pass.
        scores: of each source, all readings one behind the other.
        settings: how the pass is made.
        readings: how the targets were read, all at one layer.
    """
    if settings.bias:
        scores = [
            replace(own, values=torch.cat([own.values[..., 1:], own.values[..., :1]], -1)) for own in scores
        ]
    if not settings.rounding:
        return scores
    first = min(source.layers(recording.layers)[0] for source in settings.sources)
    each = [_rounding(recording, settings, reading, first) for reading in readings]
    found = []
    for own, source in zip(scores, settings.sources, strict=True):
        layers = source.layers(recording.layers)
        rounded = torch.cat(
            [torch.stack([sums[layer][source.behind_mlp] for layer in layers], 1) for sums in each]
        )
        found.append(replace(own, values=torch.cat([own.values, rounded[..., None]], -1)))
    return found


def _rounding(
    recording: Recording, settings: Settings, reading: Reading, first: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """What rounding from each block on adds to the targets, that of the logits themselves included."""
    derivative = at_readout(
        recording, reading.positions, reading.vectors, reading.constants, normed=reading.normed
    )
    batch = torch.arange(len(reading.positions), device=reading.positions.device)
    place = batch, reading.positions
    read = (derivative.states[place] * recording.state(reading.layer)[place]).sum(1) + derivative.constants
    last = reading.values.to(read) - read
    sums = rounding_scores(recording, settings.rule, derivative, layer=reading.layer, first=first)
    return {layer: (before + last, behind + last) for layer, (before, behind) in sums.items()}


def _carried(
    recording: Recording, source: Source, settings: Settings, begin: Pass, reading: Reading
) -> Scores:
    """Scores by carrying components to the target."""
    parts = []
    for own in source.apart(recording.layers):
        scores = uncarried(recording, own, settings, begin, reading)
        if scores is None:
            carry = _carry(recording, own, settings, begin, reading.layer, reading.positions[:, None])
            states = carry.read(recording.final_norm) if reading.normed else carry.dense()
            values = (states[:, :, 0] @ reading.vectors[:, :, None])[:, :, 0]
            values = values.unflatten(1, (carry.layout.groups, -1))
            if settings.bias:
                values[:, :, 0] += reading.constants[:, None]
            scores = Scores(values, [{} for _ in values])
        parts.append(scores)
    return joined(parts)


def uncarried(
    recording: Recording, source: Source, settings: Settings, begin: Pass, reading: Reading
) -> Scores | None:
    """Scores, the bias component first, of neurons that need not all be carried to the target.

    Returns:
        None where they must be, or the components are no neurons.
    """
    if not isinstance(source, Neurons):
        return None
    (layer,) = source.layers(recording.layers)
    near = reading.layer - layer
    if near > 1 and (source.top is None or near == 2):
        return None
    split = source.split(recording, begin)
    group = None if near < 1 else split.inside(recording.block(layer), "after")
    if not isinstance(group, RankOne):
        raise DePassError(f"neurons of block {layer} begin behind layer {reading.layer}; take a later layer")
    derivative = at_readout(
        recording, reading.positions, reading.vectors, reading.constants, normed=reading.normed
    )
    if near == 1:
        batch = torch.arange(len(reading.positions), device=reading.positions.device)
        values, notes = group.read(reading.positions, derivative.states[batch, reading.positions]), None
    else:
        assert isinstance(settings.rule, Softmax)
        assert source.top is not None
        bulk = Bulk(
            recording, split, group, settings.rule, derivative, reading.positions, layer + 1, reading.layer
        )
        values, estimates = bulk.estimate(source.top)
        notes = [{"approximation": asdict(estimate)} for estimate in estimates]
    if settings.bias:
        values[:, 0] += derivative.constants
    return Scores(values[:, None], notes or [{} for _ in values])


def joined(parts: list[Scores]) -> Scores:
    """One source's scores from those of its groups; of approximations the worst is noted."""
    notes = []
    for own in zip(*(part.notes for part in parts), strict=True):
        made = [note["approximation"] for note in own if note]
        worst = {
            name: pick(each[name] for each in made)
            for name, pick in (("top", min), ("relative_change", max), ("spearman", min))
            if made
        }
        notes.append({"approximation": worst} if made else {})
    return Scores(torch.cat([part.values for part in parts], 1), notes)


def _top(source: Source) -> int | None:
    return source.top if isinstance(source, Neurons) else None


def _pulled_back(
    recording: Recording, settings: Settings, rule: LinearPaths, begin: Pass, reading: Reading
) -> list[Tensor]:
    """Scores of all sources from one backward pass."""
    derivative = at_readout(
        recording, reading.positions, reading.vectors, reading.constants, normed=reading.normed
    )
    wanted = [source.layers(recording.layers) for source in settings.sources]
    scores: list[dict[int, Tensor]] = [{} for _ in settings.sources]
    first = min(layers[0] for layers in wanted)
    for at in pull_back(recording, rule, derivative, layer=reading.layer, first=first):
        for source, layers, own in zip(settings.sources, wanted, scores, strict=True):
            if at.block.index in layers:
                found = source.inside_scores(at, begin)
                if found is None:
                    found = source.entry_scores(recording, begin, at.block.index, at.entry)
                assert found is not None
                own[at.block.index] = found
    return [torch.stack([own[layer] for layer in sorted(own)], 1) for own in scores]


def record_batch(
    decoder: Decoder,
    prompts: list[Prompt],
    positions: list[list[int]],
    lengths: list[int],
    settings: Settings,
) -> Recording:
    """Record one batch.

    Args:
        decoder: the model.
        prompts: the prompts, padded here.
        positions: where each prompt's logits are wanted, as many places a prompt.
        lengths: how many of each prompt's tokens take part.
        settings: how the pass is made.

    Raises:
        DePassError: the model's values are not finite.
    """
    ids = pad([prompt.ids[:length] for prompt, length in zip(prompts, lengths, strict=True)])
    return record(
        decoder,
        ids.to(decoder.device),
        torch.tensor(lengths, device=decoder.device),
        torch.tensor(positions, device=decoder.device),
        keep_everything=recorded_bytes(decoder, *ids.shape) <= settings.budget.recording,
    )


def _carry(
    recording: Recording,
    source: Source,
    settings: Settings,
    begin: Pass,
    stop: int,
    positions: Tensor | None = None,
) -> Carry:
    carry = None
    split = source.split(recording, begin)
    for _, reached in propagate(recording, split, settings.rule, stop=stop, positions=positions):
        carry = reached
    if carry is None or carry.layout.groups < len(source.layers(recording.layers)):
        raise DePassError(f"some components of {source.kind!r} begin behind layer {stop}; take a later layer")
    return carry


def described(
    source: Source, prompt: Prompt, decoder: Decoder, settings: Settings
) -> tuple[list[str], list[tuple[int, int] | None]]:
    """The names and token ranges of all components of a prompt, each group's bias and rounding last.

    Args:
        source: what its state is split into.
        prompt: the prompt.
        decoder: the model.
        settings: how the pass is made.
    """
    description = source.describe(prompt, decoder)
    layers = source.layers(len(decoder.blocks))
    names, positions = [], []
    for layer, group in zip(layers, description.names, strict=True):
        last = [f"layer {layer} {name}" if len(layers) > 1 else name for name in settings.extras]
        names += [*group, *last]
        positions += [*description.positions, *([None] * len(last))]
    return names, positions
