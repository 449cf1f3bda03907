"""Does masking what a truthfulness probe is traced back to make a misled model answer right again?

1. Train a truthfulness probe on statements that are true or false, at every layer, and take the layer that
   does best on a part of the training statements.
2. Put prompts after misleading information, and attribute the probe's logit at the information's last token,
   where a statement ends as in training, to the tokens.
3. Of the information's tokens, mask those that speak most against "true", and ask again.
4. For comparison: mask the tokens at which the probe itself reads least truth; as many tokens at random;
   nothing; and ask without any information.

Source: Hong et al., "DePass" (arXiv 2510.18462), the experiment on a token-level subspace.
"""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from depass_lightning import tasks
from depass_lightning.depass import DePass
from depass_lightning.engine.rules import RuleName
from depass_lightning.errors import DePassError
from depass_lightning.linear_probes import LinearProbe, hidden_states, spread, train_probes
from depass_lightning.prompts import Prompt, prompts_of
from depass_lightning.sources import Tokens
from depass_lightning.studies.study_files import write_experiment
from depass_lightning.studies.study_result import StudyResult, data_name
from depass_lightning.studies.truthfulness.answers import DEPASS, NONE, PROBE, RANDOM, Answers
from depass_lightning.studies.truthfulness.questions import MASKS, ForcedChoice, Mask, Reply, ask
from depass_lightning.tasks import Example, Task, Texts, load_texts
from depass_lightning.utils.distributed import from_first
from depass_lightning.utils.tokenization import token_id


@dataclass(frozen=True)
class Misled:
    """A prompt after misleading information, as the model reads it.

    Attributes:
        example: the prompt.
        prompt: its tokens.
        plain: the ids of the prompt without the information.
        answer: the id of the right answer's first token.
        foil: that of the false answer.
        places: the positions of the information's tokens.
        false: those of the tokens that state the false answer, where that is known.
    """

    example: Example
    prompt: Prompt
    plain: list[int]
    answer: int
    foil: int
    places: list[int]
    false: list[int]


