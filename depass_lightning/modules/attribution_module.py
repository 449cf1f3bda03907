"""Attributes the prompts of a task, batch by batch, as a LightningModule for `Trainer.predict`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.errors import DePassError, reason_of
from depass_lightning.faithfulness import ROW_MEASURES, Case, Measure, evaluate
from depass_lightning.faithfulness.evidence import read_token
from depass_lightning.methods import DePassMethod, Method
from depass_lightning.modules.prompt_datamodule import PromptBatch
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Decomposition
from depass_lightning.results.generation import Generation
from depass_lightning.storage import attribution_to_row
from depass_lightning.targets import AnswerTarget, LogitReading, Reduction, Target, Token
from depass_lightning.tasks import Example

log = logging.getLogger(__name__)

# After this error a device computes nothing: no prompt is to blame. It has no class before torch 2.8.
DEVICE_ERROR: Any = getattr(torch, "AcceleratorError", ())

ExplainedKind = AnswerTarget | Literal["own", "generation"]
TARGETS: tuple[str, ...] = (*get_args(AnswerTarget), "own", "generation")


@dataclass(frozen=True)
class Explained:
    """What is explained of every prompt.

    Args:
        kind: "contrast", the answer against the task's foil (the answer alone where there is none); "token",
            the answer; "centred", its logit less the mean logit; "log_odds", the answer against all other
            tokens; "logprob", its log-probability; "own", the model's most likely next token; "generation",
            every token that the model generates.
        max_new_tokens: the maximum number of generated tokens. Each is a row: a prompt's first has the index
            of the prompt times `max_new_tokens`, and the id "<id>/0".
        readout: what is explained of each generated token, and of each token of a whole answer and its foil.
        answer: of an answer of several tokens, "whole" explains all of them, as a `Continuation` or, against
            a foil, a `Preference`; "first" explains the first one, as published numbers do.
        reduce: "sum" or "mean" over the tokens of a whole answer.
        task_answer: as a generation explain each token of the task's answer, which is not generated.

    Raises:
        DePassError: the kind or the part of the answer is unknown.
    """

    kind: ExplainedKind = "contrast"
    max_new_tokens: int = 20
    readout: LogitReading = "logit"
    answer: Literal["whole", "first"] = "whole"
    reduce: Reduction = "sum"
    task_answer: bool = False

    def __post_init__(self) -> None:
        if self.answer not in ("whole", "first"):
            raise DePassError(f"target.answer must be 'whole' or 'first'; got {self.answer!r}")
        if self.kind not in TARGETS:
            raise DePassError(f"target must be one of {', '.join(TARGETS)}; got {self.kind!r}")

    def target(self, example: Example, tokenizer: PreTrainedTokenizerBase | None = None) -> Target:
        """Return the target of an example, for all kinds but "generation".

        Without a tokenizer, which counts the answer's tokens, the first one is explained.
        """
        assert self.kind != "generation"
        if self.kind == "own":
            return Token(None)
        whole = tokenizer if self.answer == "whole" else None
        return example.target(self.kind, whole, self.readout, self.reduce)


@dataclass
class Predictions:
    """The results of one batch.

    Attributes:
        rows: a row of `depass_lightning.storage.ATTRIBUTION_SCHEMA` for every prompt that was attributed.
        skipped: `index`, `id` and `reason` of every prompt that could not be.
        states: components' states by the prompts' indices, where they are kept.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    states: dict[int, Decomposition] = field(default_factory=dict)

    def __add__(self, other: "Predictions") -> "Predictions":
        return Predictions(self.rows + other.rows, self.skipped + other.skipped, self.states | other.states)


