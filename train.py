"""Train a language model, and see what it bases its answers on meanwhile: `python train.py --help`."""

from depass_lightning.commands.train import main

if __name__ == "__main__":
    main()
