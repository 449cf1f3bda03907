"""Linear probes on the residual stream: trained, kept, explained as targets, and split along as sources."""

from depass_lightning.probes.probe import Fit, Probe, train_probe
from depass_lightning.probes.states import hidden_states, spread
from depass_lightning.probes.train import Probes, fit_probes, train_probes

__all__ = ["Fit", "Probe", "Probes", "fit_probes", "hidden_states", "spread", "train_probe", "train_probes"]
