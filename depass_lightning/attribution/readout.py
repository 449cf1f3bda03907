"""How targets are read from a recorded pass: the model's answers, and the vectors that read states."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from depass_lightning.attribution.logit_sum import LogitSum, finite, target_ids, target_name, true_value
from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.attribution.question import Question, Read
from depass_lightning.engine.adjoint import TargetGradient, at_readout, read_directions
from depass_lightning.engine.record import Recording
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.targets import Continuation, Direction, LogitTarget, Similarity
from depass_lightning.utils.tokenization import continuation

READS = 64  # sums of logits that share one pass over the unembedding's rows
SHOWN = 60  # characters of an answer in a target's name


@dataclass(frozen=True)
class ModelAnswer:
    """The model's own answer to a question.

    Args:
        name: the target in words.
        value: the model's value of the target.
        prediction: the text of the model's most likely next token; for a given answer the beginning of the
            model's greedy answer, up to the first token that differs from the given one; of a similarity the
            other text.
        ids: the tokens that the target names, the explained one first; empty for a target inside the model,
            and for a whole answer, whose tokens are part of the text.
        logits: the sums of logits that the target is, one for each position at which it is read; empty for a
            target inside the model.
        probability: the model's probability of the first token, or of the whole answer.
        rank: its rank among all tokens or labels, from 1 for the most likely; of an answer its lowest-ranked
            token's; None for a reward.
        remainder: what the value leaves of a log-probability or log-odds; None for other targets.
        log_probability: the logarithm of the probability, which may be too small for a number.
        predicted: the id of the model's most likely next token; None for a whole answer.
    """

    name: str
    value: float
    prediction: str
    ids: list[int]
    logits: tuple[LogitSum, ...] = ()
    probability: float | None = None
    rank: int | None = None
    remainder: float | None = None
    log_probability: float | None = None
    predicted: int | None = None

    @classmethod
    def of_token(
        cls,
        read: Read,
        logits: Float[Tensor, "vocabulary"],
        uncapped: Float[Tensor, "vocabulary"],
        names: OutputNames,
    ) -> "ModelAnswer":
        """Read the answer to a question about tokens.

        Args:
            read: what is read of a prompt.
            logits: the model's logits at its position.
            uncapped: the same before a soft cap, which is what scores sum to.
            names: the model's tokens or labels.

        Raises:
            DePassError: the value is not finite.
        """
        best, target, ids = int(logits.argmax()), read.target, read.ids
        assert isinstance(target, LogitTarget)
        if ids is None:
            ids = target_ids(target, read.before, names, best)
            assert ids is not None
        name, summed = target_name(target, ids, names), LogitSum.of(target, ids, logits)
        value, true = finite(summed.value(uncapped), name), true_value(target, ids, logits)
        return cls(
            name=name,
            value=value,
            prediction=names.text_of(best),
            ids=ids,
            logits=(summed,),
            probability=float(names.head.probabilities(logits)[ids[0]]),
            rank=1 + int((logits > logits[ids[0]]).sum()) if len(logits) > 1 else None,
            remainder=None if true is None else true - value,
            log_probability=float(names.head.log_probabilities(logits.double())[ids[0]]),
            predicted=best,
        )

    @classmethod
    def of_answer(
        cls,
        prompt: Prompt,
        target: Continuation,
        reads: Sequence[Read],
        tokens: Sequence["ModelAnswer"],
        names: OutputNames,
    ) -> "ModelAnswer":
        """Join the answers for the tokens of a given answer."""
        weighted = list(zip(reads, tokens, strict=True))
        remainders = [
            read.weight * token.remainder for read, token in weighted if token.remainder is not None
        ]
        log_probability = math.fsum(token.log_probability or 0.0 for token in tokens)
        return cls(
            name=_name_of(prompt, target, reads, names),
            value=math.fsum(read.weight * token.value for read, token in weighted),
            prediction=_greedy_answer(prompt, weighted, names),
            ids=[],
            logits=tuple(
                replace(logits, weights=read.weight * logits.weights)
                for read, token in weighted
                for logits in token.logits
            ),
            probability=math.exp(log_probability),
            rank=max(token.rank for token in tokens if token.rank is not None),
            remainder=math.fsum(remainders) if remainders else None,
            log_probability=log_probability,
        )

    @classmethod
    def of_similarity(
        cls, question: Question, states: Float[Tensor, "read hidden"], other: Float[Tensor, "hidden"]
    ) -> "ModelAnswer":
        """Read a cosine similarity, as sums of the states' dimensions with frozen weights.

        Args:
            question: the question.
            states: the states that are pooled.
            other: the other text's embedding, of length 1.

        Raises:
            DePassError: the value is not finite.
        """
        assert isinstance(question.target, Similarity)
        weights = states.new_tensor([read.weight for read in question.reads])
        embedding = weights @ states
        vector, dimensions = other / embedding.norm(), torch.arange(len(other), device=other.device)
        name = f"similarity to {shortened(question.target.text)!r}"
        return cls(
            name=name,
            value=finite(float(embedding @ vector), name),
            prediction=question.target.text,
            ids=[],
            logits=tuple(LogitSum(dimensions, weight * vector) for weight in weights),
        )

    @classmethod
    def of_vector(
        cls,
        question: Question,
        value: float,
        logits: Float[Tensor, "vocabulary"],
        names: OutputNames,
    ) -> "ModelAnswer":
        """Name the answer to a question about a direction inside the model."""
        kind = "direction" if isinstance(question.target, Direction) else "probe logit"
        prediction = names.text_of(int(logits.argmax()))
        return cls(f"{kind} at layer {question.layer}", value, prediction, ids=[])


def _greedy_answer(prompt: Prompt, answers: Sequence[tuple[Read, ModelAnswer]], names: OutputNames) -> str:
    """Return how the model's greedy answer begins, up to the first token that differs from the given one.

    After that token the given answer no longer shows what the model would generate.
    """
    start = answers[0][0].position + 1
    different = (pair for pair in answers if pair[1].predicted != prompt.ids[pair[0].position + 1])
    read, token = next(different, answers[-1])
    assert token.predicted is not None
    ids = [*prompt.ids[: read.position + 1], token.predicted]
    if names.tokenizer is None:
        return " ".join(map(str, ids[start:]))
    return continuation(ids, start, names.tokenizer)


def shortened(text: str) -> str:
    """Return the beginning of a text that is too long for a target's name."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _name_of(prompt: Prompt, target: Continuation, reads: Sequence[Read], names: OutputNames) -> str:
    """Return an answer's name in results: the text of its explained tokens, and what is explained of them."""
    first, last = reads[0].position + 1, reads[-1].position + 2
    if names.tokenizer is None:
        text = " ".join(prompt.tokens[first:last])
    else:
        text = continuation(prompt.ids[:last], first, names.tokenizer)
    shown = repr(shortened(text))
    readings = {
        "logit": "",
        "centred": "centred logit",
        "log_odds": "linear log-odds",
        "logprob": "linear log-probability",
    }
    kind = " ".join(word for word in ("mean" * (target.reduce == "mean"), readings[target.of]) if word)
    return f"{kind} of {shown}" if kind else shown


