"""The experiments on tokens, heads and neurons: which method finds what the answer rests on?

1. Take the task's prompts that the model answers right.
2. Score them by every method, and measure the scores (`comparison.py`).
3. Write down curves, table and page, and every prompt's numbers.

Source: Hong et al., "DePass" (arXiv 2510.18462), the experiments on tokens, heads and neurons.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from depass_lightning import tasks
from depass_lightning.attribution.question import Question
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness import (
    AblationAgreement,
    LinearDatamodeling,
    Measure,
    SoftRemoval,
    answered_right,
    check_percents,
)
from depass_lightning.faithfulness.true_ablation import Replacement
from depass_lightning.methods import Method, make_method
from depass_lightning.prompts import prompts_of
from depass_lightning.sources import Heads, Module, Neurons, Source, Tokens
from depass_lightning.storage import (
    ATTRIBUTION_SCHEMA,
    Manifest,
    keep_manifest,
    read_rows,
    task_fingerprint,
    weights_fingerprint,
)
from depass_lightning.studies.comparison.method_runs import (
    AGAINST,
    HEAD_METHODS,
    MLP_METHODS,
    NEURON_METHODS,
    TOKEN_METHODS,
    MethodRun,
    compare_rows,
    notes_on,
    removal_measures,
    run_method,
)
from depass_lightning.studies.comparison.prompt_splits import Split, sampled
from depass_lightning.studies.study_files import write_experiment
from depass_lightning.studies.study_result import StudyResult, data_name
from depass_lightning.studies.study_rows import keep_rows, kept_rows
from depass_lightning.targets import AnswerTarget
from depass_lightning.tasks import Example
from depass_lightning.utils.distributed import from_first

Components = Literal["tokens", "heads", "neurons", "mlps"]
Extra = Literal["lds", "soft"]

LISTED: dict[str, tuple[str, ...]] = {
    "tokens": TOKEN_METHODS,
    "heads": HEAD_METHODS,
    "neurons": NEURON_METHODS,
    "mlps": MLP_METHODS,
}


# What may differ between rows of one comparison: which prompts there are is told by their fingerprint.
FREE = ("task", "path", "split", "size", "pool", "methods", "against", "batch_size")
SECONDS = "seconds"


@dataclass(frozen=True)
class MethodComparison:
    """A comparison of methods on one task.

    Args:
        components: what is scored: tokens, heads, neurons or mlps.
        task: the task's name.
        path: its file; None for the bundled model.
        split: compare on `development`, `held_out` or `fresh` prompts (`prompt_splits.py`), drawn by the seed
            and a hash of their text; None takes all prompts in the task's order.
        size: how many prompts at most, the first that the model answers right.
        pool: how many prompts of the split are asked to find them; None asks all.
        methods: the methods; None for those of `LISTED`.
        options: further options of some methods, by name: `{"integrated_gradients": {"steps": 64}}`.
        target: what is explained of the answer: `contrast`, its logit less the foil's if there is one;
            `token`, its logit; `centred`, its logit less the mean logit; `log_odds`, its log-odds;
            `logprob`, its log-probability.
        percents: the percentages to measure at; None for 0 to 100 of tokens, 0 to 50 of heads and neurons.
        zeroed: of tokens, measure with embeddings set to zero too, which takes as many passes again.
        keep_last: of tokens, measure with the last token kept too, which takes as many passes again.
        ablations: measure the agreement with true ablation (`AblationAgreement`): any of `zero`, `mean` and
            `resample`, the latter two from the compared prompts themselves.
        extra: of tokens, further measures: `lds`, the linear datamodeling score, and `soft`, soft removal.
        circuits: of heads, neurons and mlps, measure CPR and CMD of circuits, all others at zero.
        against: the method that the others are held against.
        layer: of heads, neurons and mlps, the block; None for all blocks.
        top: of neurons, how many of a block are carried exactly by `depass`, which is many times faster over
            all blocks; None carries all.
        batch_size: how many prompts are scored at once.
        seed: of a task that is generated.

    Raises:
        DePassError: the components are something else, there is no prompt to take, or the percentages do not
            rise.
    """

    components: Components = "tokens"
    task: str = "ioi"
    path: str | None = None
    split: Split | None = None
    size: int = 100
    pool: int | None = None
    methods: Sequence[str] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    target: AnswerTarget = "contrast"
    percents: Sequence[float] | None = None
    zeroed: bool = True
    keep_last: bool = True
    ablations: Sequence[Replacement] = ()
    extra: Sequence[Extra] = ()
    circuits: bool = False
    against: str = AGAINST
    layer: int | None = None
    top: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.components not in LISTED:
            raise DePassError(f"components must be {', '.join(LISTED)}; got {self.components!r}")
        if self.target not in get_args(AnswerTarget):
            raise DePassError(f"target must be {', '.join(get_args(AnswerTarget))}; got {self.target!r}")
        if self.size < 1:
            raise DePassError(f"size is {self.size}; compare on one prompt at least")
        if self.percents is not None:
            check_percents(self.percents)
        if unknown := set(self.extra) - set(get_args(Extra)):
            raise DePassError(f"extra measures are {', '.join(get_args(Extra))}; got {', '.join(unknown)}")
        if self.circuits and self.components == "tokens":
            raise DePassError("circuits are of heads, neurons or mlps, not of tokens")

    def run(self, depass: DePass, folder: str | os.PathLike[str], *, progress: bool = False) -> StudyResult:
        """Run the comparison and write it into a folder, with each prompt's numbers: `rows/<method>.parquet`.

        A method whose rows are there, of the same comparison, is not run again. Inside
        `utils.distributed.sharing` the processes share out the prompts, and the first one writes.

        Raises:
            DePassError: a setting or the file is wrong, the model answers no prompt right, or the folder
                holds rows of another comparison.
        """
        started = time.perf_counter()
        methods = self._methods(depass)
        # A split is drawn from the whole task; without one the first prompts of it are enough.
        size = self.pool if self.split is None else None
        task = tasks.load(self.task, size=size, seed=self.seed, path=self.path).formatted(depass.tokenizer)
        asked = sampled(list(task), self.split, self.seed)[: self.pool]
        examples, right = self._right(depass, asked, progress)
        measures = self._measures(examples, progress)
        runs: dict[str, MethodRun] = {}
        rows = Path(folder) / "rows"
        manifest = self._manifest(depass, examples)
        resumed = from_first(lambda: keep_manifest(manifest, rows))
        for name, method in methods.items():
            path = rows / f"{name}.parquet"
            if resumed and (kept := kept_rows(path, _kept)):
                runs[name] = kept
                continue
            runs[name] = run_method(
                method,
                examples,
                target=self.target,
                measures=measures,
                circuits=self.circuits,
                batch_size=self.batch_size,
                progress=progress,
            )
            _keep(path, runs[name])
        panels, table = compare_rows(runs, against=self.against)
        experiment = StudyResult(
            name=f"paper_{self.components}",
            title=f"Which {self.components} does the answer rely on?",
            model=depass.decoder.name,
            data=f"{task.name}, {data_name(self.path) or 'the bundled model’s own'}",
            prompts=len(examples),
            seconds=time.perf_counter() - started,
            settings=asdict(self) | {"methods": list(methods), "asked": len(asked), "answered_right": right},
            panels=panels,
            table=table,
            notes=[*self._notes(len(asked), right, len(examples)), *notes_on(table, self.against)],
        )
        from_first(lambda: write_experiment(experiment, folder))
        return experiment

    def _right(self, depass: DePass, examples: list[Example], progress: bool) -> tuple[list[Example], int]:
        """Return the prompts that are compared on, and how many more are answered right."""
        # What is masked is judged by all tokens of the answer, what is removed by the first.
        exact = self.components != "tokens"
        right = answered_right(depass, examples, self.batch_size, exact=exact, progress=progress)
        right = [i for i in right if _can_be_explained(depass, examples[i])]
        if not right:
            raise DePassError(f"the model answers none of {len(examples)} prompts of {self.task} right")
        return [examples[i] for i in right[: self.size]], len(right)

    def _methods(self, depass: DePass) -> dict[str, Method]:
        """Make the methods, so that a wrong one is told before any of them is run."""
        names = list(LISTED[self.components] if self.methods is None else self.methods)
        if self.against not in names:
            raise DePassError(
                f"the methods are held against {self.against}; name it among {', '.join(names)}"
            )
        made = {
            name: make_method(name, depass, self._source(name), **self.options.get(name, {}))
            for name in (*names, *self.options)  # the options of a misspelt name would be ignored silently
        }
        return {name: made[name] for name in names}

    def _measures(self, examples: Sequence[Example], progress: bool) -> list[Measure]:
        """Return what is measured next to the scores."""
        references = [example.prompt for example in examples]
        # Plain passes need less memory than scores.
        options: dict[str, Any] = {"batch_size": 4 * self.batch_size, "progress": progress}
        measures = removal_measures(self.percents, zeroed=self.zeroed, keep_last=self.keep_last, **options)
        if "lds" in self.extra:
            measures.append(LinearDatamodeling(seed=self.seed, **options))
        if "soft" in self.extra:
            measures.append(SoftRemoval(seed=self.seed))
        for replacement in self.ablations:
            shared = {"references": references, "seed": self.seed, **options}
            measures.append(AblationAgreement(replacement, **shared))
        return measures

    def _source(self, name: str) -> Source:
        if self.components == "tokens":
            return Tokens()
        if self.components == "heads":
            return Heads(self.layer)
        if self.components == "mlps":
            return Module("mlp", self.layer)
        return Neurons(self.layer, top=self.top if name == AGAINST else None)

    def _manifest(self, depass: DePass, examples: list[Example]) -> Manifest:
        """Return what every method's rows depend on."""
        settings = {key: value for key, value in asdict(self).items() if key not in FREE}
        weights, prompts = weights_fingerprint(depass.model), task_fingerprint(examples)
        return Manifest(settings, weights, prompts, len(examples))

    def _notes(self, asked: int, right: int, taken: int) -> list[str]:
        judged = "its first token" if self.components == "tokens" else "all tokens of the answer"
        masked = f"Masked {self.components} are zero at every position, by hooks; those of all layers are "
        removed = {
            "tokens": "Removed tokens are taken out of the prompt, which is encoded again.",
            "mlps": "What an MLP adds to the residual stream is ablated, biases included.",
        }.get(self.components, masked + "ranked together.")
        return [
            f"The model answers {right} of {asked} prompts right, judged by {judged} (not counted: prompts "
            "whose answer and foil begin with the same token); compared on the first "
            f"{taken} of these{_drawn(self.split, self.seed)}. What is explained is the answer against the "
            "task's foil, where it has one.",
            removed,
        ]


