"""The same question in several languages: "La langue maternelle de Danielle Darrieux est le" → " français".

With a file, the rows are CounterFact in several languages, in the layout of DePass' own release. The
embedded model reads English alone. Its own prompts let *relations* play the part of languages, and subjects
that of meanings: "The capital of France is" and "The people of France speak" ask different things of one
subject. They are no languages, and nothing that is found on them is a finding about languages.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depass_lightning.errors import DePassError, reason_of
from depass_lightning.tasks.example import Example, Task
from depass_lightning.tasks.loading.rows import check_text, name_field, read_rows, text_field
from depass_lightning.tasks.synthetic.facts import FACTS

ENGLISH = "original"  # what the release calls it


def load(
    size: int | None, seed: int, split: str, path: str | Path | None, language: str | None = None
) -> Task:
    """Read a file in several languages, or ask several things of the embedded model's subjects.

    Args:
        size: how many cases at most, each of them in every language; None means all.
        seed: without meaning here.
        split: "test" asks the embedded model's facts in the wording that it has not read, "train" in one that
            it has; of a file without meaning.
        path: as for `tasks.load`, with rows of a `case_id` and, for each language, `{prompt, answer}`.
        language: the one that is wanted; None means all.

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
    examples = [own for case in cases for name, own in case.items() if language in (None, name)]
    if not examples:
        first = f"; row {skipped[0]['row']}: {skipped[0]['reason']}" if skipped else ""
        raise DePassError(f"{path} has no row that the task 'multilingual' can use{first}")
    return Task("multilingual", examples, skipped)


def _of_facts(split: str) -> list[dict[str, Example]]:
    """Return each subject's prompts by relation; subjects with one relation alone are left out."""
    cases: dict[str, dict[str, Example]] = {}
    for fact in FACTS:
        prompt, span = fact.prompts(split)[0]
        name, labels = f"{fact.subject} {fact.relation}", {"language": fact.relation, "case": fact.subject}
        roles = {"subject": (span,)}
        example = Example(name, prompt, f" {fact.answer}", None, roles, ("subject",), labels=labels)
        cases.setdefault(fact.subject, {})[fact.relation] = example
    return [case for case in cases.values() if len(case) > 1]


def _of_file(path: str | Path, skipped: list[dict[str, Any]]) -> list[dict[str, Example]]:
    """Return each row's prompts by language, and note in `skipped` what cannot be used."""
    cases: list[dict[str, Example]] = []
    taken = set()
    for number, row, fault in read_rows(path):
        if fault or not isinstance(row, dict):
            reason = fault or f"not an object with named fields: {row!r}"
            skipped.append({"row": number, "reason": reason, "path": str(path)})
            continue
        case = name_field(row, "case_id", number)
        found: dict[str, Example] = {}
        for key, entry in row.items():
            if not isinstance(entry, Mapping):
                continue
            try:
                if case in taken:
                    raise DePassError(f"the case_id {case!r} is taken by an earlier row")
                own = _example(case, "English" if key == ENGLISH else key, dict(entry))
                found[own.labels["language"]] = own
            except Exception as error:  # whatever is wrong with a row costs that row
                skipped.append({"row": number, "reason": f"{key}: {reason_of(error)}", "path": str(path)})
        if not any(isinstance(entry, Mapping) for entry in row.values()):
            reason = f"no language with a prompt and an answer; the row has {', '.join(row) or 'no fields'}"
            skipped.append({"row": number, "reason": reason, "path": str(path)})
        if found:
            cases.append(found)
            taken.add(case)
    return cases


def _example(case: str, language: str, entry: dict[str, Any]) -> Example:
    prompt, answer = text_field(entry, "prompt").rstrip(), text_field(entry, "answer").strip()
    labels = {"language": language, "case": case}
    return Example(check_text("the name", f"{case} {language}"), prompt, f" {answer}", labels=labels)