@dataclass(frozen=True)
class Truthful:
    """The truthfulness experiment.

    Args:
        task: `truthfulqa`, where an answer is right if the right option is more likely than the false one; or
            `counterfact` after false statements, where the right answer must be the most likely of all
            tokens. The bundled model's own `truthfulqa` has no options and is judged like `counterfact`.
        path: the task's file or data set; None for the bundled model's own.
        train_path: statements to train the probe on, rows `{text, label}`; None for the bundled model's own.
        test_path: statements to judge it on.
        size: how many prompts at most.
        known: take only prompts that the model answers right without the information: the others cannot be
            misled.
        counts: how many tokens are masked.
        mask: `remove` takes them out and encodes the rest again, as the paper's other experiments on tokens
            do; `attention` hides them from all later tokens.
        layers: where probes are tried; None for ten layers, evenly spread.
        rule: how neurons are shared.
        draws: how many random choices a prompt.
        batch_size: how many prompts go through the model at once.
        seed: of everything that is drawn.
    """

    task: str = "truthfulqa"
    path: str | None = None
    train_path: str | None = None
    test_path: str | None = None
    size: int | None = 100
    known: bool = True
    counts: Sequence[int] = (0, 1, 2, 3, 5, 8, 12)
    mask: Mask = "remove"
    layers: Sequence[int] | None = None
    rule: RuleName = "softmax"
    draws: int = 3
    batch_size: int = 16
    seed: int = 0

    def run(self, depass: DePass, folder: str | os.PathLike[str], *, progress: bool = False) -> StudyResult:
        """Run the experiment and write it into a folder, the probe included (`probe.safetensors`).

        Raises:
            DePassError: a setting or a file is wrong, or no prompt can be used.
        """
        started = time.perf_counter()
        task, train, test = self._data()
        prompts, skipped = misled_prompts(depass, task)
        tried = len(prompts)
        if self.known:
            prompts = self._answered(depass, prompts)
        layers = self.layers or spread(len(depass.decoder.blocks), 10)
        probes = train_probes(depass, train, test, layers=layers, batch_size=self.batch_size, seed=self.seed)
        probe = probes.best
        from_first(lambda: probe.save(Path(folder) / "probe.safetensors"))
        orders = {
            DEPASS: [blamed_by_depass(depass, probe, prompts, self.rule, self.batch_size, progress)],
            PROBE: [flagged_by_probe(depass, probe, prompts, self.batch_size)],
            RANDOM: [_shuffled(prompts, f"{self.seed} {draw}") for draw in range(self.draws)],
        }
        results = self._ask(depass, prompts, orders)
        experiment = StudyResult(
            name="paper_truthful",
            title="Does masking what the truthfulness probe is traced to undo misleading information?",
            model=depass.decoder.name,
            data=f"misled {task.name}, {data_name(self.path) or 'the bundled model’s own'}",
            prompts=len(prompts),
            seconds=time.perf_counter() - started,
            settings=asdict(self)
            | {
                "probe_layer": probe.layer,
                "probe": asdict(probe.fit),
                "validation_by_layer": {
                    probe.layer: value for probe, value in zip(probes.probes, probes.validation, strict=True)
                },
                "held_out_by_layer": {probe.layer: probe.fit.accuracy for probe in probes.probes},
            },
            panels=results.panels(),
            table=results.table(),
            notes=[*self._about_prompts(results, tried, skipped), *self._notes(probe)],
        )
        from_first(lambda: write_experiment(experiment, folder))
        return experiment

    def _data(self) -> tuple[Task, Texts, Texts]:
        """Load everything, so that a wrong setting is told before anything expensive."""
        if self.task not in ("truthfulqa", "counterfact"):
            raise DePassError(f"misleading prompts are of truthfulqa or counterfact, not of {self.task!r}")
        counts = list(self.counts)
        if not counts or counts[0] != 0 or sorted(set(counts)) != counts:
            raise DePassError(f"counts must rise from 0, where nothing is masked; got {counts}")
        if self.mask not in MASKS:
            raise DePassError(f"tokens are masked by {' or '.join(map(repr, MASKS))}, not {self.mask!r}")
        split = "misleading" if self.task == "counterfact" else "test"
        task = tasks.load(
            self.task, size=None if self.known else self.size, seed=self.seed, split=split, path=self.path
        )
        train = load_texts("truthful", split="train", path=self.train_path, seed=self.seed)
        test = load_texts("truthful", split="test", path=self.test_path, seed=self.seed)
        if set(train.labels) != {"true", "false"}:
            raise DePassError(f"statements are labelled true or false; got {', '.join(set(train.labels))}")
        return task, train, test

    @property
    def _by_options(self) -> bool:
        return self.task == "truthfulqa" and self.path is not None

    def _answered(self, depass: DePass, prompts: list[Misled]) -> list[Misled]:
        """Return the first prompts that are answered right without the information."""
        questions = [ForcedChoice(misled.plain, misled.answer, misled.foil) for misled in prompts]
        replies = ask(depass, questions, batch_size=self.batch_size)
        pairs = zip(prompts, replies, strict=True)
        kept = [
            misled for misled, reply in pairs if (reply.preferred if self._by_options else reply.rank == 1)
        ]
        if not kept:
            raise DePassError(
                f"the model answers none of {len(prompts)} prompts right without the information; "
                "known=false takes them all"
            )
        return kept[: self.size]

    def _ask(
        self, depass: DePass, prompts: list[Misled], orders: dict[str, list[list[list[int]]]]
    ) -> "Answers":
        """Ask every prompt with every number of tokens masked in every order, and without information."""
        questions, meant = [], []
        for method, several in orders.items():
            for draw in several:
                for count in self.counts:
                    for number, (misled, order) in enumerate(zip(prompts, draw, strict=True)):
                        meant.append((method, count, number))
                        questions.append(
                            ForcedChoice(misled.prompt.ids, misled.answer, misled.foil, order[:count])
                        )
        for number, misled in enumerate(prompts):
            meant.append((NONE, 0, number))
            questions.append(ForcedChoice(misled.plain, misled.answer, misled.foil))
        replies = ask(depass, questions, mask=self.mask, batch_size=self.batch_size)
        grouped: dict[tuple[str, int, int], list[Reply]] = {}
        for key, reply in zip(meant, replies, strict=True):
            grouped.setdefault(key, []).append(reply)
        return Answers(
            grouped,
            list(self.counts),
            len(prompts),
            self._by_options,
            self.seed,
            {
                (method, count): [
                    sum(bool(set(misled.false) & set(draw[i][:count])) for draw in several) / len(several)
                    for i, misled in enumerate(prompts)
                ]
                for method, several in orders.items()
                for count in self.counts
                if all(misled.false for misled in prompts)
            },
        )

    def _about_prompts(self, results: "Answers", tried: int, skipped: list[str]) -> list[str]:
        """Return notes on the prompts."""
        notes = []
        if self.known:
            notes.append(
                f"The {results.prompts} prompts are the first of {tried} that the model answers right "
                "without the information: the others cannot be misled."
            )
        notes.append(
            f"{len(results.misled)} of {results.prompts} prompts are answered right without the information "
            "and wrong with it. “Right again” is over those alone. Any disturbance turns some of them, which "
            "is what masking at random shows."
        )
        if not results.misled:
            notes.append("The information misleads the model nowhere, so that nothing can be undone here.")
        if skipped:
            notes.append(f"{len(skipped)} prompts were left out; the first: {skipped[0]}")
        return notes

    def _notes(self, probe: LinearProbe) -> list[str]:
        """Return notes on how the numbers were computed."""
        fit = probe.fit
        right = (
            "An answer is right where the right option is more likely than the false one."
            if self._by_options
            else "An answer is right where its first token is the most likely of all."
        )
        masked = (
            "Masked tokens are removed, and what is left is encoded again."
            if self.mask == "remove"
            else "Masked tokens stay at their places, and no later token attends to them."
        )
        notes = [
            f"The probe at layer {probe.layer} was chosen by its accuracy on a fifth of the training "
            f"statements. On {fit.held_out} other statements it is right on {fit.accuracy:.1%}; always "
            f"saying what is most frequent in training would be on {fit.majority:.1%}."
            + ("" if fit.converged else " Its solver stopped at its limit of iterations."),
            "Its logit is read at the last token of the misleading information, and only that information's "
            f"tokens are masked: at most as many as it has. {masked}",
            f"{right} “Of the two” is the right answer's probability where only it and the false one count.",
            "Intervals: 95%, by bootstrap over prompts. “Over random” and “over the probe” are differences "
            "on the same prompts; an interval that holds zero shows no difference.",
        ]
        if fit.accuracy - fit.majority < 2 * (0.25 / fit.held_out) ** 0.5:
            notes.append(
                "On those statements the probe does no better than chance, so that what it is traced to says "
                "nothing about truth: this run shows that the experiment works, not what DePass finds."
            )
        return notes


