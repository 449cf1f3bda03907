"""Fine-tune a language model in a custom script, and attribute its answers during training.

The bundled model learns new facts; the probes ask for each of them in words that the training does not use.
`python examples/own_script.py` takes about half a minute on a CPU.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from depass_lightning import DePass, tasks
from depass_lightning.callbacks import DePassCallback


class Learner(pl.LightningModule):
    """A language model that learns sentences."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model.train()
        self.tokenizer = tokenizer

    def training_step(self, batch, _):
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def collate(self, examples):
        """Pad sentences into a batch, with labels only for the last word."""
        texts = [example.prompt + example.answer for example in examples]
        batch = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -1] = batch["input_ids"][:, -1]
        return {**batch, "labels": labels}


def main(steps=200):
    """Train the model, and print the probes' curves."""
    pl.seed_everything(0)
    tiny = DePass.from_pretrained("tiny")
    learner = Learner(tiny.model, tiny.tokenizer)
    facts = list(tasks.load("known", split="new-train"))
    loader = DataLoader(facts, batch_size=16, shuffle=True, collate_fn=learner.collate)

    probes = tasks.load("known", split="new-test")
    callback = DePassCallback(probes, every_n_steps=20)
    logger = CSVLogger("logs", name="own_script")
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[callback],
        logger=logger,
        log_every_n_steps=5,
        enable_checkpointing=False,
    )
    trainer.fit(learner, loader)

    history = callback.history["known"]
    print("step  probability of the answer  share of the score on the subject")
    for step, probability, share in zip(
        history.steps, history.curves["probability"], history.curves["on_target"], strict=True
    ):
        print(f"{step:4}  {probability:25.2f}  {share:33.2f}")
    print(f"The maps are in {logger.log_dir}/depass/known")


if __name__ == "__main__":
    main()
