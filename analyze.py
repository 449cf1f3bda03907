"""Attribute the prompts of a task: `python analyze.py --help`."""

from depass_lightning.commands.analyze import main

if __name__ == "__main__":
    main()
