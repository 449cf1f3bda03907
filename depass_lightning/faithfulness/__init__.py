"""How faithful scores are: ablations of tokens, heads and neurons, and known evidence."""

from depass_lightning.faithfulness.ablation_agreement import AblationAgreement, Agreement, agreement
from depass_lightning.faithfulness.accuracy import answered_right
from depass_lightning.faithfulness.circuits import circuit_scores, circuit_values
from depass_lightning.faithfulness.citation_removal import CitationRemoval
from depass_lightning.faithfulness.component_masking import (
    MASKED,
    ComponentMasking,
    MaskingCurves,
    masking_curves,
)
from depass_lightning.faithfulness.datamodeling import LinearDatamodeling
from depass_lightning.faithfulness.evaluate import (
    KEPT_MEASURES,
    ROW_MEASURES,
    Case,
    Columns,
    Measure,
    ScoreMeasure,
    evaluate,
)
from depass_lightning.faithfulness.evidence import Evidence, evidence_found, text_components
from depass_lightning.faithfulness.metrics import CurveMean, CurvesMean, PromptMean, PromptsMean
from depass_lightning.faithfulness.soft_removal import SoftRemoval
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
    TokenRemoval,
    area,
    check_percents,
    removal_curves,
)
from depass_lightning.faithfulness.true_ablation import ablation_effects
from depass_lightning.utils.bootstrap import Interval, bootstrap

__all__ = [
    "KEPT_MEASURES",
    "MASKED",
    "PERCENTS",
    "RATIONALES",
    "ROW_MEASURES",
    "AblationAgreement",
    "Agreement",
    "Case",
    "CitationRemoval",
    "Columns",
    "ComponentMasking",
    "CurveMean",
    "CurvesMean",
    "Evidence",
    "Interval",
    "LinearDatamodeling",
    "MaskingCurves",
    "Measure",
    "PromptMean",
    "PromptsMean",
    "RemovalCurves",
    "ScoreMeasure",
    "SoftRemoval",
    "TokenRemoval",
    "ablation_effects",
    "agreement",
    "answered_right",
    "area",
    "bootstrap",
    "check_percents",
    "circuit_scores",
    "circuit_values",
    "evaluate",
    "evidence_found",
    "masking_curves",
    "masking_metrics",
    "number_metrics",
    "removal_curves",
    "removal_metrics",
    "summarise",
    "text_components",
]
