"""Calibrate a linear rule on some prompts, write its file, and judge it on prompts that it has not seen."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from depass_lightning import tasks
from depass_lightning.depass import DePass
from depass_lightning.engine.linear_rules import CalibratedRule, HalfRule, LinearPaths, ShapRule
from depass_lightning.engine.rule_files import rule_content
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import Interval, answered_right, bootstrap
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.storage import task_fingerprint, weights_fingerprint, write_json
from depass_lightning.studies.calibration.fit import KINDS, Ablated, ablate, depth_of, fit
from depass_lightning.studies.comparison.prompt_splits import Split, sampled
from depass_lightning.studies.study_files import write_experiment
from depass_lightning.studies.study_result import Cell, StudyResult, data_name
from depass_lightning.targets import AnswerTarget
from depass_lightning.tasks import Example
from depass_lightning.utils.bootstrap import sign_flip_test
from depass_lightning.utils.distributed import from_first

FILE = "rule.json"
ALPHA = 0.05  # the level at which a difference is reported
REPLACEMENTS: tuple[Replacement, ...] = ("zero", "mean")


@dataclass(frozen=True)
class Calibration:
    """Fit a linear rule to true ablations.

    Args:
        task: the task's name.
        path: its file; None for the bundled model's prompts.
        split: the prompts that the rule is fitted on.
        size: how many prompts of each task at most, the first that the model answers right.
        pool: how many prompts of a split are asked to find them; None asks all.
        judged: further tasks that the rule is judged on, each with `task` and `path`.
        target: what is explained of an answer.
        components: what is ablated: any of heads, mlps and tokens.
        ablations: zero, mean, or both.
        depths: how many parts of the model, of equally many blocks, have weights of their own.
        batch_size: how many prompts are scored at once.
        seed: of the order within a split.

    Raises:
        DePassError: a setting is unknown or out of range.
    """

    task: str = "ioi"
    path: str | None = None
    split: Split = "development"
    size: int = 16
    pool: int | None = None
    judged: Sequence[Mapping[str, Any]] = ()
    target: AnswerTarget = "contrast"
    components: Sequence[str] = tuple(KINDS)
    ablations: Sequence[Replacement] = REPLACEMENTS
    depths: int = 3
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("components", self.components, tuple(KINDS)),
            ("ablations", self.ablations, REPLACEMENTS),
        ):
            unknown = sorted(set(chosen) - set(known))
            if not chosen or unknown:
                wrong = ", ".join(unknown) or "none"
                raise DePassError(f"{name} are {', '.join(known)}, one at least; got {wrong}")
        if self.target not in get_args(AnswerTarget):
            raise DePassError(f"target must be {', '.join(get_args(AnswerTarget))}; got {self.target!r}")
        if self.size < 1 or self.depths < 1:
            raise DePassError(f"size and depths must be at least 1; got {self.size} and {self.depths}")
        if self.split == "held_out":
            raise DePassError("the rule is judged on held_out prompts; fit it on development ones")
        for entry in self.judged:
            if not set(entry) <= {"task", "path"} or "task" not in entry:
                raise DePassError(f"an entry of judged has task and path; got {dict(entry)}")

    def run(self, depass: DePass, folder: str | os.PathLike[str], *, progress: bool = False) -> StudyResult:
        """Fit the rule, and write its file `rule.json` and the agreements into a folder.

        Raises:
            DePassError: a file is wrong, depths are more than blocks, or the model answers no prompt right.
        """
        started, blocks = time.perf_counter(), len(depass.decoder.blocks)
        if self.depths > blocks:
            raise DePassError(f"depths is {self.depths}, but the model has {blocks} blocks")
        parts: dict[str, tuple[str, str | None, Split]] = {}
        parts[f"{self.task}, {self.split}"] = (self.task, self.path, self.split)
        for entry in ({"task": self.task, "path": self.path}, *self.judged):
            parts[f"{entry['task']}, held_out"] = (entry["task"], entry.get("path"), "held_out")
        examples = {name: self._examples(depass, *part, progress) for name, part in parts.items()}
        ablated = {name: self._ablate(depass, part, progress) for name, part in examples.items()}
        fitted, *_ = ablated.values()
        weights = fit(depass, fitted, self.depths, self.batch_size)
        path = Path(folder) / FILE
        content = rule_content(
            weights, depass.decoder, **self._provenance(depass, next(iter(examples.values())))
        )
        from_first(lambda: write_json(path, content))
        calibrated = CalibratedRule(blocks=tuple(CalibratedRule.weights(*pair) for pair in weights))
        table = [row for name, part in ablated.items() for row in self._rows(depass, name, part, calibrated)]
        result = StudyResult(
            name="calibrate",
            title="A linear rule fitted to true ablations",
            model=depass.decoder.name,
            data=f"{self.task}, {data_name(self.path) or 'the bundled model’s own'}",
            prompts=len(fitted.questions),
            seconds=time.perf_counter() - started,
            settings=asdict(self) | {"rule_file": FILE, **self._weights(weights)},
            table=table,
            notes=_notes(table),
        )
        from_first(lambda: write_experiment(result, folder))
        return result

    def _examples(
        self, depass: DePass, task: str, path: str | None, split: Split, progress: bool
    ) -> list[Example]:
        """Return a task's prompts of a split that the model answers right."""
        loaded = list(tasks.load(task, seed=self.seed, path=path))
        asked = sampled(loaded, split, self.seed)[: self.pool]
        right = answered_right(depass, asked, self.batch_size, progress=progress)[: self.size]
        if not right:
            raise DePassError(f"the model answers none of {len(asked)} {split} prompts of {task} right")
        return [asked[index] for index in right]

    def _ablate(self, depass: DePass, examples: list[Example], progress: bool) -> Ablated:
        batch_size = 4 * self.batch_size  # plain passes need less memory than scores
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        return ablate(depass, examples, self.components, self.ablations, self.target, **options)

    def _provenance(self, depass: DePass, examples: list[Example]) -> dict[str, Any]:
        """Return what the rule was fitted to and on."""
        return {
            "model": {"name": depass.decoder.name, "fingerprint": weights_fingerprint(depass.model)},
            "fitted_on": {
                "task": self.task,
                "file": data_name(self.path),
                "split": self.split,
                "target": self.target,
                "components": list(self.components),
                "ablations": list(self.ablations),
                "fingerprint": task_fingerprint(examples),
                "prompts": [example.id for example in examples],
            },
        }

    def _weights(self, weights: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
        """Return the weights of each depth."""
        blocks = len(weights)
        by_depth = {depth_of(block, blocks, self.depths): pair for block, pair in enumerate(weights)}
        gates, scores = zip(*by_depth.values(), strict=True)
        return {"gate_weights": list(gates), "score_weights": list(scores)}

    def _rows(
        self, depass: DePass, name: str, ablated: Ablated, calibrated: CalibratedRule
    ) -> list[dict[str, Cell]]:
        """Return each rule's agreement on some prompts, and the difference to `half`."""
        rules: dict[str, LinearPaths] = {rule.name: rule for rule in (HalfRule(), ShapRule(), calibrated)}
        agreements = {
            rule: ablated.agreements(depass, paths, self.batch_size) for rule, paths in rules.items()
        }
        means = {rule: [fmean(row.values()) for row in rows] for rule, rows in agreements.items()}
        table: list[dict[str, Cell]] = []
        for rule, rows in agreements.items():
            cells: dict[str, Cell] = {"data": name, "prompts": len(rows), "rule": rule}
            cells |= {"agreement": bootstrap(means[rule])}
            if rule != HalfRule.name:
                more = [a - b for a, b in zip(means[rule], means[HalfRule.name], strict=True)]
                cells |= {"agreement_difference": bootstrap(more), "agreement_p": sign_flip_test(more)}
            cells |= {column: bootstrap([row[column] for row in rows if column in row]) for column in rows[0]}
            table.append(cells)
        return table


def _notes(table: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Return how the table is read, and whether the fitted rule is ahead where it was not fitted."""
    notes = [
        "Agreement is the correlation of scores and what the target's value loses with each component "
        "ablated, per prompt; the first column is the mean over components and ablations. A difference is "
        "the rule less half, per prompt, with a bootstrap 95% CI and the p-value of a sign-flip test (not "
        "corrected)."
    ]
    for row in table:
        difference = row.get("agreement_difference")
        if row["rule"] != CalibratedRule.name or not isinstance(difference, Interval):
            continue
        p = row["agreement_p"]
        clear = isinstance(p, float) and p < ALPHA
        verdict = ("higher" if difference.value > 0 else "lower") if clear else "not separable"
        notes.append(
            f"{row['data']}: the calibrated rule's agreement compared with that of half is {verdict}."
        )
    return notes
