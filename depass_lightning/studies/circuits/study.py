"""How faithful circuits of nodes and of edges are, and how well scores agree with activation patching.

1. Generate prompts with corrupted counterparts; keep those whose answer the model prefers to the foil.
2. Score all heads and MLPs (`node_scores.py`) and all edges (`edge_scores.py`) by each method.
3. Keep the highest nodes or the strongest edges, from 0.1% to 100%, ablate all others by hooks in the model,
   and compute CPR and CMD (`faithfulness/circuits.py`, `faithfulness/edge_circuits.py`).

Source: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (ICML 2025, arXiv 2504.13151).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import Interval, agreement, bootstrap, circuit_scores, circuit_values
from depass_lightning.faithfulness.circuits import FRACTIONS, CircuitValues
from depass_lightning.faithfulness.edge_circuits import edge_layout
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.storage import (
    Manifest,
    keep_manifest,
    read_rows,
    task_fingerprint,
    weights_fingerprint,
)
from depass_lightning.studies.circuits import edge_scores
from depass_lightning.studies.circuits.edge_scores import EdgeRuns
from depass_lightning.studies.circuits.node_scores import METHODS, NodePairs, node_scores
from depass_lightning.studies.circuits.prompt_pairs import PAIRS, prompt_pairs
from depass_lightning.studies.study_files import write_experiment
from depass_lightning.studies.study_result import Cell, Curve, Panel, StudyResult
from depass_lightning.studies.study_rows import keep_rows, kept_rows
from depass_lightning.utils.distributed import from_first

PARTS = {"nodes": METHODS, "edges": edge_scores.METHODS}  # with the methods that score them
ALL_METHODS = tuple(dict.fromkeys(method for methods in PARTS.values() for method in methods))
FREE = ("circuits", "ablations", "batch_size")  # settings that may differ between rows of one run
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("method", pa.string()),
        ("values", pa.list_(pa.float64())),  # at each of FRACTIONS, then with everything kept, then nothing
        ("pearson", pa.float64()),
        ("spearman", pa.float64()),
    ]
)
NAMES = {
    "ioi": "IOI",
    "greater_than": "greater-than",
    "zero": "zero ablation",
    "mean": "mean ablation",
    "resample": "resampled",
}


@dataclass(frozen=True)
class CircuitFaithfulness:
    """Measure the faithfulness of circuits that several methods find.

    Args:
        tasks: any of `ioi`, `greater_than` and `agreement`; one without usable prompts is left out.
        circuits: of `nodes`, of `edges`, or both.
        size: the number of prompts of each task at most.
        pool: how many prompts of each task are asked to find them.
        methods: any of those of `PARTS`; nodes and edges are each scored by those that can.
        ablations: what replaces nodes outside the circuit, or what is read of them along edges outside it:
            `zero`, their `mean` over the corrupted prompts, or what they are on the corrupted prompt
            (`resample`).
        steps: the number of gradients that `eap_ig` averages.
        batch_size: the number of prompts, or of ablated passes, that run together.
        seed: of the prompts.

    Raises:
        DePassError: a setting is unknown or out of range.
    """

    tasks: Sequence[str] = tuple(PAIRS)
    circuits: Sequence[str] = tuple(PARTS)
    size: int = 10
    pool: int = 40
    methods: Sequence[str] = ALL_METHODS
    ablations: Sequence[Replacement] = get_args(Replacement)
    steps: int = 5
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "circuits", "methods", "ablations"):
            chosen = getattr(self, name)
            if isinstance(chosen, str) or not isinstance(chosen, Sequence):
                raise DePassError(f"{name} is a list of names; got {chosen!r}")
            object.__setattr__(self, name, tuple(dict.fromkeys(chosen)))
        for name, chosen, known in (
            ("tasks", self.tasks, tuple(PAIRS)),
            ("circuits", self.circuits, tuple(PARTS)),
            ("methods", self.methods, ALL_METHODS),
            ("ablations", self.ablations, get_args(Replacement)),
            *(
                (f"methods for {part}", self._methods(part), PARTS[part])
                for part in self.circuits
                if part in PARTS
            ),
        ):
            unknown = [entry for entry in chosen if entry not in known]
            if unknown or not chosen:
                wrong = ", ".join(map(str, unknown)) or "none"
                raise DePassError(f"{name} are {', '.join(known)}, one at least; got {wrong}")
        for name in ("size", "pool", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise DePassError(f"{name} must be at least 1; got {getattr(self, name)}")

    def _methods(self, part: str) -> list[str]:
        """Return the chosen methods that score nodes or edges."""
        return [method for method in self.methods if method in PARTS[part]]

    def run(self, depass: DePass, folder: str | os.PathLike[str], *, progress: bool = False) -> StudyResult:
        """Run the study, and write its table and page into a folder, with the numbers of each prompt.

        The numbers of one task, part and ablation are `rows/<task>-<part>-<ablation>.parquet`. Those that the
        folder has, of the same run, are not computed again. Inside `utils.distributed.sharing` processes
        share the prompts, and the first one writes.

        Args:
            depass: the model, with its tokenizer.
            folder: where to write.
            progress: show progress bars.

        Raises:
            DePassError: no task has prompts that the model can be asked and prefers the answer of, edges
                cannot be ablated in the model, or the folder has rows of another run.
        """
        started = time.perf_counter()
        if "edges" in self.circuits:
            edge_layout(depass.decoder)
        pairs = {task: self._pairs(depass, task, progress) for task in self.tasks}
        counts = {task: len(part.examples) for task, part in pairs.items()}
        if not any(counts.values()):
            raise DePassError(
                f"no prompt of {', '.join(self.tasks)} is split by the tokenizer like its corrupted variant "
                "and answered right; choose other tasks, or a larger pool"
            )
        panels: list[Panel] = []
        table: list[dict[str, Cell]] = []
        for keys, rows in self._rows(depass, pairs, Path(folder) / "rows", progress):
            panel, measured = _measure(rows, str(keys["circuit"]))
            name = ", ".join(
                NAMES.get(str(keys[key]), str(keys[key])) for key in ("task", "circuit", "ablation")
            )
            panels.append(replace(panel, name=name))
            table += [keys | {"prompts": counts[str(keys["task"])]} | row for row in measured]
        result = StudyResult(
            name="circuits",
            title=f"How faithful are circuits of {' and '.join(self.circuits)}?",
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

    def _pairs(self, depass: DePass, task: str, progress: bool) -> NodePairs:
        examples = prompt_pairs(depass, task, self.pool, self.seed)
        return NodePairs.of(depass, examples, self.size, batch_size=self.batch_size, progress=progress)

    def _rows(
        self, depass: DePass, pairs: Mapping[str, NodePairs], folder: Path, progress: bool
    ) -> Iterator[tuple[dict[str, Cell], list[dict[str, Any]]]]:
        """Yield the rows of each task, part and ablation, from the folder where they are there."""
        examples = [example for part in pairs.values() for example in part.examples]
        settings = {key: value for key, value in asdict(self).items() if key not in FREE}
        weights, prompts = weights_fingerprint(depass.model), task_fingerprint(examples)
        manifest = Manifest(settings, weights, prompts, len(examples))
        resumed = from_first(lambda: keep_manifest(manifest, folder))
        for task, part in pairs.items():
            for circuit in self.circuits if part.examples else ():
                for ablation in self.ablations:
                    path = folder / f"{task}-{circuit}-{ablation}.parquet"
                    rows = kept_rows(path, read_rows) if resumed else None
                    if rows is None:
                        score = self._node_rows if circuit == "nodes" else self._edge_rows
                        numbered = enumerate(score(depass, part, ablation, progress))
                        rows = [{"index": index, **row} for index, row in numbered]
                        keep_rows(path, rows, SCHEMA)
                    yield {"task": task, "circuit": circuit, "ablation": ablation}, rows

    def _node_rows(
        self, depass: DePass, pairs: NodePairs, ablation: Replacement, progress: bool
    ) -> Iterator[dict[str, Any]]:
        """Yield each method's values of each prompt, and its agreement with activation patching."""
        options = {"batch_size": self.batch_size, "progress": progress}
        scores = node_scores(depass, pairs, self._methods("nodes"), ablation, steps=self.steps, **options)
        references = pairs.references(ablation)
        for method in self._methods("nodes"):
            ranked = [
                replace(attribution, scores=by_method[method])
                for attribution, by_method in zip(pairs.attributions, scores, strict=True)
            ]
            values = circuit_values(depass.decoder, ranked, ablation, references=references)
            for value, by_method in zip(values, scores, strict=True):
                row = _row(method, value)
                if method != "patching":
                    agreed = agreement(by_method[method], by_method["patching"])
                    row |= {"pearson": agreed.pearson, "spearman": agreed.spearman}
                yield row

    def _edge_rows(
        self, depass: DePass, pairs: NodePairs, ablation: Replacement, progress: bool
    ) -> Iterator[dict[str, Any]]:
        """Yield each method's values of each prompt."""
        options = {"steps": self.steps, "batch_size": self.batch_size, "progress": progress}
        runs = EdgeRuns(depass, pairs, ablation, **options)
        for method, scores in runs.scores(self._methods("edges")).items():
            yield from (_row(method, value) for value in runs.values(scores))