class AttributionModule(LightningModule):
    """Attribute batches of examples, and measure the scores.

    Args:
        method: what attributes, with its model.
        explained: what is explained of every prompt; None for the answer against the foil.
        measures: what is measured besides `ROW_MEASURES`, such as `TokenRemoval` of tokens and spans or
            `ComponentMasking` of heads and neurons; without them an analysis is much faster.
        states: also keep every component's state at a layer: the block that it enters, or "end" for the
            last block's output. None keeps no states.
        run: columns that all rows share: `model`, its name, and `fingerprint`, that of its weights.
        trial: prompts to try at the start. The first that can be attributed is enough; if none can be, as
            with a wrong setting, the run ends at once.
        judged: whether the examples' answers are known to be right, and the model's are compared with them.

    Raises:
        DePassError: a method other than DePass would have to explain generated tokens or give states, or
            states of generated tokens would have to be kept.
    """

    def __init__(
        self,
        method: Method,
        *,
        explained: Explained | None = None,
        measures: Sequence[Measure] = (),
        states: int | Literal["end"] | None = None,
        run: Mapping[str, Any] | None = None,
        trial: Sequence[str] = (),
        judged: bool = True,
    ) -> None:
        super().__init__()
        explained = explained or Explained()
        self.depass = method.depass
        self.decomposing = method if isinstance(method, DePassMethod) else None
        self.generates = explained.kind == "generation"
        if self.generates and self.decomposing is None:
            raise DePassError(f"{method.name} explains no generated tokens; choose another target, or DePass")
        if states is not None and (self.generates or self.decomposing is None):
            raise DePassError("states= keeps what DePass propagates to a target; leave it out")
        self.model = None if self.depass.decoder.placed else self.depass.model  # Lightning moves it
        self.method = method
        self.explained = explained
        self.judged = judged
        self.measures = (*ROW_MEASURES, *measures)
        self.states = states
        self.run = dict(run or {})
        self.trial = trial
        self.batch_limit: int | None = None  # prompts in one pass, once memory has run out

    @override
    def on_predict_start(self) -> None:
        failures: list[Exception] = []
        for prompt in self.trial:
            try:
                return self._try(prompt)
            except DEVICE_ERROR:
                raise
            except Exception as error:  # perhaps the fault of this prompt: try the next one
                failures.append(error)
        if failures:
            raise failures[0]

    def _try(self, prompt: str) -> None:
        if self.generates and self.decomposing is not None:
            self._generation(prompt)
        else:
            self.method.attribute(prompt)
            self._decomposed([prompt])

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int = 0) -> Predictions:
        """Attribute a batch; a prompt that cannot be attributed, for whatever reason, is skipped alone.

        Where memory runs out, batches are halved permanently.
        """
        predictions, size = Predictions(), self.batch_limit or len(batch)
        for start in range(0, len(batch), size):
            part = slice(start, start + size)
            predictions += self._halving(PromptBatch(batch.indices[part], batch.examples[part]))
        return predictions

    def _halving(self, batch: PromptBatch) -> Predictions:
        """Attribute a batch; where it fails, its halves, until the prompt to blame is alone."""
        try:
            rows = self._rows(batch.indices, batch.examples)
            states = self._decomposed([example.prompt for example in batch.examples])
            return Predictions(rows, states=dict(zip(batch.indices, states, strict=False)))
        except DEVICE_ERROR:
            raise
        except Exception as error:
            parallel = self.depass.process_group is not None  # other processes are in the middle of the batch
            if parallel and not isinstance(error, DePassError):
                raise
            reason, out_of_memory = reason_of(error), isinstance(error, torch.OutOfMemoryError | MemoryError)
        # After the handler: inside it, the error's traceback would keep the failed pass's memory.
        if len(batch) == 1:
            skipped = {"index": batch.indices[0], "id": batch.examples[0].id, "reason": reason}
            return Predictions(skipped=[skipped])
        middle = len(batch) // 2
        if out_of_memory:
            self.batch_limit = min(self.batch_limit or middle, middle)
            log.warning("memory ran out on %d prompts; there are %d in a pass now", len(batch), middle)
        first = PromptBatch(batch.indices[:middle], batch.examples[:middle])
        return self._halving(first) + self._halving(
            PromptBatch(batch.indices[middle:], batch.examples[middle:])
        )

    def _decomposed(self, prompts: list[str]) -> list[Decomposition]:
        """Return every prompt's components at the layer whose states are kept, or nothing."""
        if self.states is None or self.decomposing is None:
            return []
        layer = self.states if isinstance(self.states, int) else None
        return self.decomposing.decompose(prompts, layer)

    def _rows(self, indices: Sequence[int], examples: Sequence[Example]) -> list[dict[str, Any]]:
        if self.generates:
            pairs = zip(indices, examples, strict=True)
            return [row for index, example in pairs for row in self._generated_rows(index, example)]
        # Only a causal model continues a text by an answer of several tokens.
        tokenizer = self.depass.tokenizer if self.depass.decoder.head.kind == "causal" else None
        attributions = self.method.attribute(
            [example.prompt for example in examples],
            [self.explained.target(example, tokenizer) for example in examples],
            batch_size=len(examples),
        )
        own_token = self.explained.kind == "own"
        cases = [
            # the answer that was explained, not the foil
            Case(attribution, example.evidence_ranges(), None if own_token else example.answer)
            for attribution, example in zip(attributions, examples, strict=True)
        ]
        rows = []
        measured = evaluate(cases, self.measures, self.depass)
        for index, example, case, columns in zip(indices, examples, cases, measured, strict=True):
            if example.answer is None or not self.judged:
                columns.pop("correct", None)  # no answer is known to be correct
            elif own_token:
                columns["correct"] = self._is_answer(case.attribution, example.answer)
            case.attribution.metadata |= self.run  # the model by its configured name
            row = attribution_to_row(case.attribution)
            rows.append({"index": index, **row, **_known(example), **columns, **self.run})
        return rows

    def _generation(self, prompt: str, answer: str | None = None) -> Generation:
        """Generate after a prompt, or take a given answer, and attribute each token of it."""
        assert self.decomposing is not None
        explained, count = self.explained, self.explained.max_new_tokens
        generation = self.decomposing.attribute_generation(prompt, count, explained.readout, answer)
        if len(generation) > count:
            raise DePassError(
                f"the answer has {len(generation)} tokens, more than max_new_tokens={count}; raise it"
            )
        return generation

    def _generated_rows(self, index: int, example: Example) -> list[dict[str, Any]]:
        """Return a row for each token that is generated after one prompt, or that its answer has."""
        count = self.explained.max_new_tokens
        answer = example.known_answer if self.explained.task_answer else None
        rows = []
        for number, attribution in enumerate(self._generation(example.prompt, answer)):
            attribution.metadata |= self.run
            known = _known(example) | {"id": f"{example.id}/{number}", "answer": answer, "foil": None}
            row = {"index": index * count + number, **attribution_to_row(attribution)}
            rows.append({**row, **known, **self.run})
        return rows

    def _is_answer(self, attribution: Attribution, answer: str) -> bool:
        """Whether the explained token or label is the answer, or the answer's first token."""
        names = OutputNames.of(self.depass.decoder, self.depass.tokenizer)
        text, masked = attribution.text, read_token(attribution)
        if masked is not None and attribution.offsets is not None:
            text = text[: attribution.offsets[masked][0]]
        try:
            return attribution.target_ids[0] == names.id_of(answer, text, first=True)
        except DePassError:  # the model has no such token or label
            return False


def _known(example: Example) -> dict[str, Any]:
    """Return the columns that the task knows about a prompt."""
    return {
        "id": example.id,
        "answer": example.answer,
        "foil": example.foil,
        "roles": [
            {"name": name, "start": start, "end": end}
            for name, spans in example.roles.items()
            for start, end in spans
        ],
        "evidence": example.evidence_ranges(),
    }
