"""Can a state be split into the language of a prompt and what it means?

1. Train a language probe on texts in several languages, at a few layers.
2. At each, split the states of prompts, which ask the same in several languages, into the probe's subspace
   and the rest, and propagate both to the end.
3. Decode both through the unembedding: are the tokens with the highest logits words of the prompt's language,
   and is the answer among them?
4. Probe both for the language; look in both for the nearest prompt in another language: does it mean the
   same? And draw them by t-SNE, with silhouettes for languages and for meanings.

The control is the same with a probe that was trained on shuffled labels: a subspace of as many directions
that knows nothing about language.

Source: Hong et al., "DePass" (arXiv 2510.18462), the experiment on a language subspace; the control with
shuffled labels is ours.
"""

import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sklearn.manifold import TSNE
from torch import Tensor

from depass_lightning import tasks
from depass_lightning.depass import DePass
from depass_lightning.engine.rules import RuleName
from depass_lightning.errors import DePassError
from depass_lightning.linear_probes import LinearProbe, Probes, fit_probes, hidden_states, train_probe
from depass_lightning.prompts import Prompt, prompts_of
from depass_lightning.studies.language.measures import Measures, Words, measure, words_of
from depass_lightning.studies.language.parts import Carried, carry_parts, decode
from depass_lightning.studies.study_files import write_experiment
from depass_lightning.studies.study_result import Cell, Cloud, Curve, Panel, StudyResult, data_name
from depass_lightning.tasks import Task, Texts, load_texts
from depass_lightning.utils.bootstrap import bootstrap
from depass_lightning.utils.distributed import from_first
from depass_lightning.utils.tokenization import token_id, token_text

PARTS = ("language part", "rest", "random part", "random rest")
WHOLE = "whole state"
MEASURES = {
    "language_probe": ("the language, told by a probe", "accuracy"),
    "same_meaning": ("the nearest in another language means the same", "share of prompts"),
    "own_words": ("words of the prompt's language among the top tokens", "share of the top tokens"),
    "answer_in_top": ("the answer among the top tokens", "share of prompts"),
}


