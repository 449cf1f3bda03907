"""Which rule `rule="auto"` takes for a source (docs/which-rule.md has the evidence)."""

import logging
from typing import Literal
from weakref import WeakKeyDictionary

import torch

from depass_lightning.engine.control import through_scores
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.record import record
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.sources import Heads, Source

log = logging.getLogger(__name__)

Automatic = Literal["auto"]
AUTO: Automatic = "auto"

_followed: WeakKeyDictionary[Decoder, bool] = WeakKeyDictionary()


def automatic_rule(
    decoder: Decoder,
    source: Source,
    compat: str | None = None,
    engine: str = "auto",
    attention_path: str = "content",
) -> str:
    """Return the name of the rule that `rule="auto"` takes.

    It is `shap` for heads, whose effect runs through queries and keys too, and `half` for everything else,
    whatever the target. Some settings determine the rule: `softmax` for the published code and for
    `Neurons(top=)`, `taylor` for the control path, and `half` for heads that are propagated forward. It is
    also `half` for heads of a model whose queries and keys `shap` cannot follow.

    Args:
        decoder: the model.
        source: what the state is split into.
        compat: `paper_code`, or None.
        engine: auto, propagate or adjoint.
        attention_path: content or control.
    """
    if compat is not None or source.top is not None:
        return "softmax"
    if attention_path == "control":
        return "taylor"
    through = isinstance(source, Heads) and engine != "propagate"
    return "shap" if through and _follows_scores(decoder) else "half"


def _follows_scores(decoder: Decoder) -> bool:
    """Try, once a model, on two tokens, whether `shap` can follow queries and keys; if not, log why."""
    if decoder not in _followed:
        # in the middle of the vocabulary: padding is at an end of it
        ids = torch.full((1, 2), decoder.vocabulary_size // 2, device=decoder.device)
        last = torch.ones_like(ids[:, :1])
        with alone(decoder.model):
            recording = record(decoder, ids, last[0] + 1, last)
            try:
                for layer in range(recording.layers):
                    attention = recording.block(layer).attention
                    if attention.has_scores:
                        through_scores(decoder, attention, [recording.state(layer)], mean=True)
                _followed[decoder] = True
            except DePassError as error:
                log.warning("rule='auto' takes 'half' for heads of %s: %s", decoder.name, error)
                _followed[decoder] = False
    return _followed[decoder]
