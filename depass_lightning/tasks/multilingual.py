"""The same question in several languages: "La langue maternelle de Danielle Darrieux est le" → " français".

With a file, the rows are CounterFact in several languages, in the layout of the DePass release. The bundled
model reads only English. Without a file, *relations* take the place of languages, and subjects that of
meanings: "The capital of France is" and "The people of France speak" ask different questions about one
subject. Results on these prompts are not results about languages.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError, reason_of
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.loading.rows import check_text, first_reason, name_field, read_rows, text_field
from depass_lightning.tasks.synthetic.facts import FACTS

ENGLISH = "original"  # the name of English in the release


def load(
    size: int | None,
    seed: int,  # noqa: ARG001
    split: str,
    path: str | Path | None,
    language: str | None = None,
) -> Task:
    """Read a file in several languages, or ask several questions about the bundled model's subjects.

    Args:
        size: the maximum number of cases, each in every language; None means all.
        seed: ignored.
        split: "test" asks for the bundled model's facts in the wording held out from its training, "train" in
            another; ignored for a file.
        path: rows with a `case_id` and, for each language, `{prompt, answer}`, in a file, folder or data set
            of `tasks.load`.
        language: one language; None means all.

    Returns:
        Prompts with the labels `language` and `case`, case by case.
    """
    if path is None and split not in ("train", "test"):
        raise DePassError(f"the multilingual task has no split {split!r}; it has 'train' and 'test'")
    skipped: list[dict[str, Any]] = []
    cases = _of_facts(split) if path is None else _of_file(path, skipped)
    if path is None and size is not None and size > len(cases):
        raise DePassError(f"the multilingual task has {len(cases)} cases, not {size}")
    cases = cases[:size]
    known = sorted({name for case in cases for name in case})
    if language is not None and language not in known:
        raise DePassError(f"there is no language {language!r}; there are {', '.join(known)}")
    examples = [example for case in cases for name, example in case.items() if language in (None, name)]
    if not examples:
        reason = first_reason(skipped)
        raise DePassError(f"{path} has no row that the task 'multilingual' can use{reason}")
    return Task("multilingual", examples, skipped)


def _of_facts(split: str) -> list[dict[str, Example]]:
    """Return each subject's prompts by relation, for subjects with several relations."""
    cases: dict[str, dict[str, Example]] = {}
    for fact in FACTS:
        prompt, span = fact.prompts(split)[0]
        name, labels = f"{fact.subject} {fact.relation}", {"language": fact.relation, "case": fact.subject}
        roles = {"subject": (span,)}
        example = Example(name, prompt, f" {fact.answer}", None, roles, ("subject",), labels=labels)
        cases.setdefault(fact.subject, {})[fact.relation] = example
    return [case for case in cases.values() if len(case) > 1]


def _of_file(path: str | Path, skipped: list[dict[str, Any]]) -> list[dict[str, Example]]:
    """Return each row's prompts by language, and append unusable entries to `skipped`."""
    cases: list[dict[str, Example]] = []
    taken = set()
    for number, row, fault in read_rows(path):
        if fault or not isinstance(row, dict):
            reason = fault or f"not an object with named fields: {row!r}"
            skipped.append({"row": number, "reason": reason, "path": str(path)})
            continue
        case = name_field(row, "case_id", number)
        examples: dict[str, Example] = {}
        for key, entry in row.items():
            if not isinstance(entry, Mapping):
                continue
            try:
                if case in taken:
                    raise DePassError(f"the case_id {case!r} is taken by an earlier row")
                example = _example(case, "English" if key == ENGLISH else key, dict(entry))
                examples[example.labels["language"]] = example
            except Exception as error:  # any error skips only this row
                skipped.append({"row": number, "reason": f"{key}: {reason_of(error)}", "path": str(path)})
        if not any(isinstance(entry, Mapping) for entry in row.values()):
            reason = f"no language with a prompt and an answer; the row has {', '.join(row) or 'no fields'}"
            skipped.append({"row": number, "reason": reason, "path": str(path)})
        if examples:
            cases.append(examples)
            taken.add(case)
    return cases


def _example(case: str, language: str, entry: dict[str, Any]) -> Example:
    prompt, answer = text_field(entry, "prompt").rstrip(), text_field(entry, "answer").strip()
    labels = {"language": language, "case": case}
    return Example(check_text("the name", f"{case} {language}"), prompt, f" {answer}", labels=labels)
