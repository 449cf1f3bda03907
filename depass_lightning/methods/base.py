"""The interface of attribution methods: batches, and assembling an `Attribution` from scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.attribution.preference import results_of, with_both_answers
from depass_lightning.attribution.question import Question, questions_of
from depass_lightning.attribution.readout import ModelAnswer
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.model_runs import Batch, as_depass_runs
from depass_lightning.prompts import IdsLike, prompts_of, read_length
from depass_lightning.results.attribution import Attribution
from depass_lightning.sources import Source, Spans, Tokens
from depass_lightning.sources.tokens import Positional, summed
from depass_lightning.targets import (
    Continuation,
    HeadTarget,
    LogitTarget,
    Preference,
    TargetLike,
    as_targets,
)
from depass_lightning.utils.batching import in_batches


class Method(ABC):
    """A method that scores a prompt's components.

    Args:
        depass: the model, with its tokenizer.
        source: the components that are scored; by default `Tokens()`.
    """

    name: ClassVar[str]

    def __init__(self, depass: DePass, source: Source | None = None) -> None:
        self.depass = depass
        self.source: Source = Tokens() if source is None else source

    @overload
    def attribute(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: str,
        target: TargetLike = None,
        *,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Attribution: ...

    @overload
    def attribute(
        self,
        prompt: Sequence[str] | None = None,
        target: TargetLike | Sequence[TargetLike] = None,
        *,
        batch_size: int = 16,
        progress: bool = False,
        input_ids: IdsLike | None = None,
        attention_mask: IdsLike | None = None,
    ) -> list[Attribution]: ...

    def attribute(
        self,
        prompt: str | Sequence[str] | None = None,
        target: TargetLike | Sequence[TargetLike] = None,
        *,
        batch_size: int = 16,
        progress: bool = False,
        input_ids: IdsLike | None = None,
        attention_mask: IdsLike | None = None,
    ) -> Any:
        """Score the components of one prompt, or of several.

        Args:
            prompt: one prompt, or several.
            target: a token, a contrast, a whole answer, or None for the model's next token; one for all
                prompts, or one per prompt.
            batch_size: the number of prompts in one pass.
            progress: show a progress bar.
            input_ids: token ids instead of prompts, padded on either side.
            attention_mask: 1 at the real positions of `input_ids`.

        Returns:
            One `Attribution` for one prompt, a list in their order for several or for ids.

        Raises:
            DePassError: an argument is invalid; see `DePass.attribute`.
        """
        ids: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._attribute(prompt, target, batch_size=batch_size, progress=progress, **ids)

    @abstractmethod
    def _attribute(
        self,
        prompt: str | Sequence[str] | None,
        target: TargetLike | Sequence[TargetLike],
        *,
        batch_size: int,
        progress: bool,
        **ids: Tensor | None,
    ) -> Any:
        """Implement `attribute`; `ids` are `input_ids` and `attention_mask`."""


class Baseline(Method):
    """A method that DePass is compared with: its scores need not sum to the target's value.

    The scores of a whole answer are the sum of those of its tokens, each explained once.

    The model is not changed. Components have the names that DePass gives them; the rest of the state and the
    bias have no score.

    Args:
        depass: the model, with its tokenizer.
        source: the components that are scored; by default the first of `sources`, without arguments.

    Raises:
        DePassError: the method does not score such components, or not at the layer that they are at.
    """

    sources: ClassVar[tuple[type[Source], ...]]

    def __init__(self, depass: DePass, source: Source | None = None) -> None:
        super().__init__(depass, self.sources[0]() if source is None else source)
        kind = type(self.source).__name__
        if type(self.source) not in self.sources:
            known = ", ".join(f"{source.__name__}()" for source in self.sources)
            raise DePassError(f"{self.name} does not score {kind}; it scores {known}")
        if self.source.positional and self.source.layers(len(depass.decoder.blocks)) != [0]:
            raise DePassError(f"{self.name} scores the tokens of the input; leave {kind}(layer=) at 0")

    @abstractmethod
    def score(self, batch: Batch) -> Float[Tensor, "batch group component"]:
        """Score the components of a batch.

        Args:
            batch: the prompts and their targets.

        Returns:
            Scores of as many components as any prompt has up to its target's position. Components after
            that position cannot have contributed: they are zero, or left out at the end.
        """

    def _attribute(
        self,
        prompt: str | Sequence[str] | None,
        target: TargetLike | Sequence[TargetLike],
        *,
        batch_size: int,
        progress: bool,
        **ids: Tensor | None,
    ) -> Any:
        decoder, tokenizer = self.depass.decoder, self.depass.tokenizer
        prompts = prompts_of(decoder, tokenizer, prompt, ids["input_ids"], ids["attention_mask"])
        targets = as_targets(target, None if isinstance(prompt, str) else len(prompts))
        for aim in targets:
            if isinstance(aim, list):
                raise DePassError(f"{self.name} takes one target a prompt; call it once for each target")
            if not isinstance(aim, LogitTarget | HeadTarget | Continuation | Preference):
                raise DePassError(
                    f"{self.name} explains tokens, labels and answers, not {type(aim).__name__}"
                )
        asked = with_both_answers(decoder, tokenizer, prompts, targets, ())
        questions = [question for (question,) in questions_of(decoder, tokenizer, *asked, [self.source])]
        tokens = [
            replace(question, target=read.target, reads=(replace(read, weight=1.0),))
            for question in questions
            for read in question.reads
        ]
        lengths = [read_length(decoder, token.prompt, token.position) for token in tokens]
        kinds = [(decoder.regime(length), length) for length in lengths]

        def explain(numbers: list[int]) -> list[tuple[ModelAnswer, Tensor]]:
            with as_depass_runs(decoder):
                batch = Batch(decoder, tokenizer, [tokens[i] for i in numbers])
                scores = self.score(batch)
            return list(zip(batch.answers, scores.detach(), strict=True))

        explained = iter(in_batches(kinds, batch_size, explain, progress))
        scored = [
            self._attribution(question, [next(explained) for _ in question.reads]) for question in questions
        ]
        results = [result for (result,) in results_of(targets, prompts, [[[row]] for row in scored])]
        return results[0] if isinstance(prompt, str) else results

    def _attribution(
        self, question: Question, explained: Sequence[tuple[ModelAnswer, Float[Tensor, "group component"]]]
    ) -> Attribution:
        """Return one prompt's scores with names; those of an answer are the sum over its tokens."""
        prompt, target, decoder = question.prompt, question.target, self.depass.decoder
        groups = self.source.describe(prompt, decoder)
        # No baseline scores what is left of the state.
        components = [component for group in groups for component in group if not component.remainder]
        answers = [answer for answer, _ in explained]
        answer, metadata = answers[0], decoder.notes | prompt.notes()
        if isinstance(target, Continuation):
            answer = ModelAnswer.of_answer(
                prompt, target, question.reads, answers, OutputNames.of(decoder, self.depass.tokenizer)
            )
            metadata["log_probability"] = answer.log_probability
        rows = []
        for read, (_, row) in zip(question.reads, explained, strict=True):
            missing = len(components) - row.shape[1] if self.source.positional else 0
            # Components after the target's position were cut off.
            rows.append(read.weight * nn.functional.pad(row, (0, missing)))
        scores = torch.stack(rows).sum(0)
        return Attribution(
            scores=scores.flatten(),
            components=components,
            value=answer.value,
            target=answer.name,
            text=prompt.text,
            tokens=prompt.tokens,
            token_ids=prompt.ids,
            offsets=prompt.offsets,
            sections=list(prompt.sections),
            source=self.source.kind,
            rule=self.name,
            layer=self.source.layers(len(decoder.blocks))[0],
            position=question.position,
            prediction=answer.prediction,
            probability=answer.probability,
            rank=answer.rank,
            groups=len(scores),
            remainder=answer.remainder,
            answer_start=prompt.answer_start,
            target_ids=answer.ids,
            method=self.name,
            metadata=metadata,
        )


class TokenBaseline(Baseline):
    """A method that scores the model's input: a span as the sum of its tokens, or by a rule for spans.

    Raises:
        DePassError: it is something else, or at another layer than 0.
    """

    sources: ClassVar[tuple[type[Source], ...]] = (Tokens, Spans)

    def owners(self, batch: Batch) -> Int[Tensor, "batch position"]:
        """Return which component each position belongs to, the first one being 1; padding belongs to 0."""
        assert isinstance(self.source, Positional)
        lengths = [len(ids) for ids in batch.rows]
        owners = self.source.owner_table(batch.prompts, lengths, batch.ids.shape[1], first=1)
        return owners.to(batch.ids.device)

    def summed(
        self, batch: Batch, token_scores: Float[Tensor, "batch position"]
    ) -> Float[Tensor, "batch group component"]:
        """Return the sum of each component's tokens, as `score` does."""
        return summed(token_scores, self.owners(batch))[:, None, 1:]
