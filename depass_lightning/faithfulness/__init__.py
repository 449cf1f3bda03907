"""How well scores say what the model needs: tokens taken away, and answers that are known."""

from depass_lightning.faithfulness.evidence import Evidence, evidence_found
from depass_lightning.faithfulness.removal import (
    PERCENTS,
    RemovalCurves,
    area,
    check_percents,
    removal_curves,
    text_components,
)
from depass_lightning.faithfulness.summary import summarise

__all__ = [
    "PERCENTS",
    "Evidence",
    "RemovalCurves",
    "area",
    "check_percents",
    "evidence_found",
    "removal_curves",
    "summarise",
    "text_components",
]
