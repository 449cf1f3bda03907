"""Linear probes on the residual stream: trained, kept, explained as targets, and split along as sources."""

from depass_lightning.linear_probes.probe import Fit, LinearProbe, train_probe
from depass_lightning.linear_probes.states import hidden_states, spread
from depass_lightning.linear_probes.training import Probes, fit_probes, train_probes

__all__ = [
    "Fit",
    "LinearProbe",
    "Probes",
    "fit_probes",
    "hidden_states",
    "spread",
    "train_probe",
    "train_probes",
]
