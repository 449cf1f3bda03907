"""Questions of the ask page: one prompt at a time, its scores, and its answer without some of its words."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.logit_lens import layer_scores, next_tokens
from depass_lightning.methods.model_runs import as_depass_runs, run
from depass_lightning.modules.attribution_module import Explained
from depass_lightning.reports.ask_page import RuleChoice, SourceName
from depass_lightning.reports.numbers import model_name, signed, visible
from depass_lightning.reports.page import page_contents, page_html
from depass_lightning.results.attribution import Attribution
from depass_lightning.targets import Contrast, Target, Token
from depass_lightning.tasks.jsonl import example_of
from depass_lightning.utils.tokenization import token_text

SHOWN = 10  # next tokens
KEPT = 16  # attributions in memory
MAX_EDITS = 4096
TokenId = Annotated[int, Field(ge=0)]


class Edit(BaseModel):
    """Tokens of the prompt to remove, or to replace by a text.

    Attributes:
        start: the position of the first token.
        end: the position after the last one.
        text: the replacement; empty to remove the tokens.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    start: Annotated[int, Field(ge=0)]
    end: int
    text: str = ""


class AskedQuestion(BaseModel):
    """What the page asks.

    Attributes:
        prompt: the prompt.
        messages: a conversation instead.
        target: the answer as text, or one token's id; None for the model's most likely next token.
        foil: what it is compared with.
        source: what the state is split into.
        rule: how neurons are shared.
        edits: the words that are removed or replaced.
        layers: whether each token's part of the answer is computed at every layer.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    target: str | TokenId | None = None
    foil: str | TokenId | None = None
    source: SourceName = "tokens"
    rule: RuleChoice = "auto"
    edits: Annotated[list[Edit], Field(max_length=MAX_EDITS)] = []
    layers: bool = False


class AskedModel:
    """The model of the ask page, which answers its questions one at a time.

    Args:
        depass: the model, a causal language model with a tokenizer.
        name: the model's name, as pages show it.

    Raises:
        DePassError: the model is a classifier, or has no tokenizer.
    """

    def __init__(self, depass: DePass, name: str) -> None:
        if depass.decoder.head.kind != "causal" or depass.tokenizer is None:
            raise DePassError(
                f"the ask page needs a causal language model with a tokenizer; {name} is not one"
            )
        self.depass = depass
        self.tokenizer = depass.tokenizer
        self.name = name
        self._attributions: OrderedDict[str, Attribution] = OrderedDict()

    def scores(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the page's scripts draw, the settings, and the most likely next tokens.

        Args:
            asked: the fields of `AskedQuestion`.

        Raises:
            DePassError: a field is wrong, or what `DePass.attribute` raises.
        """
        question = _question(asked)
        attribution = self.attribution(question)
        example = self._example(question, attribution)
        data, settings = page_contents([attribution], examples=[example])
        return {
            "data": data,
            "settings": settings,
            "next": [token | {"text": visible(token["text"])} for token in example["likely"][-1]],
        }

    def change(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return how the target's value changes where words are removed or replaced.

        The predicted change is the negative sum of the removed components' scores. The real one is read from
        a plain pass over the remaining tokens.

        Args:
            asked: the fields of `AskedQuestion`.

        Returns:
            `before` and `after`, the values; `real` and `predicted`, the changes, the latter None where a
            word is replaced or the removed tokens have no scores; `next`, the most likely next tokens.

        Raises:
            DePassError: no token is left, or the target is a whole answer.
        """
        question = _question(asked)
        attribution = self.attribution(question)
        if not attribution.target_ids or attribution.answer_start is not None:
            raise DePassError("words are removed where the target is one token or a contrast of two")
        ids = _prompt_ids(attribution)
        edits = sorted(question.edits, key=lambda edit: edit.start)
        end = 0
        for edit in edits:
            if not end <= edit.start < edit.end <= len(ids):
                raise DePassError(
                    f"tokens {edit.start} to {edit.end} are not a part of the prompt, or overlap another edit"
                )
            end = edit.end
        for edit in reversed(edits):
            ids[edit.start : edit.end] = self._replacement(attribution, edit)
        limit = self.depass.decoder.max_positions
        if not ids or (limit is not None and len(ids) > limit):
            raise DePassError(
                "keep at least one token" if not ids else f"the model reads {limit} tokens at most"
            )
        logits, uncapped = self._logits(ids)
        token, *foils = attribution.target_ids
        after = float(uncapped[token] - sum(uncapped[foil] for foil in foils))
        return {
            "before": attribution.value,
            "after": after,
            "real": after - attribution.value,
            "predicted": _predicted(attribution, edits),
            "next": self._likely(logits),
        }

    def page(self, asked: Mapping[str, Any]) -> str:
        """Return the offline page of a question, as `Attribution.to_html` writes it.

        Args:
            asked: the fields of `AskedQuestion`.

        Raises:
            DePassError: a field is wrong, or what `DePass.attribute` raises.
        """
        question = _question(asked)
        attribution = self.attribution(question)
        title = f"What {model_name(self.name)} relies on"
        subtitle = f"{attribution.target} = {signed(attribution.value)}"
        example = self._example(question, attribution)
        return page_html([attribution], title=title, subtitle=subtitle, examples=[example])

    def _example(self, question: AskedQuestion, attribution: Attribution) -> dict[str, Any]:
        """Return what a page shows of the model itself."""
        layers = layer_scores(self.depass, attribution) if question.layers else None
        likely = next_tokens(self.depass, _prompt_ids(attribution), SHOWN)
        return {"likely": likely, "layers": None if layers is None else layers.tolist()}

    def attribution(self, question: AskedQuestion) -> Attribution:
        """Return the attribution of a question; the last ones are kept.

        Args:
            question: the question.

        Raises:
            DePassError: what `DePass.attribute` raises.
        """
        key = question.model_dump_json(exclude={"edits", "layers"})
        if key not in self._attributions:
            prompt, target = self._resolved(question)
            attribution = self.depass.attribute(prompt, target, source=question.source, rule=question.rule)
            attribution.metadata["model"] = self.name
            self._attributions[key] = attribution
            if len(self._attributions) > KEPT:
                self._attributions.popitem(last=False)
        self._attributions.move_to_end(key)
        return self._attributions[key]

    def _resolved(self, question: AskedQuestion) -> tuple[str, Target]:
        """Return the prompt and the target, read as a row of a file of prompts."""
        if (question.prompt is None) == (question.messages is None):
            raise DePassError("give a prompt or a conversation")
        if question.foil is not None and question.target is None:
            raise DePassError("the contrast is compared with an answer; give the answer, too")
        fields = question.model_dump(include={"prompt", "messages", "target", "foil"})
        row = {name: value for name, value in fields.items() if isinstance(value, str | list)}
        if isinstance(question.target, str) and not isinstance(question.foil, int):
            example = example_of(row, 1)
            return example.prompt, Explained().target(example, self.tokenizer)
        example = example_of({name: row[name] for name in ("prompt", "messages") if name in row}, 1)
        if question.target is None:
            return example.prompt, Explained().target(example, self.tokenizer)
        if question.foil is None:
            return example.prompt, Token(question.target)
        return example.prompt, Contrast(question.target, question.foil)

    def _replacement(self, attribution: Attribution, edit: Edit) -> list[int]:
        """Return the ids of an edit's text, with the space before the word that it replaces."""
        if not edit.text:
            return []
        space = " " if attribution.tokens[edit.start].startswith(" ") and not edit.text[0].isspace() else ""
        return self.tokenizer.encode(space + edit.text, add_special_tokens=False)

    def _logits(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits after the last token, `[vocabulary]`, and the same before any soft cap."""
        decoder = self.depass.decoder
        row = torch.tensor([ids], device=decoder.device)
        with torch.no_grad(), as_depass_runs(decoder):
            logits, uncapped = run(decoder, row, torch.tensor([len(ids) - 1], device=decoder.device))
        return logits[0].to(decoder.dtype), uncapped[0].to(decoder.dtype)

    def _likely(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        """Return the most likely tokens with their probabilities."""
        top = logits.double().softmax(-1).topk(min(SHOWN, len(logits)))
        return [
            {"id": token, "text": visible(token_text(token, self.tokenizer)), "probability": probability}
            for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def _question(asked: Mapping[str, Any]) -> AskedQuestion:
    """Check the fields of a question."""
    try:
        return AskedQuestion.model_validate(asked)
    except ValidationError as failed:
        error = failed.errors(include_url=False)[0]
        place = ".".join(map(str, error["loc"])) or "the question"
        raise DePassError(f"{place}: {error['msg']}") from None


def _prompt_ids(attribution: Attribution) -> list[int]:
    """Return the ids of the prompt, without those of an answer after it."""
    end = attribution.answer_start
    return attribution.token_ids[: attribution.position + 1 if end is None else end]


def _predicted(attribution: Attribution, edits: list[Edit]) -> float | None:
    """Return the change that the scores predict: the negative sum of the removed components' scores."""
    if any(edit.text for edit in edits):
        return None
    removed = {token for edit in edits for token in range(edit.start, edit.end)}
    spans = [
        (score, span)
        for score, span in zip(attribution.scores.tolist(), attribution.positions, strict=True)
        if span
    ]
    inside = [score for score, span in spans if removed.issuperset(range(*span))]
    covered = {token for _, span in spans if removed.issuperset(range(*span)) for token in range(*span)}
    return -sum(inside) if covered == removed and spans else None
