"""Time of all layers' heads in one sweep, and of one backward pass for all components.

The random Llama of `engine.py`, with interleaved runs and medians; only the ratios are meaningful.

- *Heads:* under the softmax rule the library propagates the groups of all layers together, from one recorded
  pass. It is compared with the same layers one by one, each with a recorded pass: by the library, and by a
  naive implementation with the published structure (`[component, position, head, hidden]` in attention, the
  whole `[component, position, neuron]` in the MLP).
- *Adjoint:* under the taylor rule one backward pass gives every component's score. It is compared with
  a plain forward pass, with and without the recorded pass that it needs.

    python benchmarks/linear.py                                 # heads at 16 and 32 tokens, adjoint to 128
    python benchmarks/linear.py --heads --adjoint 32 128 512    # the adjoint alone, up to 512 tokens
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.engine import (
    HEADS,
    HIDDEN,
    LAYERS,
    NEURONS,
    VOCABULARY,
    _normed,
    peak_growth,
    print_rows,
    random_llama,
    timed,
)
from depass_lightning import Attribution, DePass, Heads, Neurons, Token, Tokens
from depass_lightning.engine.frozen import FrozenAttention, FrozenMLP
from depass_lightning.engine.record import Recording, record

TARGET = 7


def one_prompt(tokens: int) -> Tensor:
    """Return random token ids `[1, position]`."""
    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def recorded(depass: DePass, ids: Tensor) -> Recording:
    """Return the recorded pass that every decomposition starts with."""
    count = ids.shape[1]
    return record(depass.decoder, ids, torch.tensor([count]), torch.tensor([[count - 1]]))


@torch.no_grad()
def naive_heads(depass: DePass, ids: Tensor, layer: int) -> Tensor:
    """Return the scores of one layer's heads with the published structure, recorded pass included."""
    recording = recorded(depass, ids)
    state = recording.state(layer)[0]
    attention = recording.block(layer).attention
    heads = _head_outputs(attention, state[None])[:, 0]
    components = torch.cat([state[None], heads])
    for index in range(layer, recording.layers):
        block = recording.block(index)
        if index > layer:
            components = components + _head_outputs(block.attention, components).sum(0)
        components = components + _shared(block.mlp, components)
    row, _ = depass.decoder.readout(torch.tensor([TARGET]))
    return _normed(components, recording.final_norm)[:, -1] @ row[0]


def _head_outputs(attention: FrozenAttention, components: Tensor) -> Tensor:
    """Return what every head adds to every component, `[head, component, position, hidden]`."""
    count, positions, hidden = components.shape
    values = (_normed(components, attention.norm) @ attention.value.weight.T).view(
        count, positions, HEADS, -1
    )
    output = attention.output.weight.view(hidden, HEADS, -1)
    projected = torch.einsum("mkhi,dhi->mkhd", values, output)
    return torch.einsum("hnk,mkhd->hmnd", attention.probabilities[0], projected)


def _shared(mlp: FrozenMLP, components: Tensor) -> Tensor:
    """Return what the MLP adds to every component under the softmax rule."""
    gates = _normed(components, mlp.norm) @ mlp.gate.weight.T
    shares = (gates / 0.1).masked_fill(gates == 0, -torch.inf).softmax(0)
    return (shares * mlp.activations) @ mlp.down.weight.T


def head_cases(tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Return three computations of the scores of all heads, `[layer * (head + 1)]`, by name."""
    depass = DePass(random_llama())
    ids = one_prompt(tokens)

    def attributed(layer: int | None) -> Tensor:
        return depass.attribute(input_ids=ids, target=Token(TARGET), source=Heads(layer))[0].scores

    return {
        "naive loop": lambda: torch.cat([naive_heads(depass, ids, layer) for layer in range(LAYERS)]),
        "loop": lambda: torch.cat([attributed(layer) for layer in range(LAYERS)]),
        "sweep": lambda: attributed(None),
    }


def adjoint_cases(tokens: int) -> dict[str, Callable[[], object]]:
    """Return a plain pass, a recorded one, and backward passes that include a recorded one."""
    model = random_llama()
    depass = DePass(model)
    ids = one_prompt(tokens)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def everything() -> list[list[Attribution]]:
        sources = [Tokens(), Heads(), Neurons()]
        return depass.attribute_sources(None, Token(TARGET), sources, input_ids=ids, rule="taylor")

    return {
        "plain": plain,
        "recording": lambda: recorded(depass, ids),
        "tokens": lambda: depass.attribute(input_ids=ids, target=Token(TARGET), rule="taylor"),
        "everything": everything,
    }


def interleaved(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every case per round, after a warm-up round."""
    for call in work.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            seconds[name].append(timed(call))
    return seconds


def heads_row(tokens: int, repeats: int) -> list[str]:
    """Return one line of the table of heads."""
    work = head_cases(tokens)
    expected = work["naive loop"]()
    errors = [float((work[name]() - expected).norm() / expected.norm()) for name in ("loop", "sweep")]
    seconds = interleaved(work, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        str(tokens),
        *(f"{median[name]:.3f}" for name in work),
        f"{median['naive loop'] / median['sweep']:.1f}",
        f"{median['loop'] / median['sweep']:.1f}",
        f"{max(errors):.0e}",
    ]


def adjoint_row(tokens: int, repeats: int) -> list[str]:
    """Return one line of the table of backward passes; recording times are subtracted round by round."""
    work = adjoint_cases(tokens)
    work["plain"]()
    growth, states = peak_growth(work["tokens"]), LAYERS * tokens * HIDDEN * 4
    seconds = interleaved(work, repeats)
    plain = statistics.median(seconds["plain"])
    row = [str(tokens), f"{plain:.3f}", f"{statistics.median(seconds['recording']) / plain:.2f}"]
    for name in ("tokens", "everything"):
        pairs = zip(seconds[name], seconds["recording"], strict=True)
        backward = [total - recording for total, recording in pairs]
        row += [f"{statistics.median(times) / plain:.2f}" for times in (seconds[name], backward)]
    return [*row, f"{growth / 1e6:.0f}", f"{growth / states:.1f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, nargs="*", default=[16, 32], help="prompt lengths for heads")
    parser.add_argument("--adjoint", type=int, nargs="*", default=[32, 128], help="and for the adjoint")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(
        f"random Llama, {LAYERS} layers, {HIDDEN} hidden, {NEURONS} neurons, {HEADS} heads, float32, "
        f"{torch.get_num_threads()} threads; load at the start {os.getloadavg()[0]:.1f}"
    )
    if options.heads:
        columns = ["tokens", "naive loop s", "loop s", "sweep s"]
        columns += ["times faster than naive loop", "than loop", "error"]
        rows = (heads_row(tokens, options.repeats) for tokens in options.heads)
        print_rows("all heads of all layers, softmax rule", columns, rows)
    if options.adjoint:
        columns = ["tokens", "plain s", "recording", "tokens' scores", "without recording"]
        columns += ["and all heads and neurons", "without recording", "MB grown", "times the states"]
        rows = (adjoint_row(tokens, options.repeats * 3) for tokens in options.adjoint)
        print_rows("one backward pass, taylor rule; in plain forward passes", columns, rows)


if __name__ == "__main__":
    main()