def readouts_of(
    decoder: Decoder, sums: Sequence[LogitSum]
) -> tuple[Float[Tensor, "read hidden"], Float[Tensor, "read"]]:
    """Return what a state is multiplied with for sums of logits, and what is added to the product."""
    vectors, constants = [], []
    for first in range(0, len(sums), READS):  # sums over the whole vocabulary read its rows once
        some = sums[first : first + READS]
        tokens, columns = torch.cat([logits.tokens for logits in some]).unique(return_inverse=True)
        rows = torch.repeat_interleave(
            torch.tensor([len(logits.tokens) for logits in some], device=tokens.device)
        )
        weights = torch.cat([logits.weights for logits in some])
        table = weights.new_zeros(len(some), len(tokens))  # [read, token]
        table.index_put_((rows, columns), weights, accumulate=True)
        vector, constant = decoder.summed_readout(tokens, table)
        vectors.append(vector)
        constants.append(constant)
    return torch.cat(vectors), torch.cat(constants)


def _answer(recording: Recording, names: OutputNames, row: int, question: Question) -> ModelAnswer:
    """Read the answer to one prompt's question."""
    places = [recording.kept.index(read.position) for read in question.reads]
    dtype, prompt, reads = recording.dtype, question.prompt, question.reads
    if question.other is not None:
        states = recording.logits[row, places].to(dtype)  # [read, hidden]
        return ModelAnswer.of_similarity(question, states, question.other.to(states))
    if question.vector is not None:
        states = recording.state(question.layer)[row, [read.position for read in reads]]
        weights = states.new_tensor([read.weight for read in reads])
        value = float(weights @ states @ question.vector.to(states)) + question.constant
        return ModelAnswer.of_vector(question, value, recording.logits[row, places[-1]].to(dtype), names)
    tokens = [
        ModelAnswer.of_token(
            read,
            recording.logits[row, place].to(dtype),
            recording.uncapped[row, place].to(dtype),
            names,
        )
        for read, place in zip(reads, places, strict=True)
    ]
    if isinstance(question.target, Continuation):
        return ModelAnswer.of_answer(prompt, question.target, reads, tokens, names)
    return tokens[0]


