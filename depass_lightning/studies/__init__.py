"""The paper's experiments: what each runs, and one way to write down what it found."""

from depass_lightning.studies.study_files import read_experiment, terminal_table, write_experiment
from depass_lightning.studies.study_result import Cloud, Curve, Panel, StudyResult

__all__ = [
    "Cloud",
    "Curve",
    "Panel",
    "StudyResult",
    "read_experiment",
    "terminal_table",
    "write_experiment",
]
