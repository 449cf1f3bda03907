"""What does a language model base its answer on? Decomposed forward passes, for Lightning.

Imports run one way, from the first of these to the last:

    errors, utils -> models -> engine -> prompts, targets, sources -> results -> attribution -> depass
    -> logit_lens, tasks, methods, faithfulness, linear_probes, storage, reports
    -> studies, modules, monitoring -> callbacks, integrations, commands

One import runs the other way: `results` import `reports` when something is drawn.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from depass_lightning.attribution.cost import Estimate
    from depass_lightning.depass import DePass
    from depass_lightning.errors import DePassError, DePassWarning
    from depass_lightning.models.families import register_family
    from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec, ModelSpec
    from depass_lightning.results.attribution import Attribution
    from depass_lightning.results.attributions import Attributions
    from depass_lightning.results.circuit import Circuit
    from depass_lightning.results.component import Decomposition
    from depass_lightning.results.generation import Generation
    from depass_lightning.sources import Components, Heads, Module, Neurons, Spans, Subspace, Tokens
    from depass_lightning.targets import (
        Continuation,
        Contrast,
        Direction,
        Label,
        LogOdds,
        LogProb,
        Masked,
        Preference,
        ProbeLogit,
        Reward,
        Similarity,
        Token,
    )
    from depass_lightning.utils.sections import Conversation, Documents

__all__ = [
    "AttentionSpec",
    "Attribution",
    "Attributions",
    "Circuit",
    "Components",
    "Continuation",
    "Contrast",
    "Conversation",
    "DePass",
    "DePassError",
    "DePassWarning",
    "Decomposition",
    "Direction",
    "Documents",
    "Estimate",
    "ExpertsSpec",
    "FamilySpec",
    "Generation",
    "Heads",
    "Label",
    "LogOdds",
    "LogProb",
    "MLPSpec",
    "Masked",
    "ModelSpec",
    "Module",
    "Neurons",
    "Preference",
    "ProbeLogit",
    "Reward",
    "Similarity",
    "Spans",
    "Subspace",
    "Token",
    "Tokens",
    "__version__",
    "register_family",
]


# The public names by module. Most modules import torch, so each is imported when a name is first used.
_MODULES = {
    "attribution.cost": "Estimate",
    "depass": "DePass",
    "errors": "DePassError DePassWarning",
    "models.families": "register_family",
    "models.spec": "AttentionSpec ExpertsSpec FamilySpec MLPSpec ModelSpec",
    "results.attribution": "Attribution",
    "results.attributions": "Attributions",
    "results.circuit": "Circuit",
    "results.component": "Decomposition",
    "results.generation": "Generation",
    "sources": "Components Heads Module Neurons Spans Subspace Tokens",
    "targets": "Continuation Contrast Direction Label LogOdds LogProb Masked Preference ProbeLogit "
    "Reward Similarity Token",
    "utils.sections": "Conversation Documents",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used first.

    Args:
        name: the name.
    """
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})


class _Checkout:
    """Finds `callbacks` and `conf`, which are inside the package only when it is installed."""

    root = Path(__file__).resolve().parent.parent
    folders = ("callbacks", "conf")

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        """Find one of the two packages in a checkout.

        Args:
            name: the full name of any module.
        """
        folder = name.removeprefix(f"{__name__}.")
        if folder == name or folder not in cls.folders:
            return None
        path = cls.root / folder
        return spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])


if (_Checkout.root / "callbacks" / "__init__.py").is_file():
    sys.meta_path.insert(0, _Checkout)