@dataclass(frozen=True)
class Readout:
    """How a batch's targets are read from the state: as many a prompt, all at one place.

    A target that is read at fewer positions than others is padded with its last one and a vector of zeros.

    Args:
        layer: the block whose input is read; the number of blocks for the last block's output.
        normed: the state is read after the final norm.
        positions: the positions at which each target is read.
        vectors: what the state at each of them is multiplied with.
        constants: what is added to each target's products.
        values: the model's own values of the targets.
        answers: `[batch][target]` the model's own answers.
    """

    layer: int
    normed: bool
    positions: Int[Tensor, "batch target read"]
    vectors: Float[Tensor, "batch target read hidden"]
    constants: Float[Tensor, "batch target"]
    values: Float[Tensor, "batch target"]
    answers: list[list[ModelAnswer]]

    @classmethod
    def of(
        cls,
        recording: Recording,
        names: OutputNames,
        questions: Sequence[Sequence[Question]],
    ) -> "Readout":
        """Read each question's answer from the recorded pass.

        Args:
            recording: the recorded pass.
            names: the model's tokens or labels.
            questions: `[batch][target]`, all at one place.

        Raises:
            DePassError: a target's value is not finite.
        """
        layer, normed = questions[0][0].place
        state = recording.state(layer)
        shape = (len(questions), len(questions[0]))
        rows = [(row, question) for row, several in enumerate(questions) for question in several]
        answers = [_answer(recording, names, row, question) for row, question in rows]
        counts = [len(question.reads) for _, question in rows]
        if normed:
            vectors, constants = readouts_of(
                recording.decoder, [logits for answer in answers for logits in answer.logits]
            )
        else:
            inside = [
                (read.weight * question.vector.to(state), read.weight * question.constant)
                for _, question in rows
                if question.vector is not None
                for read in question.reads
            ]
            vectors = torch.stack([vector for vector, _ in inside])
            constants = vectors.new_tensor([constant for _, constant in inside])
        # [batch * target, read, hidden]
        padded = nn.utils.rnn.pad_sequence(list(vectors.to(state).split(counts)), batch_first=True)
        places = [
            [read.position for read in question.reads] + [question.position] * (max(counts) - count)
            for (_, question), count in zip(rows, counts, strict=True)
        ]
        return cls(
            layer=layer,
            normed=normed,
            positions=torch.tensor(places, device=state.device).unflatten(0, shape),
            vectors=padded.unflatten(0, shape),
            constants=torch.stack([part.sum() for part in constants.to(state).split(counts)]).view(shape),
            values=state.new_tensor([answer.value for answer in answers]).view(shape),
            answers=[answers[first : first + shape[1]] for first in range(0, len(answers), shape[1])],
        )

    def directions(self, recording: Recording, target: int) -> Float[Tensor, "batch read hidden"]:
        """Return the derivative of each prompt's target by the state at each position that it is read at."""
        return read_directions(
            recording, self.positions[:, target], self.vectors[:, target], normed=self.normed
        )

    def split(self, count: int) -> "list[Readout]":
        """Divide the targets."""
        tensors = (self.positions, self.vectors, self.constants, self.values)
        parts = zip(*(tensor.split(count, 1) for tensor in tensors), strict=True)
        return [
            replace(self, positions=positions, vectors=vectors, constants=constants, values=values)
            for positions, vectors, constants, values in parts
        ]

    def gradients(self, recording: Recording) -> list[TargetGradient]:
        """Compute the gradient of each target with respect to the state where it is read."""
        return [self.gradient(recording, target) for target in range(self.positions.shape[1])]

    def gradient(self, recording: Recording, target: int) -> TargetGradient:
        """Compute the gradient of each prompt's target by the state where it is read."""
        return at_readout(
            recording,
            self.positions[:, target],
            self.vectors[:, target],
            self.constants[:, target],
            normed=self.normed,
        )
