"""Attribute the prompts of a task: `python analyze.py --help`."""

from depass_lightning.commands.main import analyze

if __name__ == "__main__":
    analyze()
