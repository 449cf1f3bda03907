"""What is asked of the model, resolved and checked once, and how the answer is read from a recorded pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_lightning.engine.adjoint import TargetGradient, at_readout
from depass_lightning.engine.record import Recording
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Source, resolve_layer
from depass_lightning.targets import (
    Direction,
    LogitSum,
    LogitTarget,
    Target,
    finite,
    inner_reading,
    target_ids,
    target_name,
)
from depass_lightning.utils.tokenization import token_text


@dataclass(frozen=True, eq=False)
class Question:
    """One target of one prompt.

    Args:
        prompt: the prompt.
        target: the target as it was passed.
        position: the index of the token at which the target is read.
        layer: the block whose input is read; the number of blocks for the last block's output.
        ids: the token whose logit is explained, and those that it is compared with; None for the model's own
            next token, which only the pass shows, and for a vector.
        vector: `[hidden]` what the state is multiplied with, for a target inside the model.
        constant: what is added to that product.
    """

    prompt: Prompt
    target: Target
    position: int
    layer: int
    ids: list[int] | None = None
    vector: Float[Tensor, "hidden"] | None = None
    constant: float = 0.0

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Prompt,
        target: Target,
        last_source_layer: int = 0,
    ) -> "Question":
        """Resolve a target.

        Args:
            decoder: the model.
            tokenizer: its tokenizer, if there is one.
            prompt: the prompt.
            target: its target.
            last_source_layer: the last block at or in which components begin; the target is read after it.

        Raises:
            DePassError: the prompt has no such position, the target is not one token, or it is read at a
                layer that does not exist or that components do not reach.
        """
        position, layers = prompt.resolve_position(target.position), len(decoder.blocks)
        if isinstance(target, LogitTarget):
            text = prompt.text_until(position)
            ids = target_ids(target, text, tokenizer, decoder.vocabulary_size)
            return cls(prompt, target, position, layers, ids=ids)
        name = type(target).__name__
        vector, constant = inner_reading(target, decoder.hidden_size)
        layer = layers
        if target.layer is not None and target.layer != layers:
            layer = resolve_layer(target.layer, layers, name)
        if layer <= last_source_layer:
            raise DePassError(
                f"{name} is read at layer {layer}, but the source begins at layer {last_source_layer}; read "
                "it at a later layer"
            )
        return cls(prompt, target, position, layer, vector=vector, constant=constant)

    @property
    def place(self) -> tuple[int, bool]:
        """The layer, and whether the state is read after the final norm: what targets read together share."""
        return self.layer, self.vector is None


def questions_of(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    targets: Sequence[Target | list[Target]],
    sources: Sequence[Source],
) -> list[list[Question]]:
    """Resolve every prompt's targets, and check that the sources can split the prompts.

    Args:
        decoder: the model.
        tokenizer: its tokenizer, if there is one.
        prompts: the prompts.
        targets: for each prompt one target or several.
        sources: what the state is split into.

    Returns:
        For each prompt a list of its questions.

    Raises:
        DePassError: a target cannot be explained, or a prompt cannot be split.
    """
    last_source_layer = max(source.layers(len(decoder.blocks))[-1] for source in sources)
    questions = []
    for prompt, asked in zip(prompts, targets, strict=True):
        several = asked if isinstance(asked, list) else [asked]
        questions.append(
            [Question.of(decoder, tokenizer, prompt, target, last_source_layer) for target in several]
        )
        for source in sources:
            source.describe(prompt, decoder)
    return questions


@dataclass(frozen=True)
class ModelAnswer:
    """The model's own answer to a question.

    Args:
        name: the target in words.
        value: the model's value of the target.
        prediction: the text of the model's most likely next token.
        ids: the tokens that the target names, the explained one first; empty for a target inside the model.
        logits: the sum of logits that the target is; None for a target inside the model.
        probability: the model's probability of the first token.
        rank: its rank among all tokens, from 1 for the most likely.
    """

    name: str
    value: float
    prediction: str
    ids: list[int]
    logits: LogitSum | None = None
    probability: float | None = None
    rank: int | None = None

    @classmethod
    def of_token(
        cls,
        question: Question,
        logits: Float[Tensor, "vocabulary"],
        uncapped: Float[Tensor, "vocabulary"],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> "ModelAnswer":
        """Read the answer to a question about tokens.

        Args:
            question: the question.
            logits: the model's logits at its position.
            uncapped: the same before a soft cap, which is what scores sum to.
            tokenizer: to name tokens by; None shows ids.

        Raises:
            DePassError: the value is not finite.
        """
        best, target, ids = int(logits.argmax()), question.target, question.ids
        assert isinstance(target, LogitTarget)
        if ids is None:
            text = question.prompt.text_until(question.position)
            ids = target_ids(target, text, tokenizer, len(logits), best)
            assert ids is not None
        name, summed = target_name(target, ids, tokenizer), LogitSum.of(target, ids, logits)
        return cls(
            name=name,
            value=finite(summed.value(uncapped), name),
            prediction=token_text(best, tokenizer),
            ids=ids,
            logits=summed,
            probability=float(logits.softmax(-1)[ids[0]]),
            rank=1 + int((logits > logits[ids[0]]).sum()),
        )

    @classmethod
    def of_vector(
        cls,
        question: Question,
        value: float,
        logits: Float[Tensor, "vocabulary"],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> "ModelAnswer":
        """Name the answer to a question about a direction inside the model.

        Args:
            question: the question.
            value: the model's value of the target.
            logits: the model's logits at its position.
            tokenizer: to name tokens by; None shows ids.
        """
        kind = "direction" if isinstance(question.target, Direction) else "probe logit"
        prediction = token_text(int(logits.argmax()), tokenizer)
        return cls(f"{kind} at layer {question.layer}", value, prediction, ids=[])


@dataclass(frozen=True)
class Readout:
    """How a batch's targets are read from the state: as many a prompt, all at one place.

    Args:
        layer: the block whose input is read; the number of blocks for the last block's output.
        normed: the state is read after the final norm.
        positions: each target's position.
        vectors: what the state is multiplied with.
        constants: what is added to that product.
        values: the model's own values of the targets.
        answers: `[batch][target]` the model's own answers.
    """

    layer: int
    normed: bool
    positions: Int[Tensor, "batch target"]
    vectors: Float[Tensor, "batch target hidden"]
    constants: Float[Tensor, "batch target"]
    values: Float[Tensor, "batch target"]
    answers: list[list[ModelAnswer]]

    @classmethod
    def of(
        cls,
        recording: Recording,
        tokenizer: PreTrainedTokenizerBase | None,
        questions: Sequence[Sequence[Question]],
    ) -> "Readout":
        """Read each question's answer from the recorded pass.

        Args:
            recording: the recorded pass.
            tokenizer: to name tokens by; None shows ids.
            questions: `[batch][target]`, all at one place.

        Raises:
            DePassError: a target's value is not finite.
        """
        layer, normed = questions[0][0].place
        state, decoder, dtype = recording.state(layer), recording.decoder, recording.dtype
        vectors, constants, answers = [], [], []
        for row, several in enumerate(questions):
            for question in several:
                place = row, recording.kept.index(question.position)
                logits, uncapped = recording.logits[place].to(dtype), recording.uncapped[place].to(dtype)
                if question.vector is None:
                    answer = ModelAnswer.of_token(question, logits, uncapped, tokenizer)
                    assert answer.logits is not None
                    vector, constant = decoder.summed_readout(answer.logits.tokens, answer.logits.weights)
                else:
                    vector = question.vector.to(state)
                    value = float(state[row, question.position] @ vector) + question.constant
                    answer = ModelAnswer.of_vector(question, value, logits, tokenizer)
                    constant = vector.new_tensor(question.constant)
                vectors.append(vector)
                constants.append(constant)
                answers.append(answer)
        device, shape = state.device, (len(questions), len(questions[0]))
        positions = [[question.position for question in several] for several in questions]
        return cls(
            layer=layer,
            normed=normed,
            positions=torch.tensor(positions, device=device),
            vectors=torch.stack(vectors).unflatten(0, shape),
            constants=torch.stack(constants).unflatten(0, shape),
            values=torch.tensor([answer.value for answer in answers], device=device, dtype=dtype).view(shape),
            answers=[answers[first : first + shape[1]] for first in range(0, len(answers), shape[1])],
        )

    def gradient(self, recording: Recording, target: int) -> TargetGradient:
        """Compute the gradient of each prompt's target by the state where it is read.

        Args:
            recording: the recorded pass.
            target: which of each prompt's targets.
        """
        return at_readout(
            recording,
            self.positions[:, target],
            self.vectors[:, target],
            self.constants[:, target],
            normed=self.normed,
        )
