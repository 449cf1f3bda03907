"""Divides the components of each prompt among the processes of `Trainer.predict`."""

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from depass_lightning.errors import DePassError
from depass_lightning.modules.attribution_module import AttributionModule


class ComponentParallelCallback(Callback):
    """All processes work on the same prompt, each on some of its components.

    For prompts that are too long for one process. `PromptData(together=True)` gives all processes the same
    batches, and `AttributionWriter(together=True)` writes the first process's results.
    """

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, AttributionModule):
            raise DePassError(
                f"ComponentParallelCallback needs an AttributionModule, not a {type(pl_module).__name__}"
            )
        if trainer.world_size > 1:
            pl_module.depass.process_group = dist.group.WORLD

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, AttributionModule):
            pl_module.depass.process_group = None
