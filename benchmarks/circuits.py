"""Operations and processor time of all edges between a model's nodes, in plain forward passes.

Operations are counted by torch, those of the product of everything that is written with everything that is
read listed apart; counts do not depend on what else runs, processor times hardly do.

    python benchmarks/circuits.py                 # SmolLM2-135M, 20 tokens
    python benchmarks/circuits.py gpt2 --rule shap
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from depass_lightning import Contrast, DePass

PROMPT = "When Mary and John went to the store, John gave a drink to Mary and then John went to"
TARGET = Contrast(" Mary", " John")


def counted(work: Callable[[], object]) -> int:
    """Return the floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median processor time of a call."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rule", default="half")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    depass = DePass.from_pretrained(options.model)
    circuit = depass.circuit(PROMPT, TARGET, rule=options.rule)
    ids = torch.tensor([circuit.token_ids])

    @torch.no_grad()
    def plain() -> object:
        return depass.model(ids)

    def edges() -> object:
        return depass.circuit(PROMPT, TARGET, rule=options.rule)

    nodes, (_, positions) = len(circuit.nodes), ids.shape
    # Half of all pairs have an edge, and a product and a sum is two operations.
    product = len(circuit.paths) * nodes**2 * positions * depass.decoder.hidden_size
    once, whole = counted(plain), counted(edges)
    print(
        f"{options.model}, rule {options.rule}: {positions} tokens, {nodes} nodes, "
        f"{circuit.edge_count:,} edges"
    )
    print(
        f"operations     plain {once / 1e9:.2f} G; edges {(whole - product) / once:.2f} plain passes "
        f"and a product of {product / 1e9:.2f} G"
    )
    both = seconds(plain, options.repeats), seconds(edges, options.repeats)
    print(
        f"processor time plain {both[0]:.3f} s; edges {both[1] / both[0]:.2f} plain passes, product included"
    )


if __name__ == "__main__":
    main()