@dataclass(frozen=True)
class Language:
    """The language experiment.

    Args:
        path: the task `multilingual`'s file; None lets relations of the bundled model's facts stand in for
            languages.
        train_path: texts to train the language probe on, rows `{text, label}`; None as for `path`.
        test_path: texts to judge it on.
        size: how many cases at most, each in every language.
        layers: where states are split; None for four layers, evenly spread.
        top: how many tokens each part is decoded to.
        rule: how neurons are shared.
        batch_size: how many prompts go through the model at once.
        seed: of everything that is drawn.
    """

    path: str | None = None
    train_path: str | None = None
    test_path: str | None = None
    size: int | None = 40
    layers: Sequence[int] | None = None
    top: int = 10
    rule: RuleName = "softmax"
    batch_size: int = 16
    seed: int = 0

    def run(self, depass: DePass, folder: str | os.PathLike[str], *, progress: bool = False) -> StudyResult:
        """Run the experiment and write it into a folder, the best layer's probe included.

        Raises:
            DePassError: a setting or a file is wrong, or no prompt can be used.
        """
        started = time.perf_counter()
        task, train, test = self._data()
        layers = list(self.layers or split_layers(len(depass.decoder.blocks)))
        prompts, answers = self._read(depass, task)
        probes, shuffled = self._probes(depass, train, test, layers)
        from_first(lambda: probes.best.save(Path(folder) / "probe.safetensors"))
        sources = [probe.subspace() for pair in zip(probes.probes, shuffled, strict=True) for probe in pair]
        carried = carry_parts(
            depass, prompts, sources, rule=self.rule, batch_size=self.batch_size, progress=progress
        )
        words = words_of(depass, train, task, answers)
        measured, tops = self._measure(depass, task, carried, answers, words, layers)
        best = layers.index(probes.best.layer)
        experiment = StudyResult(
            name="paper_language",
            title="Can a state be split into language and meaning?",
            model=depass.decoder.name,
            data=f"multilingual, {data_name(self.path) or 'relations of the bundled model’s facts'}",
            prompts=len(task),
            seconds=time.perf_counter() - started,
            settings=asdict(self) | self._settings(probes, layers, words, carried),
            panels=_panels(measured, layers),
            table=_table(measured, layers),
            clouds=self._clouds(task, carried.states[2 * best], layers[best]),
            notes=[
                *self._notes(probes.best, measured, words),
                *_said(depass, task, tops, layers[best]),
            ],
        )
        from_first(lambda: write_experiment(experiment, folder))
        return experiment

    def _data(self) -> tuple[Task, Texts, Texts]:
        """Load everything, so that a wrong setting is told before anything expensive."""
        if self.top < 1:
            raise DePassError(f"top must be 1 or more, not {self.top}")
        task = tasks.load("multilingual", size=self.size, seed=self.seed, path=self.path)
        train, test = (
            load_texts("language", split=split, path=path, seed=self.seed)
            for split, path in (("train", self.train_path), ("test", self.test_path))
        )
        languages = {example.labels["language"] for example in task}
        if len(languages) < 2 or len({example.labels["case"] for example in task}) < 4:
            raise DePassError(
                "the experiment needs two languages and four cases at least; give a larger size"
            )
        if missing := sorted(languages - set(train.labels)):
            raise DePassError(
                f"there are prompts in {', '.join(missing)}, but no training texts; they are in "
                f"{', '.join(sorted(set(train.labels)))}"
            )
        return task, train, test

    def _read(self, depass: DePass, task: Task) -> tuple[list[Prompt], list[int]]:
        texts = [example.prompt for example in task]
        prompts = prompts_of(depass.decoder, depass.tokenizer, texts, None, None)
        size = depass.decoder.vocabulary_size
        answers = [
            token_id(example.known_answer, example.prompt, depass.tokenizer, size, first=True)
            for example in task
        ]
        return prompts, answers

    def _probes(
        self, depass: DePass, train: Texts, test: Texts, layers: list[int]
    ) -> tuple[Probes, list[LinearProbe]]:
        """Train the language probes, and one a layer on shuffled labels."""
        states, judged = (
            hidden_states(depass, examples.texts, layers=layers, batch_size=self.batch_size)
            for examples in (train, test)
        )
        probes = fit_probes(states, train.labels, judged, test.labels, layers=layers, seed=self.seed)
        mixed = random.Random(f"shuffled {self.seed}").sample(train.labels, len(train.labels))
        shuffled = [
            train_probe(states[index], mixed, judged[index], test.labels, layer=layer, seed=self.seed)
            for index, layer in enumerate(layers)
        ]
        return probes, shuffled

    def _measure(
        self,
        depass: DePass,
        task: Task,
        carried: Carried,
        answers: list[int],
        words: Words,
        layers: list[int],
    ) -> tuple[dict[tuple[int, str], Measures], dict[tuple[int, str], Tensor]]:
        """Measure every part at every layer, and the whole state; the tops are what each decodes to."""
        measured, tops = {}, {}
        states = {
            (layer, name): carried.states[2 * index + place // 2, place % 2]
            for index, layer in enumerate(layers)
            for place, name in enumerate(PARTS)
        }
        for key, part_states in [*states.items(), ((0, WHOLE), carried.whole)]:
            tops[key], ranks = decode(depass, part_states, answers, top=self.top)
            measured[key] = measure(
                part_states,
                task,
                tops[key],
                ranks,
                answers,
                words,
                layer=len(depass.decoder.blocks),
                seed=self.seed,
            )
        return measured, tops

    def _settings(
        self, probes: Probes, layers: list[int], words: Words, carried: Carried
    ) -> dict[str, object]:
        return {
            "layers": layers,
            "probe_held_out": {probe.layer: probe.fit.accuracy for probe in probes.probes},
            "probe_validation": dict(zip(layers, probes.validation, strict=True)),
            "probe": asdict(probes.best.fit),
            "directions": len(probes.best.basis),
            "words": {name: len(listed) for name, listed in words.items()},
            "completeness_error": carried.error,
        }

    def _clouds(self, task: Task, states: Tensor, layer: int) -> list[Cloud]:
        """Draw both parts of one layer's split by t-SNE."""
        languages = [example.labels["language"] for example in task]
        clouds = []
        for name, part_states in zip(PARTS, states, strict=False):
            tsne = TSNE(perplexity=min(30.0, (len(part_states) - 1) / 3), init="pca", random_state=self.seed)
            places = tsne.fit_transform(part_states.double().numpy())
            title = f"{name}, split at layer {layer} (t-SNE)"
            clouds.append(Cloud(title, places[:, 0].tolist(), places[:, 1].tolist(), languages))
        return clouds

    def _notes(
        self, probe: LinearProbe, measured: Mapping[tuple[int, str], Measures], words: Words
    ) -> list[str]:
        whole = measured[0, WHOLE]
        notes = []
        if self.path is None:
            notes.append(
                "The bundled model reads English alone: relations play the part of languages here, and "
                "subjects that of meanings. Nothing of this is a finding about languages."
            )
        notes += [
            f"The probe of layer {probe.layer}, the best on a fifth of the training texts, is right on "
            f"{probe.fit.accuracy:.1%} of {probe.fit.held_out} other texts (the most frequent language: "
            f"{probe.fit.majority:.1%}). Its subspace has {len(probe.basis)} directions.",
            "“Random” is the subspace of a probe that was trained on shuffled labels: as many directions, "
            "which know nothing about language.",
            "All parts are measured at the end, after the frozen final norm, at the prompt's last token. "
            "The probe of the language is fitted for each part, on half of the cases, and "
            "judged on the others. If it is still right on the rest, the split left part of the language "
            "there.",
            "The nearest prompt in another language: cosine, after subtracting the mean over all prompts. By "
            f"chance it means the same for {whole.chance:.1%}.",
            f"A language's words are the tokens that its training texts and answers hold and those of no "
            f"other language do ({min(map(len, words.values()))} to {max(map(len, words.values()))} tokens); "
            "the answer of the prompt itself is not counted. They are a small part of any language.",
            "Silhouettes: cosine, after subtracting the mean; 1 where groups lie apart, 0 where they "
            "overlap, less where they are mixed.",
            f"The whole model has the answer's first token first on {whole.mean('answer_first'):.1%} of the "
            "prompts. An answer of several tokens stands for its first.",
            "Intervals: 95%, by bootstrap over prompts.",
        ]
        return notes


def split_layers(count: int) -> list[int]:
    """Return four layers at which states are split by default, evenly spread inside the model."""
    return sorted({min(max(1, round(count * place / 5)), count - 1) for place in range(1, 5)})


def _panels(measured: Mapping[tuple[int, str], Measures], layers: list[int]) -> list[Panel]:
    """Return the curves over the layer of the split."""
    panels = []
    for key, (name, y_label) in MEASURES.items():
        curves = {
            part: Curve.of(layers, [bootstrap(measured[layer, part].values[key]) for layer in layers])
            for part in PARTS
        }
        whole = bootstrap(measured[0, WHOLE].values[key])
        curves[WHOLE] = Curve.of(layers, [whole for _ in layers])
        panels.append(Panel(name, "layer of the split", y_label, curves))
    return panels


def _table(measured: Mapping[tuple[int, str], Measures], layers: list[int]) -> list[dict[str, Cell]]:
    """Return one row for each part of each layer's split, and one for the whole state."""
    keys = [(0, WHOLE), *((layer, part) for layer in layers for part in PARTS)]
    return [
        {
            "split_at": "–" if part == WHOLE else str(layer),
            "part": part,
            **{name: bootstrap(values) for name, values in measured[layer, part].values.items()},
            "median_rank_of_answer": measured[layer, part].median_rank,
        }
        for layer, part in keys
    ]


def _said(depass: DePass, task: Task, tops: Mapping[tuple[int, str], Tensor], layer: int) -> list[str]:
    """Return the tokens that both parts of a layer's split promote, for each language's first prompt."""
    told: dict[str, str] = {}
    for number, example in enumerate(task):
        language = example.labels["language"]
        if language in told:
            continue
        parts = []
        for part in PARTS[:2]:
            tokens = [
                token_text(int(token), depass.tokenizer).strip() for token in tops[layer, part][number][:6]
            ]
            parts.append(f"{part}: {', '.join(map(repr, tokens))}")
        told[language] = f"“{example.prompt}” ({language}), split at layer {layer}: {'; '.join(parts)}."
    return list(told.values())
