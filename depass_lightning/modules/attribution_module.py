"""Attributes the prompts of a task, batch by batch, as a LightningModule for `Trainer.predict`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError, reason_of
from depass_lightning.faithfulness import ROW_MEASURES, Case, Measure, evaluate
from depass_lightning.methods import DePassMethod, Method
from depass_lightning.modules.prompt_datamodule import PromptBatch
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.decomposition import Decomposition
from depass_lightning.results.generation import Generation
from depass_lightning.storage import attribution_to_row
from depass_lightning.targets import Contrast, Token, token_id
from depass_lightning.tasks import Example

log = logging.getLogger(__name__)

# After it a device computes nothing: no prompt is to blame. Before torch 2.8 it had no class.
BROKEN: Any = getattr(torch, "AcceleratorError", ())

KEPT_OPTIONS = ("source", "rule", "temperature", "bias", "compat")  # that decide components' states
TARGETS = ("contrast", "token", "own", "generation")


@dataclass
class Predictions:
    """What one batch came to.

    Attributes:
        rows: a row of `depass_lightning.storage.ATTRIBUTION_SCHEMA` for every prompt that was attributed.
        skipped: `index`, `id` and `reason` of every prompt that could not be.
        states: components' states by the prompts' indices, where they are asked for.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    states: dict[int, Decomposition] = field(default_factory=dict)

    def __add__(self, other: "Predictions") -> "Predictions":
        return Predictions(self.rows + other.rows, self.skipped + other.skipped, self.states | other.states)


