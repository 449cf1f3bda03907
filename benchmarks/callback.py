"""The overhead of `DePassCallback`: the same small fine-tuning with and without it.

A LightningModule learns IOI sentences; 16 held-out prompts are the probes, and pages and scores are written
as usual. Runs without the callback and with it under each rule are interleaved; figures are medians. The
table has the ratios of wall time and of CPU time (more reliable on a busy machine), and the overhead that the
callback reports, `depass/overhead`, converted to a ratio: 1 / (1 - overhead).

    python benchmarks/callback.py                                       # the bundled model
    python benchmarks/callback.py --model smollm2-135m --steps 20 --every 10 --repeats 1
    python benchmarks/callback.py --max-overhead 0.05                   # a limit on the overhead
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from typing_extensions import override

from depass_lightning import DePass, tasks
from depass_lightning.callbacks import DePassCallback

RULES = ("softmax", "taylor")


class Learner(pl.LightningModule):
    """A language model that learns sentences."""

    def __init__(self, depass: DePass) -> None:
        super().__init__()
        self.model: Any = depass.model
        self.tokenizer: Any = depass.tokenizer

    @override
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)

    def collate(self, examples: list[tasks.Example]) -> dict[str, torch.Tensor]:
        """Pad sentences into a batch, with labels only for the last token."""
        texts = [example.prompt + str(example.answer) for example in examples]
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        batch = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -1] = batch["input_ids"][:, -1]
        return {**batch, "labels": labels}


class Stopwatch(Callback):
    """Measures the time of a training; put it first among the callbacks."""

    def __init__(self) -> None:
        self.began = (0.0, 0.0)
        self.seconds = self.processor = 0.0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.perf_counter(), time.process_time()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.began[0]
        self.processor = time.process_time() - self.began[1]


def trained(options: argparse.Namespace, rule: str | None) -> tuple[float, float, float, int]:
    """Fine-tune once; return wall and CPU seconds, the overhead that the callback reports, and its runs."""
    pl.seed_everything(0, verbose=False)
    learner = Learner(DePass.from_pretrained(options.model))
    learner.model.train()
    sentences: Any = list(tasks.load("ioi", size=512, split="train"))
    loader = DataLoader(sentences, batch_size=options.batch_size, collate_fn=learner.collate)
    callbacks: list[Callback] = [watch := Stopwatch()]
    probing = None
    if rule is not None:
        probing = DePassCallback(
            "ioi",
            rule=rule,  # type: ignore[arg-type]
            every_n_steps=options.every,
            max_overhead=options.max_overhead,
        )
        callbacks.append(probing)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=options.steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(learner, loader)
    if probing is None:
        return watch.seconds, watch.processor, 0.0, 0
    overhead = float(trainer.callback_metrics["depass/overhead"])
    return watch.seconds, watch.processor, overhead, len(probing.history["ioi"].steps)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="steps between runs of the probes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-overhead", type=float, default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = Console()
    console.print(
        f"{options.model}: {options.steps} steps of {options.batch_size}, probes every {options.every}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    arms: tuple[str | None, ...] = (None, *RULES)
    measured: dict[str | None, list[tuple[float, float, float, int]]] = {arm: [] for arm in arms}
    if options.repeats > 1:
        trained(options, RULES[0])  # imports, caches
    for _ in range(options.repeats):
        for arm in arms:
            measured[arm].append(trained(options, arm))
    table = Table("rule", "runs", "wall s", "ratio", "CPU s", "ratio", "reported ratio", "overhead")
    base = [statistics.median(column) for column in list(zip(*measured[None], strict=True))[:2]]
    for arm in arms:
        wall, processor, overhead, runs = (
            statistics.median(column) for column in zip(*measured[arm], strict=True)
        )
        ratios = f"{wall / base[0]:.3f}", f"{processor / base[1]:.3f}"
        reported = f"{1 / (1 - overhead):.3f}", f"{overhead:.3f}"
        times = f"{wall:.2f}", ratios[0], f"{processor:.2f}", ratios[1]
        table.add_row(arm or "without", str(int(runs)), *times, *reported)
    console.print(table)


if __name__ == "__main__":
    main()
