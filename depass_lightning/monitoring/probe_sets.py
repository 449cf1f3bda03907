"""Probe sets: held-out prompts, each with its target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from depass_lightning import tasks
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.dataloader_prompts import prompts_in
from depass_lightning.targets import (
    AnswerTarget,
    Continuation,
    LogitTarget,
    LogOdds,
    LogProb,
    TargetLike,
    Token,
    answer_target,
    as_target,
)
from depass_lightning.tasks import Example, Task
from depass_lightning.utils.chat_templates import formatted
from depass_lightning.utils.sections import Conversation

Messages = Sequence[Mapping[str, Any]]
ProbeSource = str | Path | Task | DataLoader | Sequence[Example | tuple[str | Messages, TargetLike]]
TargetKind = AnswerTarget | Literal["own"]
AnswerPart = Literal["whole", "first"]  # the part explained of an answer of several tokens
TARGET_KINDS = (*get_args(AnswerTarget), "own")


@dataclass(frozen=True)
class ProbePrompt:
    """One held-out prompt and its target.

    Attributes:
        id: its name, the same in every run: similarities refer to it.
        prompt: the text; "" if the prompt is token ids.
        target: what is explained; None for the model's next token.
        evidence: the character ranges `[start, end)` of the evidence in the prompt; empty if unknown.
        ids: the prompt's token ids, instead of its text; None if the prompt is text.
        judged: whether the target is known to be the right answer, as in a task.
        example: the prompt with its answer as text; None for other targets.
    """

    id: str
    prompt: str
    target: TargetLike
    evidence: tuple[tuple[int, int], ...] = ()
    ids: tuple[int, ...] | None = None
    judged: bool = False
    example: Example | None = None

    def formatted(
        self, tokenizer: PreTrainedTokenizerBase, target: "TargetKind", answer: "AnswerPart" = "whole"
    ) -> "ProbePrompt":
        """Return the probe with its prompt as the model reads it: a conversation by its chat template.

        Args:
            tokenizer: the model's tokenizer.
            target: what is explained, see `load_set`.
            answer: which part of an example's answer of several tokens is explained.

        Raises:
            DePassError: there is no chat template, or it refuses the conversation.
        """
        if self.example is None:
            return replace(self, prompt=formatted(self.prompt, tokenizer, f"the probe {self.id!r}"))
        example = self.example.formatted(tokenizer)
        aimed = self.target
        if target != "own":
            aimed = example.target(target, tokenizer if answer == "whole" else None)
        evidence = tuple(example.evidence_ranges())
        return replace(self, prompt=example.prompt, target=aimed, evidence=evidence, example=None)


def check_target_kind(kind: str, answer: str) -> None:
    """Check the kind of target.

    Args:
        kind: one of `TargetKind`.
        answer: one of `AnswerPart`.

    Raises:
        DePassError: there is no such kind of target for probes, or no such part of an answer.
    """
    if answer not in get_args(AnswerPart):
        raise DePassError(f"answer must be 'whole' or 'first', not {answer!r}")
    if kind not in TARGET_KINDS:
        known = ", ".join(map(repr, TARGET_KINDS))
        raise DePassError(f"target={kind!r} cannot be explained for probes; choose one of {known}")


def name_sets(probes: ProbeSource | Mapping[str, ProbeSource]) -> dict[str, ProbeSource]:
    """Return the probe sets by name: a mapping's key, a task's name, a file's stem, or "probes".

    Args:
        probes: a probe set, or several in a mapping from names.

    Raises:
        DePassError: the mapping is empty.
    """
    if isinstance(probes, Mapping):
        if not probes:
            raise DePassError("probes is an empty mapping; give at least one set, such as {'ioi': 'ioi'}")
        return dict(probes)
    if isinstance(probes, Task):
        return {probes.name: probes}
    if isinstance(probes, str | Path):
        return {Path(probes).stem if _is_file(probes) else str(probes): probes}
    return {"probes": probes}


def load_set(
    name: str,
    probes: ProbeSource,
    size: int,
    target: TargetKind = "contrast",
    answer: AnswerPart = "whole",
) -> list[ProbePrompt]:
    """Load the first `size` probes of a set.

    Args:
        name: the set's name, for errors.
        probes: the name of a task, a task, a file of JSON lines, a list of examples and of pairs of a prompt
            and its target, or a DataLoader (`dataloader_prompts.py`).
        size: the maximum number of probes.
        target: what is explained: "contrast", the probe's target, against its foil where it has one;
            "token", without the foil; "centred", that less the mean logit; "log_odds", the token against all
            others; "logprob", its log-probability; "own", the model's most likely next token.
        answer: which part is explained of a DataLoader's answers; those of texts wait for a tokenizer, see
            `ProbePrompt.formatted`.

    Raises:
        DePassError: the source is none of these, the set is empty, or two probes have one id.
    """
    loaded = [
        replace(probe, target=_aimed(probe.target, target), judged=probe.judged and target != "own")
        for probe in _read(name, probes, size, answer)
    ]
    if not loaded:
        raise DePassError(f"the probe set {name!r} is empty; give it at least one prompt")
    ids = [probe.id for probe in loaded]
    if twice := next((id for id in ids if ids.count(id) > 1), None):
        raise DePassError(f"two probes of {name!r} are both named {twice!r}; ids must differ")
    return loaded


def _read(name: str, probes: ProbeSource, size: int, part: AnswerPart) -> list[ProbePrompt]:
    if isinstance(probes, DataLoader):
        loaded = []
        for i, (ids, answer) in enumerate(prompts_in(name, probes, size)):
            first, *others = answer
            target = Continuation(answer) if others and part == "whole" else first
            loaded.append(ProbePrompt(f"{name}-{i}", "", target, ids=ids, judged=True))
        return loaded
    if isinstance(probes, str | Path):
        # a task generates `size` prompts; a file may have fewer
        probes = tasks.load("jsonl", path=probes) if _is_file(probes) else tasks.load(str(probes), size=size)
    if not isinstance(probes, Task | Sequence):
        raise DePassError(
            f"the probes of {name!r} are a {type(probes).__name__}; give a task or its name, a file, "
            "a DataLoader, or a list of (prompt, target)"
        )
    return [_probe(name, i, probes[i]) for i in range(min(size, len(probes)))]


def _probe(set_name: str, index: int, item: Any) -> ProbePrompt:
    """Return one entry of a set as a probe."""
    if isinstance(item, Example):
        evidence = tuple(item.evidence_ranges())
        return ProbePrompt(item.id, item.prompt, item.target(), evidence, judged=True, example=item)
    if isinstance(item, tuple | list) and len(item) == 2:
        prompt, target = item
        if isinstance(prompt, list):
            prompt = Conversation(prompt, name=f"probe {index} of {set_name!r}")
        if isinstance(prompt, str):
            id = f"{set_name}-{index}"
            example = Example(id, prompt, target) if isinstance(target, str) else None
            return ProbePrompt(id, prompt, target, example=example)
    raise DePassError(
        f"probe {index} of {set_name!r} is {item!r}; give (prompt, target), or an Example; a prompt is text "
        "or messages"
    )


def _aimed(target: TargetLike, kind: TargetKind) -> TargetLike:
    """Return a probe's target under a kind of target."""
    if kind == "own":
        return Token(None)
    if kind == "contrast":
        return target
    target = as_target(target)
    if isinstance(target, Continuation):
        return replace(target, of="logit" if kind == "token" else kind)
    kinds = {"token": Token, "log_odds": LogOdds, "logprob": LogProb}
    if isinstance(target, kinds.get(kind, ())) or not isinstance(target, LogitTarget):
        return target
    return answer_target(target.token, kind, target.position, first=target.first)


def _is_file(probes: str | Path) -> bool:
    return isinstance(probes, Path) or Path(probes).suffix in {".json", ".jsonl", ".csv", ".parquet"}
