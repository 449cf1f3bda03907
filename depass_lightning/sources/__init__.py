"""Sources: what a state is split into before it is propagated through the rest of the model."""

from depass_lightning.sources.base import Source, SplitContext, resolve_layer
from depass_lightning.sources.named import as_source
from depass_lightning.sources.sublayers import Heads, Module, Neurons
from depass_lightning.sources.subspaces import Components, Subspace, load_subspace
from depass_lightning.sources.tokens import Spans, Tokens

__all__ = [
    "Components",
    "Heads",
    "Module",
    "Neurons",
    "Source",
    "Spans",
    "SplitContext",
    "Subspace",
    "Tokens",
    "as_source",
    "load_subspace",
    "resolve_layer",
]
