"""Questions with two options after misleading information: "Information: ... Options: A: ... B: ..." → " A".

With a file, the rows are those of TruthfulQA (Lin et al. 2022, arXiv:2109.07958) in the layout of the
DePass release, or in that of the configuration `generation` of `truthfulqa/truthful_qa` on the hub. Without
one, they ask for the bundled model's facts after a false statement about the subject: that model cannot
choose options, so the answer is the word itself, and the prompts are the split "misleading" of `counterfact`.
"""

import re
import zlib
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError
from depass_lightning.tasks import counterfact
from depass_lightning.tasks.example import Example, Span, Task
from depass_lightning.tasks.loading.rows import load_rows, name_field, text_field

ASK = (
    "According to the given information and your knowledge, "
    "choose the best choice from the following options.\n"
)


def load(size: int | None, seed: int, split: str, path: str | Path | None) -> Task:  # noqa: ARG001
    """Read questions with misleading information, or generate them about the bundled model's facts.

    Args:
        size: the maximum number of prompts; None means all.
        seed: the seed of the order and of the false answers.
        split: ignored.
        path: rows `{question, wrong_info, options, correct_option, prompt_init,
            prompt_correct, prompt_wrong}`, or `{question, best_answer, incorrect_answers}`, in a file, folder
            or data set of `tasks.load`.

    Returns:
        Prompts with the roles `misleading`, `right_option` and `wrong_option`, and with the variants `plain`
        (without the information) and `correct` (with correct information instead).
    """
    if path is not None:
        return load_rows("truthfulqa", path, _from_public, size)
    task = counterfact.load(size, seed, "misleading", None)
    return Task("truthfulqa", list(task))


def _from_public(row: dict[str, Any], number: int) -> Example:
    if "best_answer" in row and "prompt_wrong" not in row:
        row = _built(row)
    prompt, wrong = text_field(row, "prompt_wrong").rstrip(), text_field(row, "wrong_info").strip()
    options, answer = _options(text_field(row, "options")), text_field(row, "correct_option").strip()
    if answer not in options or len(options) != 2:
        raise DePassError(f"the options {row['options']!r} must be two, one of them {answer!r}")
    (foil,) = (letter for letter in options if letter != answer)
    before = prompt.find(f"Information: {wrong}")
    if before < 0:
        raise DePassError(f"the prompt has no information {wrong!r}")
    begin = before + len("Information: ")
    asked = prompt.find("Options: ", begin + len(wrong))
    roles = {
        "misleading": ((begin, begin + len(wrong)),),
        "right_option": (_place(prompt, options[answer], asked),),
        "wrong_option": (_place(prompt, options[foil], asked),),
    }
    variants = {
        "plain": text_field(row, "prompt_init").rstrip(),
        "correct": text_field(row, "prompt_correct").rstrip(),
    }
    return Example(
        name_field(row, "case_id", number), prompt, f" {answer}", f" {foil}", roles, variants=variants
    )


def _options(text: str) -> dict[str, str]:
    """Parse "A: this. B: that." into a mapping from letter to text; the last " B: " separates them."""
    parts = re.fullmatch(r"A: (.*) B: (.*)", text.strip(), flags=re.DOTALL)
    if parts is None:
        raise DePassError(f"the options {text!r} must be written 'A: ... B: ...'")
    return {"A": parts[1].strip(), "B": parts[2].strip()}


def _place(prompt: str, text: str, start: int) -> Span:
    place = prompt.find(text, max(start, 0))
    if place < 0:
        raise DePassError(f"the option {text!r} does not occur in the prompt")
    return place, place + len(text)


def _built(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of the public data set to the release's layout; its hash decides the option order."""
    question, right = text_field(row, "question").strip(), text_field(row, "best_answer").strip()
    others = row.get("incorrect_answers")
    wrong = next((str(text).strip() for text in others or () if str(text).strip() != right), "")
    if not wrong:
        raise DePassError(f"the question {question!r} has no incorrect answer")
    right, wrong = (text if text.endswith((".", "!", "?")) else f"{text}." for text in (right, wrong))
    first = zlib.crc32(question.encode()) % 2 == 0
    options = f"A: {right} B: {wrong}" if first else f"A: {wrong} B: {right}"
    asked = f"Question: {question}\nOptions: {options}\nThe answer is"
    return {
        **row,
        "wrong_info": wrong,
        "options": options,
        "correct_option": "A" if first else "B",
        "prompt_init": f"{ASK}{asked}",
        "prompt_correct": f"{ASK}Information: {right}\n{asked}",
        "prompt_wrong": f"{ASK}Information: {wrong}\n{asked}",
    }
