"""Estimate the seconds and bytes that an attribution will take, before it is run.

1. Count the rows (a component at a position) that the prompt and the source have in each block.
2. Record the beginning of the longest prompt, and propagate as many rows, or some thousands, through one
   block: seconds per row, and seconds per token of the plain pass.
3. Multiply. A row's cost grows with the prompt's length in attention only.

Bytes are counted, not measured: the recording, the rows, the working memory, and the weights of one block
where they must be held in another precision.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.adjoint import at_readout, backward
from depass_lightning.engine.attention import propagate_attention
from depass_lightning.engine.component_groups import DenseGroup
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.mlp import propagate_mlp
from depass_lightning.engine.record import Recording, record, recorded_bytes
from depass_lightning.engine.state import DecomposedState
from depass_lightning.models.affine import features
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt
from depass_lightning.sources import Source
from depass_lightning.sources.tokens import Positional, Tokens

SHORT = 64  # tokens of the prompt that is tried
ROWS = 4096  # the most rows that are propagated through one block
REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """The time and memory that an attribution will take.

    Attributes:
        seconds: time on this machine under its current load, without loading and writing.
        recording: bytes of the recording of the largest batch.
        components: bytes of the components that are propagated at once; 0 for a backward pass.
        working: bytes of working memory.
    """

    seconds: float
    recording: int
    components: int
    working: int

    @property
    def bytes(self) -> int:
        """All bytes, which are in addition to the model's weights."""
        return self.recording + self.components + self.working

    def __str__(self) -> str:
        minutes = self.seconds / 60
        taken = f"{self.seconds:.1f} s" if minutes < 2 else f"{minutes:.0f} min"
        if minutes > 120:
            taken = f"{minutes / 60:.1f} h"
        return f"about {taken} and {self.bytes / 2**30:.2g} GiB in addition to the model"


def estimate(decoder: Decoder, prompts: Sequence[Prompt], settings: Settings, batch_size: int) -> Estimate:
    """Estimate what attributing prompts takes."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    batches = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    longest = ordered[-1]
    sources = [part for source in settings.sources for part in source.per_layer(len(decoder.blocks))]
    # [batch][prompt and source][block]
    rows = [
        [propagated_rows(source, prompt, decoder, settings) for prompt in batch for source in sources]
        for batch in batches
    ]
    most = max((max(blocks, default=0) for batch in rows for blocks in batch), default=0)
    rates = _tried(decoder, longest.ids[:SHORT], settings, min(most, ROWS))
    seconds = 0.0
    for batch, batch_rows in zip(batches, rows, strict=True):
        length = max(len(prompt.ids) for prompt in batch)
        twice = recorded_bytes(decoder, len(batch), length) > settings.budget.recording
        seconds += rates.plain * (2 if twice else 1) * len(batch) * length
        if settings.adjoint:
            seconds += rates.back * len(batch) * length * (2 if settings.attention_path == "control" else 1)
        else:
            seconds += rates.row * _growth(decoder, length, rates.length) * sum(map(sum, batch_rows))
    return _with_bytes(seconds, decoder, batches, settings)


def propagated_rows(source: Source, prompt: Prompt, decoder: Decoder, settings: Settings) -> list[int]:
    """Count the rows of a source's components in each block but the last, which needs only the target's."""
    layers, length, extra = len(decoder.blocks), len(prompt.ids), int(settings.bias)
    if isinstance(source, Positional):
        owners = source.owners(prompt)
        rows = sum(length - owners.index(owner) for owner in set(owners)) + extra * length
        if isinstance(source, Tokens) and source.refine is not None:
            rows = min(rows, (source.refine + extra) * length)  # they begin anywhere
        return [rows if layer >= source.layers(layers)[0] else 0 for layer in range(layers - 1)]
    members, behind = len(source.describe(prompt, decoder)[0]) + extra, source.after_mlp
    if source.read_directly(layers - 1 - source.layers(layers)[0]):
        return []  # next to the target none are propagated
    if source.top is not None:  # once with these, and once with twice as many
        members = 3 * source.top + 2 * (1 + extra)
    return [
        members * length * sum(start + behind <= layer for start in source.layers(layers))
        for layer in range(layers - 1)
    ]


@dataclass(frozen=True)
class _Rates:
    """Seconds per token of the plain pass, per row in a block, per token of the backward pass."""

    plain: float
    row: float
    back: float
    length: int


def _tried(decoder: Decoder, ids: list[int], settings: Settings, rows: int) -> _Rates:
    """Run the pieces on a short prompt, with about this number of rows."""
    tokens = torch.tensor([ids], device=decoder.device)
    lengths = torch.tensor([len(ids)], device=decoder.device)

    def recorded() -> Recording:
        return record(decoder, tokens, lengths, lengths[:, None] - 1)

    recording = recorded()
    plain = _fastest(recorded, decoder) / len(ids)
    if settings.adjoint:
        assert isinstance(settings.rule, LinearPaths)
        rule, zeros = settings.rule, torch.zeros(1, device=decoder.device, dtype=decoder.dtype)
        vector = torch.ones(1, 1, decoder.hidden_size, device=decoder.device, dtype=decoder.dtype)

        def back() -> None:
            gradient = at_readout(recording, lengths[:, None] - 1, vector, zeros, normed=True)
            for _ in backward(recording, rule, [gradient], layer=recording.layers, first=0):
                pass

        with alone(decoder.model):
            return _Rates(plain, 0.0, _fastest(back, decoder) / len(ids), len(ids))
    if rows == 0:
        return _Rates(plain, 0.0, 0.0, len(ids))
    block = recording.block(len(decoder.blocks) // 2)  # neither the first nor the last
    count = max(1, rows // len(ids))
    components = block.resid_pre[:, None].expand(-1, count, -1, -1) / count
    positions = torch.arange(len(ids), device=decoder.device)[None]
    real = torch.ones_like(positions, dtype=torch.bool)

    def through() -> None:
        state = DecomposedState.begin(
            DenseGroup(components), real, positions, bias=None, budget=settings.budget
        )
        propagate_attention(state, block.attention)
        propagate_mlp(state, block.mlp, settings.rule)

    with alone(decoder.model):
        return _Rates(plain, _fastest(through, decoder) / (count * len(ids)), 0.0, len(ids))


def _fastest(work: Callable[[], object], decoder: Decoder) -> float:
    """Return the fewest seconds that some work takes."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        if decoder.device.type == "cuda":
            torch.cuda.synchronize(decoder.device)
        times.append(time.perf_counter() - start)
    return min(times)


