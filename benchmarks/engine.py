"""Time and peak memory of a decomposed pass, compared with a plain forward pass and a naive implementation.

The naive implementation has the published structure: one prompt at a time, `[component, position, head,
hidden]` in attention, the whole `[component, position, neuron]` in the MLP, no causal zeros skipped. All run
on the same random Llama (12 layers, 768 hidden, 2048 neurons, 12 heads), interleaved, so that other
load affects all of them alike; figures are medians, and only their ratios are meaningful. Peak memory is
measured in a fresh process for each case.

    python benchmarks/engine.py                       # 16 to 256 tokens
    python benchmarks/engine.py --tokens 64 --repeats 5
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from depass_lightning import DePass, Token
from depass_lightning.engine.record import record

HIDDEN, NEURONS, LAYERS, HEADS, VOCABULARY = 768, 2048, 12, 12, 1000


def random_llama() -> LlamaForCausalLM:
    """Return a Llama of GPT-2's size with random parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.6, 1.4)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def naive(depass: DePass, ids: Tensor, token: int) -> Tensor:
    """Return token scores with the published structure, from the same recording and under the same rule."""
    decoder = depass.decoder
    count = ids.shape[1]
    recording = record(decoder, ids, torch.tensor([count]), torch.tensor([[count - 1]]))
    state = recording.state(0)[0]
    components = torch.diag_embed(state.T).permute(1, 2, 0).contiguous()
    for layer in range(recording.layers):
        block = recording.block(layer)
        attention, mlp = block.attention, block.mlp
        heads, size = attention.heads, attention.head_size
        values = _normed(components, attention.norm) @ attention.value.weight.T
        values = values.view(count, count, heads, size)
        output = attention.output.weight.view(-1, heads, size)
        projected = torch.einsum("mkhi,dhi->mkhd", values, output)
        components = components + torch.einsum("hnk,mkhd->mnd", attention.probabilities[0], projected)
        gates = _normed(components, mlp.norm) @ mlp.gate.weight.T
        gates[0, 1:] = 0
        gates[0, 0] = 1
        shares = (gates / 0.1).masked_fill(gates == 0, -torch.inf).softmax(0)
        components = components + (shares * mlp.activations) @ mlp.down.weight.T
    row, _ = decoder.readout(torch.tensor([token]))
    return _normed(components, recording.final_norm)[:, -1] @ row[0]


def _normed(components: Tensor, norm) -> Tensor:
    return components * norm.scale[0, :, None] * norm.probe.weight


def cases(tokens: int) -> dict[str, Callable[[], object]]:
    """Return the compared computations at one length, by name."""
    model = random_llama()
    depass = DePass(model)
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = ids.repeat(8, 1)

    def plain() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return {
        "plain forward": plain,
        "naive": lambda: naive(depass, ids, 7),
        "depass": lambda: depass.attribute(input_ids=ids, target=Token(7))[0].scores,
        "depass, 8 at once": lambda: depass.attribute(input_ids=batch, target=Token(7))[0].scores,
    }


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, each row as soon as it is measured.

    Args:
        title: of the table.
        columns: their names.
        rows: measures a row when the next one is asked for.
    """
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def peak_bytes(tokens: int, name: str) -> int:
    """Return the growth of a fresh process's peak memory while it runs one case."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (tokens, name))


def _peak(tokens: int, name: str) -> int:
    work = cases(tokens)
    work["plain forward"]()
    return peak_growth(work[name])


def peak_growth(work: Callable[[], object]) -> int:
    """Return the peak growth of resident memory while a function runs, in bytes (Linux).

    The kernel's peak counter is reset first, so that loading and checking the model is not counted.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return max(1, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--naive-up-to", type=int, default=256, help="longest prompt for the naive implementation"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    options = parser.parse_args()
    columns = [
        "tokens",
        "plain s",
        "naive s",
        "depass s",
        "8 at once, per prompt",
        "times faster",
        "8 at once",
    ]
    columns += ["plain forwards", "error", "naive peak", "depass peak", "estimated s", "estimated bytes"]
    title = f"random Llama, {LAYERS} layers, {HIDDEN} hidden, float32, {torch.get_num_threads()} threads"
    print_rows(title, columns, (measure(tokens, options) for tokens in options.tokens))


def measure(tokens: int, options: argparse.Namespace) -> list[str]:
    """Return one line of the table; peaks are multiples of the minimal state, `N^2 / 2 * hidden * 4` bytes.

    Estimates are given as multiples of the measured values.
    """
    work = cases(tokens)
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    expected_cost = DePass(random_llama()).estimate(input_ids=ids)
    if tokens > options.naive_up_to:
        del work["naive"]
    outcome = {name: call() for name, call in work.items()}
    seconds = {name: [] for name in work}
    for _ in range(options.repeats):
        for name, call in work.items():
            seconds[name].append(timed(call))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    error = "-"
    if "naive" in work:
        expected, actual = outcome["naive"], outcome["depass"]
        assert isinstance(expected, Tensor)
        assert isinstance(actual, Tensor)
        error = f"{float((expected - actual).norm() / expected.norm()):.0e}"
    least = tokens**2 / 2 * HIDDEN * 4
    peaks = {
        name: peak_bytes(tokens, name)
        for name in ("naive", "depass")
        if name in work and not options.no_memory
    }
    shown = {name: f"{peaks[name] / least:.1f}" if name in peaks else "-" for name in ("naive", "depass")}
    bytes_ratio = f"{expected_cost.bytes / peaks['depass']:.2f}" if "depass" in peaks else "-"
    per_prompt = median["depass, 8 at once"] / 8

    def ratio(of: str, to: float) -> str:
        return f"{median[of] / to:.1f}" if of in median else "-"

    return [
        str(tokens),
        f"{median['plain forward']:.3f}",
        f"{median['naive']:.2f}" if "naive" in median else "-",
        f"{median['depass']:.3f}",
        f"{per_prompt:.3f}",
        ratio("naive", median["depass"]),
        ratio("naive", per_prompt),
        ratio("depass", median["plain forward"]),
        error,
        shown["naive"],
        shown["depass"],
        f"{expected_cost.seconds / median['depass']:.2f}",
        bytes_ratio,
    ]


if __name__ == "__main__":
    main()