class AttributionModule(LightningModule):
    """Attribute batches of examples with DePass or another method, and measure what the scores are worth.

    Args:
        depass: the model to attribute, with its tokenizer.
        settings: what `DePass.attribute` takes beside prompt and target: `source`, `rule` and the like.
        target: what is explained: "contrast", the answer against the task's foil (the answer alone where
            there is none); "token", the answer; "own", whatever the model itself finds most likely;
            "generation", every token that it goes on with.
        measures: what is measured besides `ROW_MEASURES`, such as `TokenRemoval` of tokens and spans or
            `ComponentMasking` of heads and neurons; without them an analysis is much faster.
        method: what attributes instead of DePass with these settings.
        run: what every row says about the run: `model`, its name, and `fingerprint`, its weights'.
        trial: prompts, the first of which that can be is attributed once at the start: where none can be, as
            with a wrong setting, the run ends at once, instead of failing at every prompt.
        states: keep every component's state at a layer too: the block that it enters, or "end", behind the
            last one.
        new_tokens: how many tokens are generated at most, where these are what is explained. Each is a row:
            a prompt's first has the index of the prompt times `new_tokens`, and the id "<id>/0".

    Raises:
        DePassError: the target is unknown, settings and a method are both given, a method other than DePass
            would have to explain generated tokens or give states, or states are asked for of those.
    """

    def __init__(
        self,
        depass: DePass,
        settings: Mapping[str, Any] | None = None,
        *,
        target: Literal["contrast", "token", "own", "generation"] = "contrast",
        measures: Sequence[Measure] = (),
        method: Method | None = None,
        run: Mapping[str, Any] | None = None,
        trial: Sequence[str] = (),
        states: int | Literal["end"] | None = None,
        new_tokens: int = 20,
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise DePassError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
        if method is not None and settings:
            raise DePassError("settings are DePass's own; give a method its options when it is made")
        if method is None:
            options = dict(settings or {})
            method = DePassMethod(depass, options.pop("source", None), **options)
        if target == "generation" and not isinstance(method, DePassMethod):
            raise DePassError(f"{method.name} explains no generated tokens; choose another target, or DePass")
        if states is not None and (target == "generation" or not isinstance(method, DePassMethod)):
            raise DePassError("states= keeps what DePass carries to a target; leave it out here")
        self.depass = depass
        self.model = None if depass.decoder.placed else depass.model  # what Lightning moves to the device
        self.method = method
        self.target = target
        self.measures = (*ROW_MEASURES, *measures)
        self.run = dict(run or {})
        self.trial = trial
        self.at_once: int | None = None  # prompts in a pass, once memory has run out
        self.states = states
        self.new_tokens = new_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """What `DePass.attribute` is called with, where DePass attributes; else no more than the source."""
        options = self.method.options if isinstance(self.method, DePassMethod) else {}
        return {"source": self.method.source, **options}

    def on_predict_start(self) -> None:
        """Try the settings on one prompt, or on another where it may be that prompt's fault."""
        failures: list[Exception] = []
        for prompt in self.trial:
            try:
                return self._try(prompt)
            except BROKEN:
                raise
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _try(self, prompt: str) -> None:
        if self.target == "generation":
            self._generation(prompt)
        else:
            self.method.attribute(prompt)
            self._carried([prompt])

    def predict_step(self, batch: PromptBatch, batch_idx: int = 0) -> Predictions:
        """Attribute a batch; a prompt that cannot be attributed, for whatever reason, costs only itself.

        Where memory runs out, batches are halved for good.

        Args:
            batch: the examples and their indices.
            batch_idx: not used: the batch carries its indices.
        """
        found, at_once = Predictions(), self.at_once or len(batch)
        for start in range(0, len(batch), at_once):
            part = slice(start, start + at_once)
            found += self._halving(PromptBatch(batch.indices[part], batch.examples[part]))
        return found

    def _halving(self, batch: PromptBatch) -> Predictions:
        """Attribute a batch; where it fails, its halves, until the prompt that is to blame is alone."""
        try:
            rows = self._rows(batch.indices, batch.examples)
            carried = self._carried([example.prompt for example in batch.examples])
            return Predictions(rows, states=dict(zip(batch.indices, carried, strict=False)))
        except BROKEN:
            raise
        except Exception as error:
            together = self.depass.process_group is not None  # the other processes are in the middle of it
            if together and not isinstance(error, DePassError):
                raise
            reason, short = reason_of(error), isinstance(error, torch.OutOfMemoryError | MemoryError)
        # outside of the handler: there the error's traceback would keep the failed pass's memory
        if len(batch) == 1:
            skipped = {"index": batch.indices[0], "id": batch.examples[0].id, "reason": reason}
            return Predictions(skipped=[skipped])
        middle = len(batch) // 2
        if short:
            self.at_once = min(self.at_once or middle, middle)
            log.warning("memory ran out on %d prompts; there are %d in a pass now", len(batch), middle)
        first = PromptBatch(batch.indices[:middle], batch.examples[:middle])
        return self._halving(first) + self._halving(
            PromptBatch(batch.indices[middle:], batch.examples[middle:])
        )

    def _carried(self, prompts: list[str]) -> list[Decomposition]:
        """Return every prompt's components at the layer whose states are kept, or nothing."""
        if self.states is None:
            return []
        options = {name: own for name, own in self.settings.items() if name in KEPT_OPTIONS}
        layer: Any = None if self.states == "end" else self.states
        return self.depass.decompose(prompts, to_layer=layer, batch_size=len(prompts), **options)

    def _generation(self, prompt: str) -> Generation:
        """Let the model go on with a prompt, and attribute what it says."""
        settings = self.settings
        if settings.pop("compat", None) is not None:
            raise DePassError("compat='paper_code' explains no generated tokens; leave out one of the two")
        if "temperature" in settings:  # which is an argument of `generate` too
            settings["rule_temperature"] = settings.pop("temperature")
        return self.depass.attribute_generation(prompt, max_new_tokens=self.new_tokens, **settings)

    def _generated_rows(self, index: int, example: Example) -> list[dict[str, Any]]:
        """Return a row for each token that is generated behind one prompt."""
        rows = []
        for number, attribution in enumerate(self._generation(example.prompt)):
            attribution.metadata |= self.run
            known = self._known(example) | {"id": f"{example.id}/{number}", "answer": None, "foil": None}
            place = index * self.new_tokens + number
            rows.append({"index": place, **attribution_to_row(attribution), **known, **self.run})
        return rows

    def _rows(self, indices: Sequence[int], examples: Sequence[Example]) -> list[dict[str, Any]]:
        if self.target == "generation":
            both = zip(indices, examples, strict=True)
            return [row for index, example in both for row in self._generated_rows(index, example)]
        attributions = self.method.attribute(
            [example.prompt for example in examples],
            [self._explained(example) for example in examples],
            batch_size=len(examples),
        )
        for attribution in attributions:
            attribution.metadata |= self.run  # the model by the name that the reader gave it
        cases = [self._case(*pair) for pair in zip(examples, attributions, strict=True)]
        measured = evaluate(cases, self.measures, self.depass)
        if self.target == "own":
            for columns, example, case in zip(measured, examples, cases, strict=True):
                columns["correct"] = self._is_answer(case.target_ids[0], example)
        return [
            {"index": index, **attribution_to_row(case.attribution), **self._known(example), **columns}
            | self.run
            for index, example, case, columns in zip(indices, examples, cases, measured, strict=True)
        ]

    def _case(self, example: Example, attribution: Attribution) -> Case:
        """Return what is measured: the answer that was explained, not the foil."""
        answer = None if self.target == "own" else example.answer
        return Case(attribution, example.evidence_ranges(), answer)

    def _explained(self, example: Example) -> Token | Contrast:
        """Return the target of one example."""
        if self.target == "own":
            return Token(None)
        # A long answer stands for its first token, as in `Example.target`.
        return Token(example.answer, first=True) if self.target == "token" else example.target()

    def _is_answer(self, token: int, example: Example) -> bool:
        """Whether a token is the answer of an example, or the answer's first."""
        tokenizer = self.depass.tokenizer
        assert tokenizer is not None
        try:
            return token == token_id(example.answer, example.prompt, tokenizer, len(tokenizer), first=True)
        except DePassError:  # the model has no token for it
            return False

    def _known(self, example: Example) -> dict[str, Any]:
        """Return what the task knows of a prompt."""
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
