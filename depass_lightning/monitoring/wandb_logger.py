"""A Weights & Biases logger for unattended runs."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class UnattendedWandbLogger(WandbLogger):
    """A `WandbLogger` that records offline where the server does not answer, instead of ending the run."""

    def describe(self, name: str, config: Mapping[str, Any]) -> None:
        """Set the configuration of a run that has not started, and its name if it has none.

        Args:
            name: the name.
            config: the configuration.
        """
        self._wandb_init["config"] = dict(config)
        if self._wandb_init.get("name") is None:
            self._wandb_init["name"] = name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Weights & Biases; started when it is first asked for."""
        from wandb.errors import Error

        try:
            return super().experiment
        except (Error, TimeoutError) as error:
            if self._wandb_init["mode"] == "offline":
                raise
            log.warning("Weights & Biases did not start (%s); this run is recorded offline", error)
            self._wandb_init["mode"] = "offline"
            return super().experiment


def wandb_logger(
    project: str = "depass",
    *,
    name: str | None = None,
    save_dir: str | Path = ".",
    offline: bool = False,
    init_timeout: float = 20.0,
    **options: Any,
) -> WandbLogger:
    """Return a Weights & Biases logger that never waits for a prompt, and not long for a network.

    Args:
        project: the project's name.
        name: the run's name; None for a random one.
        save_dir: the folder of `wandb/`. `wandb sync` uploads offline runs from there.
        offline: always record offline; otherwise `WANDB_MODE` decides, and whether there are credentials
            (`wandb login` or `WANDB_API_KEY`).
        init_timeout: the time to wait for the server, in seconds, before going offline.
        options: further arguments of `WandbLogger`.
    """
    import wandb

    mode = "offline" if offline else os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not _has_credentials(Path(save_dir)):
        mode = "offline"
    Path(save_dir).mkdir(parents=True, exist_ok=True)  # wandb would fall back to a temporary folder
    settings = wandb.Settings(init_timeout=init_timeout)
    return UnattendedWandbLogger(
        name=name, project=project, save_dir=save_dir, mode=mode, settings=settings, **options
    )


def _has_credentials(save_dir: Path) -> bool:
    """Return whether there are credentials for Weights & Biases; if not, log a warning."""
    import wandb

    # by itself, wandb.init would ask at a terminal, and fail without one
    if wandb.login(prompt=False, verify=False):
        return True
    rank_zero_only(log.warning)(
        "there are no credentials for Weights & Biases, so this run is recorded offline under %s; "
        "run `wandb login` to send the next one, `wandb sync` to send this one later",
        save_dir / "wandb",
    )
    return False
