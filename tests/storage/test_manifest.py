"""What identifies a run: settings, weights and prompts are compared by value, and named where they differ."""

import re

from depass_lightning.storage.manifest import Manifest, fingerprint, task_fingerprint
from depass_lightning.tasks.example import Example

FIRST, SECOND = Example("1", "Où est", " Paris"), Example("2", "The sky is", " blue")


def manifest(weights: str, task: str) -> Manifest:
    return Manifest({"rule": "half"}, "".join(weights), "".join(task), 2)


def test_equal_values_are_the_same_run() -> None:
    one, two = manifest("w" * 3, "t" * 3), manifest("".join(["w"] * 3), "".join(["t"] * 3))
    assert one.differences(two) == two.differences(one) == []


def test_other_weights_and_prompts_are_named_whichever_comes_first() -> None:
    one, two = manifest("a", "a"), manifest("b", "b")
    for then, now in ((one, two), (two, one)):
        weights, prompts = then.differences(now)
        assert weights == f"the model's weights differ ({then.weights} then, {now.weights} now)"
        assert prompts == "the prompts differ (2 then, 2 now)"


def test_a_fingerprint_is_of_every_prompt_and_their_order() -> None:
    whole = task_fingerprint([FIRST, SECOND])
    others = [[FIRST], [SECOND], [SECOND, FIRST], [FIRST, Example("2", "The sky is", " grey")], []]
    assert len({whole, *map(task_fingerprint, others)}) == 6
    assert re.fullmatch(r"[0-9a-f]{16}", whole)


def test_a_settings_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    assert re.fullmatch(r"[0-9a-f]{16}", fingerprint({}))
