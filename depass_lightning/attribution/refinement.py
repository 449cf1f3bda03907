"""Propagate the tokens that matter one by one, and the others in spans, within a budget of components.

1. Score every token under the linear rule `half`, by one backward pass.
2. Keep those with the largest scores as separate components, and join the tokens between them to spans.
3. Propagate these components under the rule that was asked for.

The result is one propagation, so its scores sum to the value. Under a competing rule a span's score is not
the sum of its tokens' scores, and a token's score depends on which others are joined. `benchmarks/refine.py`
measures the agreement with a run over all tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise

from depass_lightning.attribution.readout import Readout
from depass_lightning.attribution.scoring import score
from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.record import Recording
from depass_lightning.engine.rules import rule_named
from depass_lightning.prompts import Prompt
from depass_lightning.sources.tokens import Partition, Tokens

RANKING = "half"  # complete on every family, and the closest to the competing rules

Range = tuple[int, int]


def refine(recording: Recording, prompts: Sequence[Prompt], readout: Readout, settings: Settings) -> Settings:
    """Replace every `Tokens(refine=)` with a partition of each prompt's tokens.

    Args:
        recording: the recorded pass.
        prompts: the prompts, in the recording's order.
        readout: how the targets are read; a token's importance is its largest score for any of them.
        settings: how the pass is made.

    Returns:
        The settings; unchanged if nothing is to be refined.
    """
    longest = int(recording.lengths.max())
    sources = tuple(
        _refined(recording, prompts, readout, settings, source)
        if isinstance(source, Tokens) and source.refine and source.refine < longest and not settings.adjoint
        else source
        for source in settings.sources
    )
    return replace(settings, sources=sources)


def _refined(
    recording: Recording, prompts: Sequence[Prompt], readout: Readout, settings: Settings, source: Tokens
) -> Partition:
    """Return the partition that a source leads to."""
    assert source.refine is not None
    linear = replace(
        settings,
        sources=(Tokens(source.layer),),
        rule=rule_named(RANKING),
        rule_name=RANKING,
        adjoint=True,
        rounding=False,
        parallel=None,
    )
    (scores,) = score(recording, prompts, readout, linear)
    strengths = scores.values[:, :, 0].abs().amax(1).tolist()  # [batch, token and bias]
    ranges = {}
    for prompt, of_tokens, length in zip(prompts, strengths, recording.lengths.tolist(), strict=True):
        end = len(prompt.ids)
        if length <= source.refine:
            ranges[id(prompt)] = [(place, place + 1) for place in range(end)]
        else:
            # No range crosses the end of the first token, the beginning of an answer, or the last target.
            edges = {0, 1, min(prompt.answer_start or 1, length), length, end}
            ranges[id(prompt)] = partitioned(of_tokens[:length], edges, source.refine)
    return Partition(source.layer, source.exclude_first, ranges=ranges, refine=source.refine)


def partitioned(strengths: Sequence[float], edges: Collection[int], budget: int) -> list[Range]:
    """Return ranges of tokens: the strongest one by one, and all that lie between them together.

    Args:
        strengths: of each token that takes part; further ones are never taken one by one.
        edges: positions that no range crosses, the first and last included.
        budget: the number of ranges, at most.
    """
    bounds = set(edges)
    for place in sorted(range(len(strengths)), key=lambda place: -strengths[place]):
        new = bounds | {place, place + 1}
        if len(new) > budget + 1:
            break
        bounds = new
    return list(pairwise(sorted(bounds)))
