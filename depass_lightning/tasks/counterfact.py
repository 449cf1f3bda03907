"""Facts with a false alternative: "The mother tongue of Danielle Darrieux is" → " French".

Without a file, the prompts ask for facts that the bundled model knows; the foil is the answer to another fact
of the same relation. With a file, they are those of CounterFact (Meng et al. 2022, "Locating and Editing
Factual Associations in GPT", arXiv:2202.05262) in the layout of the DePass release, in that of the original
(`requested_rewrite`), or in that of `NeelNanda/counterfact-tracing` on the hub (`target_true`).

The split "misleading" puts a false statement before each prompt.
"""

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks.example import Example, Span, Task
from depass_lightning.tasks.loading.rows import load_rows, name_field, text_field
from depass_lightning.tasks.synthetic.facts import FACTS

SPLITS = ("train", "test", "misleading")


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:
    """Ask for the bundled model's facts, or read rows in a layout of CounterFact.

    Args:
        size: the maximum number of prompts; None means all.
        seed: the seed of the order of generated prompts, and of false answers that the rows lack.
        split: "test" asks for each of the bundled model's facts in the wording held out from its training,
            "train" in the others; "misleading" puts a false statement before the prompts. A file has only
            "test" and "misleading".
        path: rows `{prompt, subject, answer}` in a file, folder or data set of `tasks.load`.
    """
    if split not in SPLITS:
        raise DePassError(f"the counterfact task has no split {split!r}; it has {', '.join(SPLITS)}")
    if path is None:
        task = Task("counterfact", _of_facts(seed, split))
    elif split == "misleading":
        task = _misleading(load_rows("counterfact", path, _from_public), seed)
    else:
        return load_rows("counterfact", path, _from_public, size)
    if size is None or size == len(task):
        return task
    if size > len(task) and path is None:
        raise DePassError(f"the split {split!r} of the counterfact task has {len(task)} prompts, not {size}")
    return Task("counterfact", [task[index] for index in range(min(size, len(task)))], task.skipped)


def _of_facts(seed: int, split: str) -> list[Example]:
    """Return all prompts about the bundled model's facts in a split, shuffled by the seed."""
    generator = random.Random(f"counterfact {split} {seed}")
    part = "train" if split == "train" else "test"
    examples, statements = [], {}
    for number, fact in enumerate(FACTS):
        for wording, (prompt, span) in enumerate(fact.prompts(part)):
            name = f"counterfact-{split}-{fact.relation}-{number}-{wording}"
            examples.append(_example(name, prompt, fact.answer, span, fact.relation))
            statements[name] = generator.choice(fact.prompts("train"))[0]
    false = _false_answers(examples, seed)
    if split == "misleading":
        examples = [_misled(example, statements[example.id], false[example.id]) for example in examples]
    else:
        examples = [replace(example, foil=false[example.id]) for example in examples]
    generator.shuffle(examples)
    return examples


def _misleading(task: Task, seed: int) -> Task:
    """Put a false statement in the prompt's wording before each prompt; prompts without one are skipped."""
    examples = list(task)
    false = _false_answers(examples, seed)
    examples_with_foil = [
        _misled(example, example.prompt, false[example.id]) for example in examples if example.id in false
    ]
    skipped = [
        {"row": index + 1, "reason": f"no other row has the relation {example.labels['relation']!r}"}
        for index, example in enumerate(examples)
        if example.id not in false
    ]
    if not examples_with_foil:
        raise DePassError(
            "no row has a false answer: give rows with target_false, or several rows of one relation"
        )
    return Task("counterfact", examples_with_foil, [*task.skipped, *skipped])


def _example(
    name: str, prompt: str, answer: str, span: Span, relation: str, foil: str | None = None
) -> Example:
    return Example(
        name,
        prompt,
        f" {answer}",
        None if foil is None else f" {foil}",
        {"subject": (span,)},
        ("subject",),
        labels={"relation": relation},
    )


def _from_public(row: dict[str, Any], number: int) -> Example:
    rewrite = row.get("requested_rewrite")
    if isinstance(rewrite, dict):
        row = {
            **row,
            **rewrite,
            "prompt": str(rewrite.get("prompt")).replace("{}", str(rewrite.get("subject"))),
        }
        row |= {
            key: row[key]["str"] for key in ("target_true", "target_new") if isinstance(row.get(key), dict)
        }
    prompt, subject = text_field(row, "prompt").rstrip(), text_field(row, "subject").strip()
    answer = text_field(row, "answer" if "answer" in row else "target_true").strip()
    foil = row.get("target_false", row.get("target_new"))
    start = prompt.find(subject)
    if start < 0:
        raise DePassError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    if isinstance(foil, str) and foil.strip() == answer:
        raise DePassError(f"the false answer is the same as the correct one: {answer!r}")
    name, relation = name_field(row, "case_id", number), str(row.get("relation_id", "unknown"))
    span = (start, start + len(subject))
    return _example(name, prompt, answer, span, relation, foil.strip() if isinstance(foil, str) else None)


def _misled(example: Example, statement: str, foil: str) -> Example:
    """Put a false statement before a prompt: `"The capital of France is"` and the foil, its false answer.

    The roles are `misleading` (the whole statement) and `false_answer` (its end), the variants `plain`, the
    prompt alone, and `correct`, the prompt after the statement with the correct answer.
    """
    false = f"{statement}{foil}."
    shift = len(false) + 1
    roles = {
        name: tuple((start + shift, end + shift) for start, end in spans)
        for name, spans in example.roles.items()
    }
    return Example(
        example.id,
        f"{false} {example.prompt}",
        example.answer,
        foil,
        {
            "misleading": ((0, len(false)),),
            "false_answer": ((len(false) - len(foil), len(false) - 1),),
            **roles,
        },
        (),
        {"plain": example.prompt, "correct": f"{statement}{example.answer}. {example.prompt}"},
        example.labels,
    )


def _false_answers(examples: Iterable[Example], seed: int) -> dict[str, str]:
    """Return a false answer by each example's id: its foil, or the answer to another example of its relation.

    Draws do not depend on the order. Examples whose relation has no other answer have none.
    """
    examples = list(examples)
    answers: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        answers[example.labels["relation"]].add(example.known_answer)
    false = {}
    for example in examples:
        others = sorted(answers[example.labels["relation"]] - {example.answer})
        if example.foil is not None:
            false[example.id] = example.foil
        elif others:
            false[example.id] = random.Random(f"false {seed} {example.id}").choice(others)
    return false
