"""Memory of a long analysis, and the time saved by a second process.

1. `--prompts`: `analyze.py` on this number of prompts with the bundled model, in one process and in two. The
   resident memory of all its processes is sampled: comparing it at nine tenths of the prompts with that at
   one tenth shows whether memory grows with the number of prompts.
2. `--tokens`: one prompt of this length through a random Llama (12 layers, 768 hidden), in one process and in
   two that split its components: the seconds of the slower process, and the memory growth of the larger.

Every process has one thread.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --prompts 10000 --tokens 128 256
"""

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import VOCABULARY, random_llama
from depass_lightning import DePass, Token
from depass_lightning.storage import RunStore

ANALYZE = Path(__file__).resolve().parent.parent / "analyze.py"


SAMPLED = 0.1  # seconds between two looks at the run


def sweep(prompts: int, processes: int) -> dict[str, float]:
    """Run `analyze.py`, and return prompts per second and memory.

    Args:
        prompts: the number of prompts.
        processes: the number of processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"task.size={prompts}", "faithfulness=none", "print_config=false", "report.figures=0"]
        several = ["trainer.strategy=ddp", f"trainer.devices={processes}"] if processes > 1 else []
        command = [sys.executable, str(ANALYZE), *settings, *several]
        command += ["trainer.accelerator=cpu", f"hydra.run.dir={folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with Path(folder, "log").open("w") as log:
            process = psutil.Popen(command, stdout=log, stderr=log, env=environment)
        run_store, memory = RunStore(f"{folder}/run"), []
        while process.poll() is None:
            memory.append((time.perf_counter(), run_store.counted(), _resident(process)))
            time.sleep(SAMPLED)
        if process.returncode:
            raise SystemExit(Path(folder, "log").read_text())
        # A run of a few prompts may be over between two looks: its rate is 0, not measured.
        started = next((i for i, (_, done, _) in enumerate(memory) if done), 0)
        # Merging removes the shards, perhaps before the last ones are counted.
        reached = max(done for _, done, _ in memory)
        tenth, most = (
            next(i for i, (_, done, _) in enumerate(memory) if done >= part * reached) for part in (0.1, 0.9)
        )
        ended = max((i for i, (_, done, _) in enumerate(memory) if done), default=0)
        seconds = max(SAMPLED, memory[ended][0] - memory[started][0])
        return {
            "prompts/s": (memory[ended][1] - memory[started][1]) / seconds,
            "MB at a tenth": memory[tenth][2] / 2**20,
            "MB at nine tenths": memory[most][2] / 2**20,
            "MB at most, merging": max(size for _, _, size in memory) / 2**20,
        }


def _resident(process: psutil.Process) -> int:
    """Return the resident memory of a process and its children, in bytes."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.Error:
        pass  # the process has just ended
    return total


def attribute(rank: int, world: int, port: int, tokens: int, results: Any) -> None:
    """Attribute one prompt, and put this process's rank, time, memory growth and scores into `results`."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    depass = DePass(random_llama(), process_group=dist.group.WORLD if world > 1 else None)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    depass.attribute(input_ids=ids[:, :8], target=Token(5))
    before = psutil.Process().memory_info().rss
    dist.barrier()
    started = time.perf_counter()
    (attribution,) = depass.attribute(input_ids=ids, target=Token(5))
    seconds = time.perf_counter() - started
    results.put((rank, seconds, _peak() - before, attribution.scores.tolist()))
    dist.destroy_process_group()


def _peak() -> int:
    """Return the peak memory of this process, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_prompt(tokens: int, world: int) -> tuple[float, float, torch.Tensor]:
    """Return the seconds of the slowest process, the megabytes of the largest, and the scores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (world, port, tokens, results)
    workers = [context.Process(target=attribute, args=(rank, *arguments)) for rank in range(world)]
    for worker in workers:
        worker.start()
    measured = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    _, seconds, growth, scores = zip(*measured, strict=True)
    return max(seconds), max(growth) / 2**20, torch.tensor(scores[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="*", default=[1000])
    parser.add_argument("--tokens", type=int, nargs="*", default=[128])
    options = parser.parse_args()
    console = Console()
    for prompts in options.prompts:
        table = Table("processes", title=f"{prompts:,} prompts, the bundled model", title_justify="left")
        for processes in (1, 2):
            measured = sweep(prompts, processes)
            if processes == 1:
                for name in measured:
                    table.add_column(name, justify="right")
            table.add_row(str(processes), *(f"{value:,.0f}" for value in measured.values()))
        console.print(table)
    if options.tokens:
        table = Table("tokens", "processes", "seconds", "MB grown, largest", "largest difference of a score")
        for tokens in options.tokens:
            alone = one_prompt(tokens, 1)
            for world in (1, 2):
                seconds, size, scores = alone if world == 1 else one_prompt(tokens, world)
                error = float((scores - alone[2]).abs().max() / alone[2].abs().max())
                table.add_row(str(tokens), str(world), f"{seconds:.2f}", f"{size:,.0f}", f"{error:.0e}")
        console.print(table)


if __name__ == "__main__":
    main()
