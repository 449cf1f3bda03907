"""How well scores say what the model needs: parts taken away, and answers that are known."""

from depass_lightning.faithfulness.accuracy import answered_right
from depass_lightning.faithfulness.component_masking import MASKED, MaskingCurves, masking_curves
from depass_lightning.faithfulness.evidence import Evidence, evidence_found
from depass_lightning.faithfulness.metrics import CurveMean, CurvesMean, PromptMean, PromptsMean
from depass_lightning.faithfulness.summary import (
    masking_metrics,
    number_metrics,
    removal_metrics,
    summarise,
)
from depass_lightning.faithfulness.token_removal import (
    PERCENTS,
    RATIONALES,
    RemovalCurves,
    area,
    check_percents,
    removal_curves,
    text_components,
)
from depass_lightning.utils.bootstrap import Interval, bootstrap

__all__ = [
    "MASKED",
    "PERCENTS",
    "RATIONALES",
    "CurveMean",
    "CurvesMean",
    "Evidence",
    "Interval",
    "MaskingCurves",
    "PromptMean",
    "PromptsMean",
    "RemovalCurves",
    "answered_right",
    "area",
    "bootstrap",
    "check_percents",
    "evidence_found",
    "masking_curves",
    "masking_metrics",
    "number_metrics",
    "removal_curves",
    "removal_metrics",
    "summarise",
    "text_components",
]
