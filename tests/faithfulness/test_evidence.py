"""The bundled model's evidence is known, so attributions can be checked against it."""

from __future__ import annotations

import pytest

from depass_lightning import DePass, tasks


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


def test_the_indirect_object_is_the_top_token_of_the_contrast(depass: DePass) -> None:
    examples = list(tasks.load("ioi", size=300, seed=21))
    found = depass.attribute([e.prompt for e in examples], [e.target() for e in examples], batch_size=64)
    assert max(entry.completeness for entry in found) < 1e-5
    first = [
        entry.overlapping(example.evidence_ranges()) == [int(entry.scores.argmax())]
        for example, entry in zip(examples, found, strict=True)
    ]
    assert sum(first) / len(first) >= 0.95
