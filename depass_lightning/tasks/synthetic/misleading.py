"""Prompts behind misleading information: a false statement stands before the question."""

import random
from collections import defaultdict
from collections.abc import Iterable

from depass_lightning.tasks.example import Example


def misled(example: Example, statement: str, foil: str) -> Example:
    """Put a false statement before a prompt.

    Args:
        example: the prompt and its right answer.
        statement: the beginning of the statement, which the answers complete: `"The capital of France is"`.
        foil: the false answer, with its leading space.

    Returns:
        The example with the roles `misleading` (the whole statement) and `false_answer` (its end), the false
        answer as its foil, and two variants: `plain`, the prompt by itself, and `correct`, behind the
        statement with the right answer.
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


def false_answers(examples: Iterable[Example], seed: int) -> dict[str, str]:
    """Draw a false answer for each example, by its id, from the right answers to the others of its relation.

    An example whose relation has no other answer gets none.

    Args:
        examples: with the label `relation`; one that has a foil keeps it.
        seed: of the draw, which depends on the answers of the relation and on the example, not on its place.
    """
    examples = list(examples)
    answers: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        answers[example.labels["relation"]].add(example.answer)
    found = {}
    for example in examples:
        others = sorted(answers[example.labels["relation"]] - {example.answer})
        if example.foil is not None:
            found[example.id] = example.foil
        elif others:
            found[example.id] = random.Random(f"false {seed} {example.id}").choice(others)
    return found
