"""Prompts with misleading information: a false statement before the question."""

import random
from collections import defaultdict
from collections.abc import Iterable

from depass_lightning.tasks.example import Example


def misled(example: Example, statement: str, foil: str) -> Example:
    """Put a false statement before a prompt.

    Args:
        example: the prompt and its correct answer.
        statement: the statement without the answer: `"The capital of France is"`.
        foil: the false answer, with its leading space.

    Returns:
        The example with the roles `misleading` (the whole statement) and `false_answer` (its end), the false
        answer as its foil, and two variants: `plain`, the prompt alone, and `correct`, the prompt after the
        statement with the correct answer.
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
    """Draw a false answer for each example from the correct answers to other examples of its relation.

    Args:
        examples: examples with the label `relation`; an existing foil is used unchanged.
        seed: the seed of the draw, which depends on the relation's answers and the example's id, not on
            order.

    Returns:
        The false answers by the examples' ids, without examples whose relation has no other answer.
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
