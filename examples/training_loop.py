"""Attribute a model's answers in a training loop without a framework.

With Fabric or Accelerate it is the same: the monitor takes the model that `setup` or `prepare` returns, and
`FunctionSink(fabric.log_dict)` or `FunctionSink(accelerator.log)` logs.
`python examples/training_loop.py` takes about ten seconds on a CPU.
"""

import torch
from torch.utils.data import DataLoader

from depass_lightning import DePass, tasks
from depass_lightning.monitoring import FunctionSink, ProbeMonitor


def main(steps=60, every=20, folder="logs/training_loop"):
    """Teach the bundled model new facts, and print the probes' scalars."""
    torch.manual_seed(0)
    tiny = DePass.from_pretrained("tiny")
    model, tokenizer = tiny.model.train(), tiny.tokenizer
    facts = [example.prompt + example.answer for example in tasks.load("known", split="new-train")]
    loader = DataLoader(
        facts, batch_size=16, shuffle=True, collate_fn=lambda texts: batch_of(texts, tokenizer)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    monitor = ProbeMonitor(model, tokenizer, tasks.load("known", split="new-test"), size=8)
    sinks = [FunctionSink(show)]
    batches = (batch for _ in iter(int, 1) for batch in loader)
    monitor.start()
    for step in range(steps + 1):
        if step == steps or (step % every == 0 and monitor.due(step)):
            monitor.publish(monitor.run(step), sinks, folder)
        model(**next(batches)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, f"{folder}/checkpoint.pt")
    print(f"The maps are in {folder}/depass/known")


def batch_of(texts, tokenizer):
    """Pad sentences into a batch, with labels only for the last word."""
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    return {**batch, "labels": labels}


def show(scalars, step):
    """Print what a service would log."""
    print(f"{step:4}  {scalars['depass/known/probability']:.2f}  {scalars['depass/known/on_target']:.2f}")


if __name__ == "__main__":
    main()
