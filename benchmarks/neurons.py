"""Time, error and peak memory of neuron scores, compared with a naive implementation.

The naive implementation has the published structure: every neuron of a layer at every position as a dense
`[component, position, hidden]`, `[component, position, head, hidden]` in attention, the whole
`[component, position, neuron]` in the MLP. It is compared with the exact scores, which are cheaper
for layers near the target, and with `Neurons(top=K)`, whose time includes its second run with `2 * K`
neurons. All run on the same model, interleaved; figures are medians, and only their ratios are meaningful.
Errors are relative to the exact neuron scores. Peaks are the growth of resident memory in a fresh
process for each case.

    python benchmarks/neurons.py                                   # a random Llama, 8 and 32 tokens
    python benchmarks/neurons.py --tokens 128 --layers 10 11 --no-naive
    python benchmarks/neurons.py --model smollm2-135m --layers 0 12 24 --no-naive
"""

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import VOCABULARY, peak_growth, print_rows, random_llama, timed
from depass_lightning import Attribution, DePass, Neurons, Token
from depass_lightning.engine.record import record


@torch.no_grad()
def naive(depass: DePass, ids: Tensor, layer: int, token: int) -> Tensor:
    """Return neuron scores with the published structure, from the same recording and under the same rule."""
    decoder = depass.decoder
    count = ids.shape[1]
    recording = record(decoder, ids, torch.tensor([count]), torch.tensor([[count - 1]]))
    block = recording.block(layer)
    neurons = block.mlp.activations[0].T[:, :, None] * block.mlp.down.weight.T[:, None]
    components = torch.cat([(recording.state(layer + 1)[0] - neurons.sum(0))[None], neurons])
    for index in range(layer + 1, recording.layers):
        block = recording.block(index)
        attention, mlp = block.attention, block.mlp
        heads, size = attention.heads, attention.head_size
        groups = heads // attention.key_value_heads
        output = attention.output.weight.view(-1, heads, size)
        values = _normed(components, attention.norm) @ attention.value.weight.T
        values = values.unflatten(2, (-1, size)).repeat_interleave(groups, 2)
        projected = torch.einsum("mkhi,dhi->mkhd", values, output)
        components = components + torch.einsum("hnk,mkhd->mnd", attention.probabilities[0], projected)
        del projected
        gates = _normed(components, mlp.norm) @ mlp.gate.weight.T
        shares = (gates / 0.1).masked_fill(gates == 0, -torch.inf).softmax(0)
        components = components + (shares * mlp.activations[0]) @ mlp.down.weight.T
        del gates, shares
    row, _ = decoder.readout(torch.tensor([token]))
    return _normed(components, recording.final_norm)[:, -1] @ row[0]


def _normed(components: Tensor, norm: Any) -> Tensor:
    return components * norm.scale[0, :, None] * norm.probe.weight


def load(options: argparse.Namespace) -> tuple[DePass, list[Tensor]]:
    """Return the model and the prompts' ids."""
    if options.model is not None:
        depass = DePass.from_pretrained(options.model)
        assert depass.tokenizer is not None
        return depass, [depass.tokenizer(options.prompt, return_tensors="pt")["input_ids"]]
    generator = torch.Generator().manual_seed(1)
    depass = DePass(random_llama())
    return depass, [torch.randint(0, VOCABULARY, (1, count), generator=generator) for count in options.tokens]


def cases(
    depass: DePass, ids: Tensor, layer: int, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Return the compared computations at one layer, by name."""

    def ours(top: int | None) -> Attribution:
        return depass.attribute(input_ids=ids, target=Token(7), source=Neurons(layer, top=top))[0]

    work: dict[str, Callable[[], Any]] = (
        {} if options.no_naive else {"naive": lambda: naive(depass, ids, layer, 7)}
    )
    work["exact"] = lambda: ours(None)
    if layer < len(depass.decoder.blocks) - 2:
        work |= {f"top {top}": lambda top=top: ours(top) for top in options.top}
    return work


def peak_bytes(options: argparse.Namespace, prompt: int, layer: int, name: str) -> int:
    """Return the growth of a fresh process's resident memory while it runs one case."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (options, prompt, layer, name))


def _peak(options: argparse.Namespace, prompt: int, layer: int, name: str) -> int:
    if options.file and name == "exact":
        from depass_lightning.engine import memory

        memory.available = lambda: 0
    depass, prompts = load(options)
    ids = prompts[prompt]
    with torch.no_grad():
        depass.model(input_ids=ids)
    return peak_growth(cases(depass, ids, layer, options)[name])


def neurons_of(scores: Tensor) -> Tensor:
    """Return the neurons' scores, without the rest of the state, which is the first component."""
    return scores[1:]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's rank correlation."""
    ranks = torch.stack([scores.argsort().argsort() for scores in (one, other)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def rows(
    depass: DePass, options: argparse.Namespace, prompt: int, ids: Tensor, layer: int
) -> list[list[str]]:
    """Return the table's lines for one prompt and one layer."""
    work = cases(depass, ids, layer, options)
    outcome = {name: call() for name, call in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.repeats):
        for name, call in work.items():
            seconds[name].append(timed(call))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    exact = neurons_of(outcome["exact"].scores)
    lines = []
    for name, result in outcome.items():
        scores = neurons_of(result.scores if isinstance(result, Attribution) else result)
        reported = result.metadata.get("approximation") if isinstance(result, Attribution) else None
        peak = "-" if options.no_memory else f"{peak_bytes(options, prompt, layer, name) / 2**20:.0f}"
        lines.append(
            [
                str(ids.shape[1]),
                str(layer),
                name,
                f"{median['naive'] / median[name]:.1f}" if "naive" in median else "-",
                f"{median['exact'] / median[name]:.2f}",
                f"{float((scores - exact).norm() / exact.norm()):.0e}" if name != "exact" else "-",
                f"{rank_correlation(scores, exact):.6f}" if name != "exact" else "-",
                f"{reported['relative_change']:.0e}" if reported else "-",
                peak,
            ]
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model's name or folder; by default a random Llama")
    parser.add_argument(
        "--prompt", default="When Mary and John went to the store, John gave a drink to", help="for --model"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32], help="for the random Llama")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 6, 10, 11])
    parser.add_argument("--top", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-naive", action="store_true", help="skip the naive structure")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument(
        "--file", action="store_true", help="keep components in a file when memory is measured"
    )
    options = parser.parse_args()
    depass, prompts = load(options)
    columns = [
        "tokens",
        "layer",
        "",
        "times naive",
        "times exact",
        "error",
        "Spearman",
        "reported",
        "peak MiB",
    ]
    measured = (
        row
        for prompt, ids in enumerate(prompts)
        for layer in options.layers
        for row in rows(depass, options, prompt, ids, layer)
    )
    print_rows(f"neurons, float32, {torch.get_num_threads()} threads", columns, measured)


if __name__ == "__main__":
    main()
