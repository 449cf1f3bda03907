"""Train a language model, and see what its answers rely on meanwhile: `python train.py --help`."""

from depass_lightning.commands.main import train

if __name__ == "__main__":
    train()
