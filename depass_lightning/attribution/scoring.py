"""Score every component of every source for a batch's targets.

Forward, components are propagated to the targets, one sweep a source: their states do not depend on what is
read from them, so all targets that are read at one layer share it. Backward, under a linear rule, a target's
gradient is propagated to where the components begin, one sweep a target, which all sources share.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.attribution.forward import propagate_to
from depass_lightning.attribution.readout import Readout
from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.adjoint import BlockGradients, backward
from depass_lightning.engine.component_groups import NeuronGroup
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import SoftmaxRule
from depass_lightning.engine.variants.rounding import RoundingScores
from depass_lightning.engine.variants.top_neurons import ApproximationError, TopNeuronApproximation
from depass_lightning.errors import DePassError
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Source, SplitContext


@dataclass(frozen=True)
class Scores:
    """One source's scores for the targets of a readout.

    Args:
        values: the scores.
        errors: `[target][batch]` how far approximated scores may be off; None where they are exact.
    """

    values: Float[Tensor, "batch target group component"]
    errors: list[list[ApproximationError]] | None = None

    def notes(self, row: int, target: int) -> dict[str, Any]:
        """The metadata of one prompt's scores for one target."""
        return {} if self.errors is None else {"approximation": asdict(self.errors[target][row])}


def score(
    recording: Recording, prompts: Sequence[Prompt], readout: Readout, settings: Settings
) -> list[Scores]:
    """Score every source's components for each target.

    Returns:
        For each source its scores, the bias component's and then rounding's last in each group.

    Raises:
        DePassError: a source's components begin after the layer at which the targets are read.
    """
    context = settings.split_context(prompts)
    if not settings.adjoint:
        return _scores_together(recording, readout, settings, context)
    # As many targets together as fit into working memory.
    width = 2 * (recording.decoder.hidden_size + recording.decoder.neurons)
    rows = settings.budget.rows(width, recording.dtype)
    parts = [
        _scores_together(recording, part, settings, context)
        for part in readout.split(max(1, rows // recording.input_ids.numel()))
    ]
    by_source = zip(*parts, strict=True)
    return [Scores(torch.cat([part.values for part in of_source], 1)) for of_source in by_source]


def _scores_together(
    recording: Recording, readout: Readout, settings: Settings, context: SplitContext
) -> list[Scores]:
    """Score every source's components for targets that are propagated back, or read, together."""
    rounding = RoundingScores(settings.rule) if settings.rounding else None
    if settings.adjoint:
        scores = _scores_backward(recording, readout, settings, context, rounding)
    else:
        scores = [
            _scores_forward(recording, source, readout, settings, context) for source in settings.sources
        ]
    values = [source_scores.values for source_scores in scores]
    if settings.bias:  # propagated as the first component of each group
        values = [of_source.roll(-1, dims=-1) for of_source in values]
    if rounding is not None:
        groups = _rounding(recording, readout, settings, rounding)
        values = [torch.cat(both, -1) for both in zip(values, groups, strict=True)]
    return [Scores(of_source, old.errors) for of_source, old in zip(values, scores, strict=True)]


def _scores_forward(
    recording: Recording, source: Source, readout: Readout, settings: Settings, context: SplitContext
) -> Scores:
    """Propagate one source's components to the targets, or read them where they begin next to these."""
    parts = []
    for part in source.per_layer(recording.layers):
        if _read_next_to_target(part, readout, recording.layers):
            parts.append(_scores_of_neurons(recording, part, readout, settings, context))
        else:
            parts.append(_scores_of_propagated(recording, part, readout, settings, context))
    return _joined(parts)


def _scores_of_propagated(
    recording: Recording, source: Source, readout: Readout, settings: Settings, context: SplitContext
) -> Scores:
    """Propagate components once, and read each target from them where it is."""
    # [batch, target * read]; reads often share a position: [batch, place], and each read's place
    positions, vectors = readout.positions.flatten(1), readout.vectors.flatten(1, 2)
    batch, targets, reads = readout.positions.shape
    places, place_of_read = positions.unique(dim=1, return_inverse=True)
    count = places.shape[1]
    # At more places than a head has values, the last attention is cheaper at all positions.
    few = count <= recording.decoder.hidden_size // recording.decoder.heads
    state = propagate_to(
        recording, source, settings, context, readout.layer, positions=places if few else None
    )
    scores = vectors.new_zeros(batch, targets, state.layout.components)
    reads_at: dict[int, list[int]] = {}
    for read, place in enumerate(place_of_read.tolist()):
        reads_at.setdefault(place, []).append(read)
    for place, selected in reads_at.items():  # one place after another, to bound memory
        index = torch.full_like(places[:, :1], place) if few else places[:, place : place + 1]
        state_there = state if few and count == 1 else state.select_positions(index)
        states = state_there.read(recording.final_norm) if readout.normed else state_there.dense()
        # [batch, read, hidden] @ [batch, hidden, component]
        read_there = vectors[:, selected] @ states[:, :, 0].mT
        of_target = torch.tensor(selected, device=scores.device) // reads
        scores.index_add_(1, of_target, read_there)
    if settings.parallel is not None:
        scores = settings.parallel.summed(scores)
    grouped = scores.unflatten(2, (state.layout.groups, -1))  # [batch, target, group, component]
    if settings.bias:
        grouped[..., 0] += readout.constants[..., None]
    return Scores(grouped)


def _read_next_to_target(source: Source, readout: Readout, layers: int) -> bool:
    """Whether scores are computed without propagating all of a source's components to the target.

    A block's neurons are read at once where the target is read from the next block's input, and the
    approximation by the largest neurons is worthwhile from two blocks further on.
    """
    distance = readout.layer - source.layers(layers)[0]
    return source.read_directly(distance) or (source.top is not None and distance > 2)


def _scores_of_neurons(
    recording: Recording, source: Source, readout: Readout, settings: Settings, context: SplitContext
) -> Scores:
    """Score one block's neurons for each target, directly or by their approximation."""
    (layer,) = source.layers(recording.layers)
    split = source.split(recording, context)
    group = None if layer >= readout.layer else split.inside(recording.block(layer), "resid_post")
    if not isinstance(group, NeuronGroup):
        raise DePassError(f"neurons of block {layer} begin after layer {readout.layer}; take a later layer")
    scores, errors = [], []
    for target, positions in enumerate(readout.positions.unbind(1)):
        gradient, directions = readout.gradient(recording, target), readout.directions(recording, target)
        if readout.layer == layer + 1:
            values = group.read(positions, directions)  # [batch, component]
        else:
            assert isinstance(settings.rule, SoftmaxRule)
            assert source.top is not None
            approximation = TopNeuronApproximation(
                recording,
                split,
                group,
                settings.rule,
                gradient,
                (positions, directions),
                layer + 1,
                readout.layer,
            )
            values, error = approximation.estimate(source.top)
            errors.append(error)
        if settings.bias:
            values[:, 0] += gradient.constants
        scores.append(values)
    return Scores(torch.stack(scores, 1)[:, :, None], errors or None)


def _joined(parts: Sequence[Scores]) -> Scores:
    """Join the groups of one source; of several approximations keep the worst error."""
    values = torch.cat([part.values for part in parts], 2)
    approximated = [part.errors for part in parts if part.errors is not None]
    if not approximated:
        return Scores(values)
    errors = [
        [_worst(errors_of_row) for errors_of_row in zip(*errors_of_target, strict=True)]
        for errors_of_target in zip(*approximated, strict=True)
    ]
    return Scores(values, errors)


def _worst(errors: Sequence[ApproximationError]) -> ApproximationError:
    return ApproximationError(
        top=min(error.top for error in errors),
        relative_change=max(error.relative_change for error in errors),
        spearman=min(error.spearman for error in errors),
    )


def _scores_backward(
    recording: Recording,
    readout: Readout,
    settings: Settings,
    context: SplitContext,
    rounding: RoundingScores | None,
) -> list[Scores]:
    """Propagate the targets' gradients back together; one sweep gives the scores of all sources."""
    assert isinstance(settings.rule, LinearPaths)
    scores = _swept_back(recording, settings.rule, readout, settings, context, rounding)
    if settings.attention_path == "control":
        free = replace(settings.rule, control=1.0)
        both = _swept_back(recording, free, readout, settings, context, None)
        scores = [all_paths - content for all_paths, content in zip(both, scores, strict=True)]
    return [Scores(of_source) for of_source in scores]


def _swept_back(
    recording: Recording,
    rule: LinearPaths,
    readout: Readout,
    settings: Settings,
    context: SplitContext,
    rounding: RoundingScores | None,
) -> list[Float[Tensor, "batch target group component"]]:
    """Score the components of all sources, and the rounding error, by one backward sweep."""
    layers = [source.layers(recording.layers) for source in settings.sources]
    scores: list[list[Tensor]] = [[] for _ in settings.sources]  # from the last block to the first
    targets = readout.gradients(recording)
    first = min(blocks[0] for blocks in layers)
    for gradients in backward(recording, rule, targets, layer=readout.layer, first=first):
        if rounding is not None:
            rounding.add(gradients)
        block = gradients[0].block.index
        for source, blocks, groups in zip(settings.sources, layers, scores, strict=True):
            if block in blocks:
                by_target = [_group(recording, source, context, of_target) for of_target in gradients]
                groups.append(torch.stack(by_target, 1))
        del gradients  # releases the block's gathered weights before the next block's are gathered
    return [torch.stack(groups[::-1], 2) for groups in scores]


def _group(
    recording: Recording, source: Source, context: SplitContext, gradients: BlockGradients
) -> Float[Tensor, "batch component"]:
    """Score the components that begin in a block for one target."""
    group = source.inside_scores(gradients, context)
    if group is None:
        group = source.entry_scores(recording, context, gradients.block.index, gradients.resid_pre)
    assert group is not None
    return group


def _rounding(
    recording: Recording, readout: Readout, settings: Settings, rounding: RoundingScores
) -> list[Float[Tensor, "batch target group 1"]]:
    """Score what the model rounds off, from where each source's groups begin; the logits' own included."""
    targets = readout.gradients(recording)
    if not settings.adjoint:
        first = min(source.layers(recording.layers)[0] for source in settings.sources)
        rounding.sweep(recording, targets, layer=readout.layer, first=first)
    state = recording.state(readout.layer)
    read = torch.stack([(target.states * state).sum((1, 2)) + target.constants for target in targets], 1)
    last = readout.values.to(read) - read  # [batch, target]
    groups = []
    for source in settings.sources:
        blocks = source.layers(recording.layers)
        groups.append(torch.stack([rounding.sums[layer][source.after_mlp] + last for layer in blocks], 2))
    return [group[..., None] for group in groups]
