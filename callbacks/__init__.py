"""Lightning callbacks: attributions while a model trains, and around `Trainer.predict`."""

from depass_lightning.callbacks.component_parallel import ComponentParallelCallback
from depass_lightning.callbacks.depass import DePassCallback
from depass_lightning.callbacks.prediction_writer import AttributionWriter
from depass_lightning.callbacks.process_monitor import ProcessMonitor
from depass_lightning.callbacks.progress_bar import AttributionProgress

__all__ = [
    "AttributionProgress",
    "AttributionWriter",
    "ComponentParallelCallback",
    "DePassCallback",
    "ProcessMonitor",
]
