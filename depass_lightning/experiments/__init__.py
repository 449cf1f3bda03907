"""The paper's experiments: what each runs, and one way to write down what it found."""

from depass_lightning.experiments.experiment import Cloud, Curve, Experiment, Panel
from depass_lightning.experiments.results import read_experiment, terminal_table, write_experiment

__all__ = [
    "Cloud",
    "Curve",
    "Experiment",
    "Panel",
    "read_experiment",
    "terminal_table",
    "write_experiment",
]
