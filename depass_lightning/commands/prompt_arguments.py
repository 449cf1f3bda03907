"""`prompt=`, `prompts=` and `messages=` on a command line, rewritten as settings of the task `jsonl`.

Their values are free text. Hydra would read their spaces, quotes, commas and equals signs as its grammar,
so they are quoted before it parses them.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from depass_lightning.errors import DePassError

KINDS = (
    "centred",
    "continuation",
    "contrast",
    "generation",
    "log_odds",
    "logprob",
    "own",
    "preference",
    "token",
)
"""The options of the group `target`; any other value of `target=` is the text of an answer."""
SOURCES = ("prompt", "prompts", "messages")
STDIN = "-"


def rewritten(arguments: Sequence[str]) -> list[str]:
    """Return a command line on which prompts are settings of the task `jsonl`, quoted for Hydra.

    `-` as the value of `prompt=` or `messages=` reads it from standard input, and `prompts=-` one prompt a
    line. A command line without these keys is returned unchanged.

    For a single prompt, `faithfulness=none` is added unless the command line has another value.

    Raises:
        DePassError: keys exclude each other, standard input is empty, or a value is not text.
    """
    typed: dict[str, str] = {}
    others = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        answer = key == "foil" or (key == "target" and value not in KINDS)
        if not equals or not (key in SOURCES or answer):
            others.append(argument)
        elif key in typed:
            raise DePassError(f"{key}= is given twice; give it once, or several prompts as prompts=FILE")
        else:
            typed[key] = value
    chosen = [key for key in SOURCES if key in typed]
    if not chosen:
        return list(arguments)
    if len(chosen) > 1:
        raise DePassError(f"{chosen[0]}= and {chosen[1]}= are two sets of prompts; give one")
    if any(argument.startswith("task=") for argument in others):
        raise DePassError(f"{chosen[0]}= and task= are two sets of prompts; give one")
    # Faithfulness measures are means over prompts, and take longer than the scores of one prompt.
    quick = chosen[0] != "prompts" and not any(argument.startswith("faithfulness=") for argument in others)
    return [*others, *["faithfulness=none"] * quick, "task=jsonl", _setting(chosen[0], typed)]


def _setting(key: str, typed: dict[str, str]) -> str:
    """Return the setting that holds the prompts."""
    answers = {name: value for name, value in typed.items() if name != key}
    value = typed[key]
    if key == "prompts" and answers:
        raise DePassError(
            f"{next(iter(answers))}= is for prompt=; a file has the answer in each row: "
            '{"prompt": "...", "target": "...", "foil": "..."}'
        )
    if key == "prompts" and value != STDIN:
        return f"task.path={quoted(value, key)}"
    if value == STDIN:
        value = sys.stdin.read().removesuffix("\n")
        if not value.strip():
            raise DePassError(f"{key}=-: there is nothing on standard input; pipe the text into the command")
    if key == "messages":
        value = _conversation(value)
    if key == "prompts":
        rows = [{"prompt": line} for line in value.splitlines() if line.strip()]
    else:
        rows = [{key: value, **answers}]
    texts = ({name: quoted(text, name) for name, text in row.items()} for row in rows)
    listed = ("{" + ",".join(f"{name}:{text}" for name, text in row.items()) + "}" for row in texts)
    return f"task.rows=[{','.join(listed)}]"


def _conversation(value: str) -> str:
    """Return the messages of a conversation as JSON, given as JSON or as the path of a file of it."""
    try:
        text = value if value.lstrip().startswith("[") else Path(value).expanduser().read_text("utf-8-sig")
        messages = json.loads(text)
    except (OSError, ValueError) as error:
        raise DePassError(
            f"messages={value!r:.60} cannot be read ({error}); give JSON, or a file of it: "
            '[{"role": "user", "content": "..."}]'
        ) from error
    if not isinstance(messages, list):
        raise DePassError(f'messages= is {value!r:.60}; give a list: [{{"role": "user", "content": "..."}}]')
    return json.dumps(messages, ensure_ascii=False)


def quoted(text: str, key: str) -> str:
    """Return a text as a quoted string of Hydra's grammar, without interpolation.

    Raises:
        DePassError: the text is empty, is `???`, which marks missing values, or is not Unicode.
    """
    if not text.strip():
        raise DePassError(f"{key}= is empty; give a text, in quotes: '{key}=The capital of France is'")
    if text == "???":
        raise DePassError(f"{key}=???: three question marks mark a missing value; give a file (prompts=FILE)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DePassError(f"{key}= is not UTF-8; encode it as UTF-8, or give a file (prompts=FILE)") from None
    # Backslashes are doubled only before what they could escape: an interpolation, a quote, the end.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text)
    return f'"{text}"'
