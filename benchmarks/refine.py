"""Time of `Tokens(refine=)` as a fraction of the run over all tokens, and how well their scores agree.

Agreement is measured on the tokens that the refined run scores one by one: the rank correlation with their
scores in the full run, and how many of the full run's five largest tokens are the refined run's five largest.

    python benchmarks/refine.py                            # SmolLM2-135M, 128 to 512 tokens
    python benchmarks/refine.py tiny --tokens 96 --refine 32
"""

import argparse
import time
from pathlib import Path

import torch
from torchmetrics.functional import spearman_corrcoef

from depass_lightning import Attribution, DePass, Tokens

TEXT = Path(__file__).parent.parent / "docs" / "method.md"
TOP = 5


def timed(depass: DePass, ids: list[int], source: Tokens) -> tuple[Attribution, float]:
    """Attribute a prompt, and return the processor time that it took."""
    started = time.process_time()
    (result,) = depass.attribute(input_ids=[ids], source=source)
    return result, time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--refine", type=int, default=64)
    options = parser.parse_args()
    depass = DePass.from_pretrained(options.model)
    assert depass.tokenizer is not None
    ids = depass.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    for tokens in options.tokens:
        whole, seconds = timed(depass, ids[:tokens], Tokens())
        refined, fewer = timed(depass, ids[:tokens], Tokens(refine=options.refine))
        single = [i for i, component in enumerate(refined.components) if component.kind == "token"]
        places = [refined.components[i].index or 0 for i in single]
        same = torch.tensor([whole.scores[place] for place in places])
        rank = float(spearman_corrcoef(refined.scores[single], same))
        first = torch.tensor([whole.scores[place] for place in range(tokens)]).topk(TOP).indices.tolist()
        largest = refined.scores[single].topk(TOP).indices.tolist()
        shared = set(first) & {places[index] for index in largest}
        print(
            f"{tokens:5} tokens  all {seconds:7.1f} s  refine={options.refine} {fewer / seconds:5.2f} of it  "
            f"{len(single)} single tokens, Spearman {rank:.2f}, top {TOP} shared {len(shared)}  "
            f"completeness error {refined.completeness:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
