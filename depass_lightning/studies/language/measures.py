"""How much of the language, of the meaning and of the answer there is in states."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import silhouette_samples
from torch import Tensor

from depass_lightning.depass import DePass
from depass_lightning.linear_probes import train_probe
from depass_lightning.tasks import Task, Texts

Words = Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class Measures:
    """What was measured on one part of the states.

    Attributes:
        values: by measure, one value a prompt; `language_probe` has those of the prompts that judge it.
        ranks: the rank that the part gives to each prompt's answer, from 1 for the first.
        chance: how often a random prompt in another language means the same.
    """

    values: dict[str, list[float]]
    ranks: list[int]
    chance: float

    def mean(self, name: str) -> float:
        """Return a measure's mean over prompts."""
        return fmean(self.values[name])

    @property
    def median_rank(self) -> float:
        """The median rank of the answer, from 1."""
        return float(median(self.ranks))


def measure(
    states: Float[Tensor, "prompt hidden"],
    task: Task,
    top: Int[Tensor, "prompt top"],
    ranks: Sequence[int],
    answers: Sequence[int],
    words: Words,
    *,
    layer: int,
    seed: int = 0,
) -> Measures:
    """Measure one part's states: `top` are the tokens that they decode to, `ranks` those of the answers."""
    languages, cases = ([example.labels[name] for example in task] for name in ("language", "case"))
    centred = (states - states.mean(0)).double()
    hits, chance = nearest_means_the_same(centred, languages, cases)
    matching, others = [], []
    for tokens, language, answer in zip(top.tolist(), languages, answers, strict=True):
        shares = {
            name: sum(token in known and token != answer for token in tokens) / len(tokens)
            for name, known in words.items()
        }
        matching.append(shares.pop(language))
        others.append(sum(shares.values()))
    values = {
        "language_probe": language_told(states, languages, cases, layer, seed),
        "same_meaning": hits,
        "own_words": matching,
        "other_words": others,
        "answer_in_top": [float(rank <= top.shape[1]) for rank in ranks],
        "answer_first": [float(rank == 1) for rank in ranks],
        "silhouette_language": _silhouettes(centred, languages),
        "silhouette_meaning": _silhouettes(centred, cases),
    }
    return Measures(values, list(ranks), chance)


def words_of(depass: DePass, texts: Texts, task: Task, answers: Sequence[int]) -> dict[str, frozenset[int]]:
    """Return each language's words: tokens of its texts and answers that no other language's hold."""
    tokenizer = depass.tokenizer
    assert tokenizer is not None
    held: dict[str, set[int]] = {}
    for text, label in zip(texts.texts, texts.labels, strict=True):
        held.setdefault(label, set()).update(tokenizer.encode(text, add_special_tokens=False))
    for example, answer in zip(task, answers, strict=True):
        held[example.labels["language"]].add(answer)
    return {
        name: frozenset(words.difference(*(other for key, other in held.items() if key != name)))
        for name, words in held.items()
    }


def nearest_means_the_same(
    states: Float[Tensor, "prompt hidden"], languages: Sequence[str], cases: Sequence[str]
) -> tuple[list[float], float]:
    """Return for each prompt whether the nearest one in another language, by cosine, is of the same case.

    The states are without their mean. Prompts whose case is in no other language are left out.

    Returns:
        One or zero a prompt, and how often a random prompt in another language would do.
    """
    unit = torch.nn.functional.normalize(states, dim=1)
    other = ~_same(languages)
    same = _same(cases) & other
    nearest = (unit @ unit.T).masked_fill(~other, -2.0).argmax(1)
    kept = same.any(1)
    hits = same[torch.arange(len(states)), nearest][kept]
    chance = (same.sum(1) / other.sum(1))[kept]
    return hits.double().tolist(), float(chance.mean())


def language_told(
    states: Float[Tensor, "prompt hidden"],
    languages: Sequence[str],
    cases: Sequence[str],
    layer: int,
    seed: int,
) -> list[float]:
    """Fit a language probe on the states of half of the cases, and return where it is right on the others."""
    known = sorted(set(cases))
    fitted = set(random.Random(f"halves {seed}").sample(known, (len(known) + 1) // 2))
    rows = [i for i, case in enumerate(cases) if case in fitted]
    seen = {languages[i] for i in rows}
    judged = [i for i, case in enumerate(cases) if case not in fitted and languages[i] in seen]
    labels, expected = ([languages[i] for i in indices] for indices in (rows, judged))
    probe = train_probe(states[rows], labels, states[judged], expected, layer=layer, seed=seed)
    predictions = probe.predict(states[judged])
    return [float(predicted == right) for predicted, right in zip(predictions, expected, strict=True)]


def _same(names: Sequence[str]) -> Bool[Tensor, "prompt prompt"]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([numbers[name] for name in names])
    return groups[:, None] == groups


def _silhouettes(states: Float[Tensor, "prompt hidden"], groups: Sequence[str]) -> list[float]:
    return silhouette_samples(states.numpy(), list(groups), metric="cosine").tolist()
