"""Fine-tune a Hugging Face causal language model, as a LightningModule."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from typing_extensions import override


class FineTune(LightningModule):
    """Train a causal language model with AdamW, a warm-up and a cosine decay.

    Logged: `train/loss`, `train/gradient_norm` before clipping, `train/learning_rate`; `val/loss` and
    `val/accuracy` over all validation sets, and where there are several, for each (`val/<set>/loss`). The
    accuracy is the share of scored tokens that the model finds most likely.

    Args:
        model: any Hugging Face causal language model; parameters without gradient stay as they are.
        learning_rate: the highest one, after the warm-up.
        weight_decay: on matrices; biases and norms have none.
        betas: AdamW's two averages.
        warmup_steps: optimiser steps of linear warm-up.
        final_share: share of the learning rate that is left at the last step.
        label_smoothing: probability that the loss spreads over all tokens, so that logits stay bounded; the
            validation loss spreads none.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        final_share: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.warmup_steps = warmup_steps
        self.final_share = final_share
        self.label_smoothing = label_smoothing
        self.held_out_loss = MeanMetric()
        self.held_out_accuracy = MeanMetric()

    def forward(
        self, input_ids: Int[Tensor, "batch position"], attention_mask: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Return the logits of every next token."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch."""
        loss, _ = self._loss(batch, self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, which Lightning clips afterwards."""
        norms = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
        self.log("train/gradient_norm", torch.stack(norms).norm())

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of a batch of held-out passages."""
        loss, logits = self._loss(batch)
        scored = batch["scored"][:, 1:]
        hits = logits.argmax(-1)[scored] == batch["input_ids"][:, 1:][scored]
        count, accuracy = len(hits), hits.float().sum() / max(1, len(hits))
        self.held_out_loss.update(loss, count)
        self.held_out_accuracy.update(accuracy, count)
        if len(self.trainer.val_dataloaders or ()) > 1:
            values = {f"val/{batch['set']}/loss": loss, f"val/{batch['set']}/accuracy": accuracy}
            self.log_dict(values, batch_size=count, add_dataloader_idx=False, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy over all validation sets together."""
        self.log("val/loss", self.held_out_loss, prog_bar=True)
        self.log("val/accuracy", self.held_out_accuracy, prog_bar=True)

    def _loss(
        self, batch: dict[str, Any], label_smoothing: float = 0.0
    ) -> tuple[Tensor, Float[Tensor, "batch position vocabulary"]]:
        """Return the weighted mean loss of the next tokens, and the logits that predict them."""
        logits = self(batch["input_ids"], batch["attention_mask"])[:, :-1]
        weights = batch["weights"][:, 1:]
        next_ids = batch["input_ids"][:, 1:]
        losses = cross_entropy(
            logits.transpose(1, 2).float(), next_ids, reduction="none", label_smoothing=label_smoothing
        )
        return (losses * weights).sum() / weights.sum().clamp(min=1e-8), logits

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, which changes the learning rate at every step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        others = [parameter for parameter in trained if parameter.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share(self, step: int) -> float:
        """Return the share of the learning rate at an optimiser step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        whole = self.trainer.estimated_stepping_batches - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, whole))
        return self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * progress)) / 2