def _products(decoder: Decoder, length: int) -> float:
    """Count the multiplications of one row in one block, for a prompt of this length."""
    block = decoder.blocks[0]
    (values, hidden), (_, mixed) = block.attention.value.shape, block.attention.output.shape
    return hidden * (values + mixed + 2 * block.mlp.width) + mixed * length / 2


def _growth(decoder: Decoder, length: int, tried: int) -> float:
    return _products(decoder, length) / _products(decoder, tried)


def _with_bytes(
    seconds: float, decoder: Decoder, batches: Sequence[Sequence[Prompt]], settings: Settings
) -> Estimate:
    """Add the bytes of the largest batch."""
    size, hidden = decoder.dtype.itemsize, decoder.hidden_size
    recordings, components, most = [], [0], 0
    for batch in batches:
        length = max(len(prompt.ids) for prompt in batch)
        recordings.append(
            _recorded(decoder, len(batch), length, settings.budget.kept(backward=settings.adjoint))
        )
        most = max(most, len(batch) * length)
        for source in () if settings.adjoint else settings.sources:
            for part in source.per_layer(len(decoder.blocks)):
                by_prompt = [propagated_rows(part, prompt, decoder, settings) for prompt in batch]
                components.append(sum(max(blocks, default=0) for blocks in by_prompt) * hidden * size)
    block = decoder.blocks[0]
    weights = (
        sum(
            outputs * inputs
            for outputs, inputs in (block.attention.value.shape, block.attention.output.shape)
        )
        + 3 * hidden * block.mlp.width
    )
    copies = weights * size if decoder.rounds else 0
    vocabulary = features(decoder.unembedding)[1] * size
    past_mlp = block.mlp.residual != "none" or block.mlp.residual_weight is not None
    copies_of_rows = 2 if block.parallel or past_mlp else 1
    # What a step holds, once more for what it is made from.
    rows = max(most, max(components) // (hidden * size))
    step = min(settings.budget.working, rows * (2 * hidden + 2 * block.mlp.width) * size)
    working = 2 * step + copies + 2 * vocabulary
    return Estimate(seconds, max(recordings), copies_of_rows * max(components), working)


def _recorded(decoder: Decoder, batch: int, length: int, limit: int) -> int:
    whole = recorded_bytes(decoder, batch, length)
    if whole <= limit:
        return whole
    states = len(decoder.blocks) * batch * length * decoder.hidden_size * decoder.model_dtype.itemsize
    return states + whole // len(decoder.blocks)
