"""Attribution methods with one interface; DePass is one of them."""

import inspect
from typing import Any

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.attention_weights import AttentionRollout, LastLayerAttention, MeanAttention
from depass_lightning.methods.base import Baseline, Method
from depass_lightning.methods.depass_rules import Calibrated, DePassMethod, under
from depass_lightning.methods.gradients import GradientNorm, GradientShap, InputGradient, IntegratedGradients
from depass_lightning.methods.information_flow import InformationFlow
from depass_lightning.methods.occlusion import Occlusion
from depass_lightning.methods.patching import AttributionPatching
from depass_lightning.methods.random_scores import Random, RandomLastFirst
from depass_lightning.methods.reagent import ReAGent
from depass_lightning.methods.sizes import Activation, Norm
from depass_lightning.methods.token_subsets import ContextCite, Lime, Shapley
from depass_lightning.methods.value_zeroing import ValueZeroing
from depass_lightning.sources import Source

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        DePassMethod,
        *map(under, ("taylor", "half", "shap", "dual")),
        Calibrated,
        InputGradient,
        GradientNorm,
        IntegratedGradients,
        GradientShap,
        MeanAttention,
        LastLayerAttention,
        AttentionRollout,
        ValueZeroing,
        InformationFlow,
        Occlusion,
        Shapley,
        Lime,
        ContextCite,
        ReAGent,
        AttributionPatching,
        Norm,
        Activation,
        Random,
        RandomLastFirst,
    )
}
"""Every method by its name."""


def make_method(name: str, depass: DePass, source: Source | None = None, **options: Any) -> Method:
    """Return a method by its name.

    Args:
        name: one of `METHODS`.
        depass: the model, with its tokenizer.
        source: the components that are scored; by default the method's own.
        options: what else the method takes, such as `steps` for integrated_gradients; for DePass's own rules
            what `DePass.attribute` takes.

    Raises:
        DePassError: there is no such method or option, or the method does not score such components.
    """
    if name not in METHODS:
        raise DePassError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    if issubclass(method, Baseline):
        known = [
            parameter
            for parameter in inspect.signature(method).parameters
            if parameter not in ("depass", "source")
        ]
        for option in options:
            if option not in known:
                raise DePassError(
                    f"{method.name} has no option {option!r}; it takes {', '.join(known) or 'none'}"
                )
    return method(depass, source, **options)


__all__ = [
    "METHODS",
    "Activation",
    "AttentionRollout",
    "AttributionPatching",
    "Baseline",
    "Calibrated",
    "ContextCite",
    "DePassMethod",
    "GradientNorm",
    "GradientShap",
    "InformationFlow",
    "InputGradient",
    "IntegratedGradients",
    "LastLayerAttention",
    "Lime",
    "MeanAttention",
    "Method",
    "Norm",
    "Occlusion",
    "Random",
    "RandomLastFirst",
    "ReAGent",
    "Shapley",
    "ValueZeroing",
    "make_method",
]
