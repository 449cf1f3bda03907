"""Train a language model, and see what it bases its answers on meanwhile: `python train.py --help`."""

from depass_lightning.commands.main import train

if __name__ == "__main__":
    train()
