"""How faithful circuits of heads and MLPs are, and how well scores agree with activation patching.

1. Generate prompts with corrupted counterparts; keep those whose answer the model prefers to the foil.
2. Score all heads and MLPs by each method (`node_scores.py`).
3. Keep the highest nodes, from 0.1% to 100%, ablate all others by hooks in the model, and compute CPR and CMD
   (`faithfulness/circuits.py`).

Source: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (ICML 2025, arXiv 2504.13151).
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import Interval, agreement, bootstrap, circuit_scores, circuit_values
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.studies.circuits.node_scores import METHODS, NodePairs, Scores, node_scores
from depass_lightning.studies.circuits.prompt_pairs import PAIRS, prompt_pairs
from depass_lightning.studies.study_files import write_experiment
from depass_lightning.studies.study_result import Cell, Curve, Panel, StudyResult
from depass_lightning.utils.distributed import from_first


@dataclass(frozen=True)
class CircuitFaithfulness:
    """Measure the faithfulness of node circuits that several methods find.

    Args:
        tasks: any of `ioi`, `greater_than` and `agreement`; one without usable prompts is left out.
        size: the number of prompts of each task at most.
        pool: how many prompts of each task are asked to find them.
        methods: any of `node_scores.METHODS`.
        ablations: what replaces nodes outside the circuit: `zero`, their `mean` over the corrupted prompts,
            or what they are on the corrupted prompt (`resample`).
        steps: the number of gradients that `eap_ig` averages.
        batch_size: the number of prompts, or of ablated passes, that run together.
        seed: of the prompts.

    Raises:
        DePassError: a setting is unknown or out of range.
    """

    tasks: Sequence[str] = tuple(PAIRS)
    size: int = 10
    pool: int = 40
    methods: Sequence[str] = METHODS
    ablations: Sequence[Replacement] = get_args(Replacement)
    steps: int = 5
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("tasks", self.tasks, tuple(PAIRS)),
            ("methods", self.methods, METHODS),
            ("ablations", self.ablations, get_args(Replacement)),
        ):
            unknown = [entry for entry in chosen if entry not in known]
            if unknown or not chosen:
                wrong = ", ".join(map(str, unknown)) or "none"
                raise DePassError(f"{name} are {', '.join(known)}, one at least; got {wrong}")
        for name in ("size", "pool", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise DePassError(f"{name} must be at least 1; got {getattr(self, name)}")

    def run(self, depass: DePass, folder: str | os.PathLike[str], *, progress: bool = False) -> StudyResult:
        """Run the study, and write its table and page into a folder.

        Args:
            depass: the model, with its tokenizer.
            folder: where to write.
            progress: show progress bars.

        Raises:
            DePassError: no task has prompts that the model can be asked and prefers the answer of.
        """
        started = time.perf_counter()
        panels: list[Panel] = []
        table: list[dict[str, Cell]] = []
        counts: dict[str, int] = {}
        for task in self.tasks:
            examples = prompt_pairs(depass, task, self.pool, self.seed)
            pairs = NodePairs.of(depass, examples, self.size, batch_size=self.batch_size, progress=progress)
            counts[task] = len(pairs.examples)
            if not pairs.examples:
                continue
            options = {"batch_size": self.batch_size, "progress": progress}
            scored = node_scores(depass, pairs, self.methods, self.ablations, steps=self.steps, **options)
            for ablation, scores in scored.items():
                panel, rows = self._measure(depass, pairs, ablation, scores)
                keys: dict[str, Cell] = {"task": task, "ablation": ablation, "prompts": counts[task]}
                panels.append(replace(panel, name=f"{task}, {ablation}"))
                table += [keys | row for row in rows]
        if not table:
            raise DePassError(
                f"no prompt of {', '.join(self.tasks)} is split by the tokenizer like its corrupted variant "
                "and answered right; choose other tasks, or a larger pool"
            )
        result = StudyResult(
            name="circuits",
            title="How faithful are circuits of heads and MLPs?",
            model=depass.decoder.name,
            data=", ".join(task for task, count in counts.items() if count),
            prompts=sum(counts.values()),
            seconds=time.perf_counter() - started,
            settings=asdict(self),
            panels=panels,
            table=table,
            notes=_notes(table, counts),
        )
        from_first(lambda: write_experiment(result, folder))
        return result

    def _measure(
        self, depass: DePass, pairs: NodePairs, ablation: Replacement, scores: Sequence[Scores]
    ) -> tuple[Panel, list[dict[str, Cell]]]:
        """Return each method's faithfulness by size, and its row of the table."""
        curves: dict[str, Curve] = {}
        rows: list[dict[str, Cell]] = []
        references = pairs.references(ablation)
        for method in self.methods:
            ranked = [
                replace(attribution, scores=by_method[method])
                for attribution, by_method in zip(pairs.attributions, scores, strict=True)
            ]
            values = circuit_values(depass.decoder, ranked, ablation, references=references)
            measured = circuit_scores(values)
            curves[method] = Curve([100 * size for size in values[0].fractions], measured.faithfulness)
            row: dict[str, Cell] = {"method": method, "cpr": measured.cpr, "cmd": measured.cmd}
            if method != "patching":
                agreements = [agreement(by_method[method], by_method["patching"]) for by_method in scores]
                row["pearson"] = _mean([entry.pearson for entry in agreements])
                row["spearman"] = _mean([entry.spearman for entry in agreements])
            rows.append(row)
        return Panel("", "nodes kept (%)", "faithfulness", curves), rows


def _mean(values: Sequence[float | None]) -> Interval | None:
    numbers = [value for value in values if value is not None]
    return bootstrap(numbers) if numbers else None


def _notes(table: Sequence[Mapping[str, Cell]], counts: Mapping[str, int]) -> list[str]:
    """Return how the table is read, which tasks are left out, and which methods are ahead."""
    notes = [
        "CPR is the area under the faithfulness of the highest nodes over the fraction that is kept, higher "
        "is better; CMD is the area between it and 1, lower is better. Nodes are ranked by their mean score "
        "over the prompts. Pearson and Spearman compare all nodes' scores with activation patching, per "
        "prompt. Intervals are bootstrap 95% CIs over prompts.",
        "EAP is not listed: the scores of a node's outgoing edges sum to that of attribution patching (atp).",
    ]
    notes += [
        f"{task} is left out: no prompt is split by the tokenizer as needed and answered right."
        for task, count in counts.items()
        if not count
    ]
    groups: dict[str, list[Mapping[str, Cell]]] = {}
    for row in table:
        groups.setdefault(f"{row['task']}, {row['ablation']}", []).append(row)
    for name, rows in groups.items():
        best, closest = max(rows, key=_value("cpr")), min(rows, key=_value("cmd"))
        notes.append(
            f"{name}: the highest CPR is that of {best['method']}, the lowest CMD of {closest['method']}."
        )
    return notes


def _value(column: str) -> Callable[[Mapping[str, Cell]], float]:
    def value(row: Mapping[str, Cell]) -> float:
        cell = row[column]
        assert isinstance(cell, Interval)
        return cell.value

    return value
