"""Time and memory of a decomposed pass on one GPU, at a large model's shapes.

A random Llama (by default 7B shapes in bfloat16), one prompt, medians; each row is printed when it is
measured. The unit is the model's plain forward pass at the same length, as it is loaded (sdpa), so ratios can
be compared between cards. `peak` is what the call allocates beyond the weights; the completeness error is the
result's. A case that runs out of memory, or whose first run takes longer than `--limit`, is reported so.

    python benchmarks/gpu.py                                       # under eight minutes on a data-centre card
    python benchmarks/gpu.py --hidden 2048 --layers 16 --tokens 128 1024
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from depass_lightning import Attribution, DePass, Heads, Tokens
from depass_lightning.attribution.settings import RuleName
from depass_lightning.sources import Source

VOCABULARY = 32_000
GIB = 2**30
# Case: components, rule, the most tokens it is run at.
CASES: dict[str, tuple[Source, RuleName, int]] = {
    "half, tokens": (Tokens(), "half", 1 << 30),
    "half, all heads": (Heads(), "half", 1 << 30),
    "taylor, tokens": (Tokens(), "taylor", 1 << 30),
    "shap, tokens": (Tokens(), "shap", 1 << 30),
    "softmax, tokens": (Tokens(), "softmax", 512),
}


def random_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Return a random Llama in bfloat16 on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=round(arguments.hidden * 2.6875),
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=arguments.hidden // 128,
        max_position_embeddings=max(arguments.tokens),
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes on the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def plain_seconds(model: LlamaForCausalLM, ids: Tensor, repeats: int) -> float:
    """Return the median time of a plain forward pass that computes the last logits only."""
    runs = [
        timed(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)) for _ in range(repeats + 2)
    ]
    return statistics.median(runs[2:])


def row(depass: DePass, ids: Tensor, case: str, plain: float, arguments: argparse.Namespace) -> str:
    """Return a case's row of the table."""
    source, rule, most = CASES[case]
    head = f"| {ids.shape[1]} | {case} | {1e3 * plain:.1f} "
    if ids.shape[1] > most:
        return head + "| not run | | | |"
    results: list[Attribution] = []

    def call() -> None:
        results[:] = depass.attribute(input_ids=ids, target=7, source=source, rule=rule)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        runs = [timed(call)]
    except torch.cuda.OutOfMemoryError:
        return head + "| out of memory | | | |"
    peak = torch.cuda.max_memory_allocated() - before
    if runs[0] < arguments.limit:
        runs = [timed(call) for _ in range(arguments.repeats)]
    seconds = statistics.median(runs)
    error = results[0].completeness
    return head + f"| {seconds:.3f} | {seconds / plain:.1f} | {peak / GIB:.2f} | {error:.0e} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512, 2048, 4096])
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit", type=float, default=10.0, help="seconds after which a case is not repeated"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU; benchmarks/engine.py and linear.py measure on a processor")
    model = random_model(arguments)
    depass = DePass(model)
    name = torch.cuda.get_device_name(0)
    print(f"{name}, torch {torch.__version__}, {arguments.layers} layers of {arguments.hidden}, bfloat16\n")
    print("| tokens | case | plain ms | s | plain passes | peak GiB | completeness error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for tokens in arguments.tokens:
        ids = torch.randint(5, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1)).cuda()
        plain = plain_seconds(model, ids, arguments.repeats)
        for case in arguments.cases:
            print(row(depass, ids, case, plain, arguments), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
