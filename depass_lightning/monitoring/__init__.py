"""Attributions of held-out probes while a model trains, for any training loop."""

from depass_lightning.monitoring.monitor import MonitorResult, ProbeMonitor
from depass_lightning.monitoring.sinks import FunctionSink, MLflowSink, Sink, TensorBoardSink, WandbSink

__all__ = [
    "FunctionSink",
    "MLflowSink",
    "MonitorResult",
    "ProbeMonitor",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
]
