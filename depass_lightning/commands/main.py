"""The entry points of `analyze.py` and `train.py`: Hydra first, the libraries only when something runs."""

import sys

import hydra
from omegaconf import DictConfig

from depass_lightning.commands.prompt_arguments import rewritten
from depass_lightning.commands.shell import shell, waiting

LIBRARIES = "loading torch, transformers and Lightning"
CONF = "pkg://depass_lightning.conf"


@shell
def analyze() -> None:
    """Attribute the prompts that the command line names."""
    sys.argv[1:] = rewritten(sys.argv[1:])
    _analyze()


@hydra.main(version_base="1.3", config_path=CONF, config_name="analyze")
def _analyze(config: DictConfig) -> None:
    with waiting(LIBRARIES):
        from depass_lightning.commands import analyze
    analyze.analyze(config)


@shell
@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def train(config: DictConfig) -> None:
    """Train the model that the command line names."""
    with waiting(LIBRARIES):
        from depass_lightning.commands import train
    train.train(config)