def _row(method: str, value: CircuitValues) -> dict[str, Any]:
    return {"method": method, "values": [*value.values, value.whole, value.empty]}


def _measure(rows: Sequence[Mapping[str, Any]], circuit: str) -> tuple[Panel, list[dict[str, Cell]]]:
    """Return each method's faithfulness by size, and its row of the table."""
    curves: dict[str, Curve] = {}
    table: list[dict[str, Cell]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        values = [
            CircuitValues(FRACTIONS, kept, whole, empty)
            for *kept, whole, empty in (row["values"] for row in chosen)
        ]
        measured = circuit_scores(values)
        curves[method] = Curve([100 * size for size in FRACTIONS], measured.faithfulness)
        cells: dict[str, Cell] = {"method": method, "cpr": measured.cpr, "cmd": measured.cmd}
        if circuit == "nodes" and method != "patching":
            cells |= {name: _mean([row.get(name) for row in chosen]) for name in ("pearson", "spearman")}
        table.append(cells)
    return Panel("", f"{circuit} kept (%)", "faithfulness", curves), table


def _mean(values: Sequence[float | None]) -> Interval | None:
    numbers = [value for value in values if value is not None]
    return bootstrap(numbers) if numbers else None


def _notes(table: Sequence[Mapping[str, Cell]], counts: Mapping[str, int]) -> list[str]:
    """Return how the table is read, which tasks are left out, and which methods are ahead."""
    notes = [
        "CPR is the area under the faithfulness of circuits over the fraction that is kept, higher is "
        "better; CMD is the area between it and 1, lower is better. Nodes are ranked by their mean score "
        "over the prompts, edges by its absolute value. Pearson and Spearman compare all nodes' scores with "
        "activation patching, per prompt. Intervals are bootstrap 95% CIs over prompts.",
        "eap and eap_ig score edges. Summed over a node's outgoing edges, EAP is attribution patching (atp).",
    ]
    notes += [
        f"{task} is left out: no prompt is split by the tokenizer as needed and answered right."
        for task, count in counts.items()
        if not count
    ]
    groups: dict[str, list[Mapping[str, Cell]]] = {}
    for row in table:
        groups.setdefault(f"{row['task']}, {row['circuit']}, {row['ablation']}", []).append(row)
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
