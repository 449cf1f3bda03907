"""Lightning callbacks: attributions while a model trains, and what `Trainer.predict` attributes, on disk."""

from depass_lightning.callbacks.depass import DePassCallback
from depass_lightning.callbacks.progress import AttributionProgress
from depass_lightning.callbacks.spread import SpreadComponents
from depass_lightning.callbacks.watch import ProcessWatch
from depass_lightning.callbacks.writer import AttributionWriter

__all__ = ["AttributionProgress", "AttributionWriter", "DePassCallback", "ProcessWatch", "SpreadComponents"]
