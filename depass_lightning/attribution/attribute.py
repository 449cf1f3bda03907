"""Attribute prompts batch by batch: from their questions to the `Attribution`s that a call returns."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.automatic_rule import AUTO
from depass_lightning.attribution.forward import describe_components, record_batch
from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.attribution.question import Question
from depass_lightning.attribution.readout import ModelAnswer, Readout
from depass_lightning.attribution.refinement import refine
from depass_lightning.attribution.scoring import Scores, score
from depass_lightning.attribution.settings import Settings, settings_of
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.linear_rules import CalibratedRule, ShapRule
from depass_lightning.errors import DePassWarning
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.results.attribution import Attribution
from depass_lightning.sources import Source
from depass_lightning.sources.tokens import Partition
from depass_lightning.targets import Continuation
from depass_lightning.utils.batching import in_batches

GAP = 1e-2  # a completeness error that is not rounding

BySource = list[list[Attribution]]  # [source][target]


def attribute(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    questions: Sequence[Sequence[Question]],
    settings: Settings,
    *,
    batch_size: int,
    progress: bool = False,
) -> list[BySource]:
    """Attribute every prompt's questions, batch by batch.

    Args:
        decoder: the model.
        tokenizer: to name tokens by; None shows ids.
        questions: `[prompt][target]`.
        settings: how the pass is made.
        batch_size: how many prompts with one question each go through the model at once; a prompt with more
            goes alone.
        progress: show a progress bar.

    Returns:
        `[prompt][source][target]`.

    Raises:
        DePassError: the model's values are not finite.
    """
    settings = settings.with_constants(question.constant for asked in questions for question in asked)

    def batch(indices: list[int]) -> list[BySource]:
        return attribute_batch(decoder, tokenizer, [questions[index] for index in indices], settings)

    kinds = []
    for index, asked in enumerate(questions):
        length = len(asked[0].prompt.ids)
        # What the prompts of a batch share: where their one target is read.
        shared = (0, *asked[0].place) if len(asked) == 1 else (1, index)
        kinds.append(((shared, decoder.regime(length)), length))
    results = in_batches(kinds, _fitting(decoder, questions, settings, batch_size), batch, progress)
    if settings.complete:
        warn_of_gaps(result for sources in results for targets in sources for result in targets)
    return results


def settings_by_rule(
    decoder: Decoder, sources: Sequence[Source], *, compat: str | None = None, **options: Any
) -> dict[tuple[int, ...], Settings]:
    """Check the arguments of a call with several sources, which take different rules under `rule="auto"`.

    Returns:
        The settings of each rule, by the indices of its sources.

    Raises:
        DePassError: as for `settings_of`.
    """
    if options.get("rule") != AUTO or not sources:
        return {tuple(range(len(sources))): settings_of(decoder, sources, compat=compat, **options)}
    indices: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        of_source = settings_of(decoder, [source], compat=compat, **options)
        indices.setdefault(of_source.rule_name, []).append(index)
    return {
        tuple(places): settings_of(decoder, [sources[index] for index in places], compat=compat, **options)
        for places in indices.values()
    }


def attribute_by_rule(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    questions: Sequence[Sequence[Question]],
    settings: Mapping[tuple[int, ...], Settings],
    *,
    batch_size: int,
    progress: bool = False,
) -> list[BySource]:
    """Attribute every prompt's questions to sources under several rules, with a separate pass for each rule.

    Returns:
        `[prompt][source][target]`.

    Raises:
        DePassError: as for `attribute`.
    """
    by_index: list[dict[int, list[Attribution]]] = [{} for _ in questions]
    for indices, of_rule in settings.items():
        results = attribute(decoder, tokenizer, questions, of_rule, batch_size=batch_size, progress=progress)
        for row, by_source in zip(by_index, results, strict=True):
            row.update(zip(indices, by_source, strict=True))
    return [[row[index] for index in sorted(row)] for row in by_index]


def _fitting(
    decoder: Decoder, questions: Sequence[Sequence[Question]], settings: Settings, batch_size: int
) -> int:
    """Return how many prompts may go through the model at once, so that the logits of answers fit in memory.

    A batch's logits are kept at all positions at which any of its prompts is read, at most those of the
    longest answer and as many more as the prompts' lengths differ by.
    """
    places = [
        read.position
        for asked in questions
        for question in asked
        if len(question.reads) > 1
        for read in question.reads
    ]
    if not places:
        return batch_size
    kept = max(places) - min(places) + 1
    row = 2 * kept * decoder.outputs * decoder.model_dtype.itemsize
    return max(1, min(batch_size, settings.budget.recording // row))


def attribute_batch(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    questions: Sequence[Sequence[Question]],
    settings: Settings,
) -> list[BySource]:
    """Attribute one batch of questions (Hong et al., section 3).

    1. Record one plain pass.
    2. Read each target's value from it.
    3. Split the state, and propagate its components to the targets or the targets' gradients to them.
    4. Score every component.
    5. Attach names.

    Args:
        decoder: the model.
        tokenizer: to name tokens by; None shows ids.
        questions: `[batch][target]`: as many a prompt, each at the same place in all prompts.
        settings: how the pass is made.

    Returns:
        `[batch][source][target]`.

    Raises:
        DePassError: the model's values are not finite.
    """
    prompts = [asked[0].prompt for asked in questions]
    positions = [[read.position for question in asked for read in question.reads] for asked in questions]
    places = [question.place for question in questions[0]]
    results: dict[tuple[int, int, int], Attribution] = {}
    with alone(decoder.model):
        recording = record_batch(decoder, prompts, positions, settings)  # 1
        for place in sorted(set(places)):
            targets = [target for target, other in enumerate(places) if other == place]
            asked_there = [[asked[target] for target in targets] for asked in questions]
            readout = Readout.of(recording, OutputNames.of(decoder, tokenizer), asked_there)  # 2
            refined = refine(recording, prompts, readout, settings)
            scores = score(recording, prompts, readout, refined)  # 3, 4
            for (row, source, index), result in assemble(decoder, asked_there, readout, scores, refined):  # 5
                results[row, source, targets[index]] = result
    return [
        [
            [results[row, source, target] for target in range(len(places))]
            for source in range(len(settings.sources))
        ]
        for row in range(len(prompts))
    ]


def assemble(
    decoder: Decoder,
    questions: Sequence[Sequence[Question]],
    readout: Readout,
    scores: Sequence[Scores],
    settings: Settings,
) -> Iterator[tuple[tuple[int, int, int], Attribution]]:
    """Name a batch's scores.

    Yields:
        The indices of prompt, source and target with their `Attribution`.
    """
    for row, asked in enumerate(questions):
        prompt = asked[0].prompt
        for index, (source, of_source) in enumerate(zip(settings.sources, scores, strict=True)):
            components = describe_components(source, prompt, decoder, settings)
            for target, question in enumerate(asked):
                answer = readout.answers[row][target]
                grouped = of_source.values[row, target]
                yield (
                    (row, index, target),
                    Attribution(
                        scores=_of_prompt(grouped, len(components), len(settings.constant_names)).flatten(),
                        components=components,
                        value=answer.value,
                        target=answer.name,
                        text=prompt.text,
                        tokens=prompt.tokens,
                        token_ids=prompt.ids,
                        offsets=prompt.offsets,
                        sections=list(prompt.sections),
                        source=source.kind,
                        rule=settings.rule_name,
                        layer=source.layers(len(decoder.blocks))[0],
                        position=question.position,
                        prediction=answer.prediction,
                        probability=answer.probability,
                        rank=answer.rank,
                        groups=len(grouped),
                        remainder=answer.remainder,
                        answer_start=prompt.answer_start,
                        target_ids=answer.ids,
                        attention_path=settings.attention_path,
                        metadata=_metadata(decoder, prompt, settings)
                        | ({"refine": source.refine} if isinstance(source, Partition) else {})
                        | of_source.notes(row, target)
                        | _of_answer(question, answer),
                    ),
                )


def _of_prompt(
    scores: Float[Tensor, "group padded"], total: int, constants: int
) -> Float[Tensor, "group component"]:
    """Take one prompt's components out of its batch's, the constants last.

    Components that begin after the target's position were cut off: they have not contributed, and score zero.
    Further components belong to longer prompts of the batch.
    """
    members, padded = total // len(scores) - constants, scores.shape[1] - constants
    kept = min(members, padded)
    missing = scores.new_zeros(len(scores), members - kept)
    return torch.cat([scores[:, :kept], missing, scores[:, padded:]], 1)


def _metadata(decoder: Decoder, prompt: Prompt, settings: Settings) -> dict[str, Any]:
    metadata: dict[str, Any] = decoder.notes | {"bias": settings.bias_mode}
    if settings.rule_name == "softmax":
        metadata["temperature"] = getattr(settings.rule, "temperature", None)
    if isinstance(settings.rule, ShapRule):
        metadata["score_weight"] = settings.rule.uniform
    if isinstance(settings.rule, CalibratedRule):
        metadata["rule_file"] = settings.rule.path
    if settings.compat:
        metadata["compat"] = settings.compat
    if decoder.head.labels:
        metadata["labels"] = True
    return metadata | prompt.notes()


def _of_answer(question: Question, answer: ModelAnswer) -> dict[str, float]:
    """The log-probability of a whole answer, whose probability may be too small for a number."""
    if answer.log_probability is None or not isinstance(question.target, Continuation):
        return {}
    return {"log_probability": answer.log_probability}


def warn_of_gaps(results: Iterable[Attribution]) -> None:
    """Warn once where scores do not sum to the value although they should."""
    worst = max((result.completeness for result in results), default=0.0)
    if worst > GAP:
        warnings.warn(
            f"scores miss the value that they explain by up to {worst:.1e} of it (completeness; at most "
            "about 1e-5 is rounding). Likely causes: the model was changed after DePass(model) was made (a "
            "hook, a replaced or compiled part, an adapter added, merged or removed): make a new one; a "
            "forward hook changes what a part gives; or weights in half precision with values that overflow",
            DePassWarning,
            stacklevel=3,
        )