def _drawn(split: Split | None, seed: int) -> str:
    """Describe how the prompts were chosen."""
    if split is None:
        return ", in the task's order"
    return f", all of the split {split}, in an order drawn by seed {seed} and their text"


def _keep(path: Path, run: MethodRun) -> None:
    """Write a method's rows and the time that its scores took."""
    columns = {"index"}.union(*run.rows)
    known = [column for column in ATTRIBUTION_SCHEMA if column.name in columns]
    others = sorted(columns - set(ATTRIBUTION_SCHEMA.names))  # numbers of measures that only a comparison has
    types = {name: pa.list_(pa.float64()) if name == "circuit_values" else pa.float64() for name in others}
    schema = pa.schema([*known, *(pa.field(name, kind) for name, kind in types.items())])
    rows = [{"index": i, **row} for i, row in enumerate(run.rows)]
    keep_rows(path, rows, schema.with_metadata({SECONDS: str(run.seconds)}))


def _kept(path: Path) -> MethodRun:
    """Read what `_keep` wrote."""
    metadata = pq.read_schema(path).metadata
    return MethodRun(read_rows(path), float(metadata[SECONDS.encode()]))


def _can_be_explained(depass: DePass, example: Example) -> bool:
    """Whether answer and foil begin with two tokens to this model, not with the same part of two names."""
    (prompt,) = prompts_of(depass.decoder, depass.tokenizer, example.prompt, None, None)
    try:
        Question.of(depass.decoder, depass.tokenizer, prompt, example.target())
    except DePassError:
        return False
    return True
