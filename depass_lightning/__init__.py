"""What does a language model base its answer on? Decomposed forward passes, for Lightning."""

from pathlib import Path

__version__ = "0.1.0.dev0"

# In a bare checkout callbacks/ and conf/ stand beside the package, not inside it.
if (_root := Path(__file__).resolve().parent.parent).joinpath("callbacks", "__init__.py").is_file():
    __path__.append(str(_root))

from depass_lightning.attribution.cost import Estimate
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError, DePassWarning
from depass_lightning.models.families import register_family
from depass_lightning.models.spec import AttentionSpec, ExpertsSpec, FamilySpec, MLPSpec
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.results.decomposition import Decomposition
from depass_lightning.results.generation import Generation
from depass_lightning.sources import Components, Heads, Module, Neurons, Spans, Subspace, Tokens
from depass_lightning.targets import Contrast, Direction, ProbeLogit, Token

__all__ = [
    "AttentionSpec",
    "Attribution",
    "Attributions",
    "Components",
    "Contrast",
    "DePass",
    "DePassError",
    "DePassWarning",
    "Decomposition",
    "Direction",
    "Estimate",
    "ExpertsSpec",
    "FamilySpec",
    "Generation",
    "Heads",
    "MLPSpec",
    "Module",
    "Neurons",
    "ProbeLogit",
    "Spans",
    "Subspace",
    "Token",
    "Tokens",
    "__version__",
    "register_family",
]