def misled_prompts(depass: DePass, task: Task) -> tuple[list[Misled], list[str]]:
    """Read a task's prompts, with a role `misleading`, a variant `plain` and a foil, as the model does.

    Returns:
        The prompts that can be used, and why the others cannot.

    Raises:
        DePassError: the tokenizer does not know where tokens stand in the text, or no prompt can be used.
    """
    tokenizer, size = depass.tokenizer, depass.decoder.vocabulary_size
    prompts, skipped = [], []
    for example in task:
        try:
            texts = [example.prompt, example.variants["plain"]]
            prompt, plain = prompts_of(depass.decoder, tokenizer, texts, None, None)
            ids = [
                token_id(text, example.prompt, tokenizer, size, first=True)
                for text in (example.known_answer, example.foil or "")
            ]
            if ids[0] == ids[1]:
                raise DePassError("the right and the false answer begin with the same token")
            places, false = (_places(prompt, example, role) for role in ("misleading", "false_answer"))
            prompts.append(Misled(example, prompt, plain.ids, *ids, places=places, false=false))
        except DePassError as error:
            skipped.append(f"{example.id}: {error}")
    if not prompts:
        raise DePassError(f"no prompt of {task.name} can be used; {skipped[0]}")
    return prompts, skipped


def _places(prompt: Prompt, example: Example, role: str) -> list[int]:
    """Return the positions of the tokens that stand for a role."""
    if prompt.offsets is None:
        raise DePassError("its tokenizer does not know where tokens stand in the text; use a fast one")
    return [
        place
        for place, (start, end) in enumerate(prompt.offsets)
        if start < end and any(start < span[1] and end > span[0] for span in example.roles.get(role, ()))
    ]


def blamed_by_depass(
    depass: DePass,
    probe: LinearProbe,
    prompts: Sequence[Misled],
    rule: RuleName,
    batch_size: int,
    progress: bool = False,
) -> list[list[int]]:
    """Order each prompt's misleading tokens by how much they speak against "true", the most first."""
    attributions = depass.attribute(
        [misled.prompt.text for misled in prompts],
        [probe.target("true", misled.places[-1]) for misled in prompts],
        source=Tokens(),
        rule=rule,
        batch_size=batch_size,
        progress=progress,
    )
    orders = []
    for misled, attribution in zip(prompts, attributions, strict=True):
        scores = {
            span[0]: float(score)
            for span, score in zip(attribution.positions, attribution.scores, strict=True)
            if span is not None
        }
        orders.append(sorted(misled.places, key=lambda place: scores[place]))
    return orders


def flagged_by_probe(
    depass: DePass, probe: LinearProbe, prompts: Sequence[Misled], batch_size: int
) -> list[list[int]]:
    """Order each prompt's misleading tokens by the probe's own logit at them, the least true first."""
    states = hidden_states(
        depass,
        [misled.prompt.text for misled in prompts],
        layers=[probe.layer],
        position="all",
        batch_size=batch_size,
    )
    true, false = probe.labels.index("true"), probe.labels.index("false")
    orders = []
    for misled, (state,) in zip(prompts, states, strict=True):
        logits = probe.logits(state)
        truth = (logits[:, true] - logits[:, false]).tolist()
        orders.append(sorted(misled.places, key=lambda place: truth[place]))
    return orders


def _shuffled(prompts: Sequence[Misled], seed: str) -> list[list[int]]:
    return [
        random.Random(f"mask {seed} {misled.example.id}").sample(misled.places, len(misled.places))
        for misled in prompts
    ]
