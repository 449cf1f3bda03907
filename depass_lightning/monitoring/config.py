"""The callback's sources, by name or as objects, and whether they and the settings suit the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from depass_lightning.attribution.attribute import settings_by_rule
from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.sources import Heads, Module, Neurons, Source, Spans, Tokens

SourceLike = Source | str
Sources = SourceLike | Sequence[SourceLike] | Mapping[str, SourceLike] | None

# The sources that `analyze.py source=` has under these names.
NAMED: dict[str, Source] = {
    "tokens": Tokens(),
    "spans": Spans("word"),
    "turns": Spans("turn"),
    "documents": Spans("sentence"),
    "heads": Heads(),
    "modules": Module("attention"),
    "neurons": Neurons(-2),
}


def name_sources(source: Sources) -> dict[str, Source]:
    """Return the sources by name: a mapping's key, or the kind of source.

    Args:
        source: a `Source` or a name in `NAMED`, or several in a list or a mapping from names.

    Raises:
        DePassError: a name is unknown, an object is not a source, there are none, or two have one name.
    """
    if source is None or isinstance(source, Source | str):
        entries: list[tuple[str | None, Any]] = [(None, "tokens" if source is None else source)]
    elif isinstance(source, Mapping):
        entries = list(source.items())
    else:
        entries = [(None, entry) for entry in source]
    named: dict[str, Source] = {}
    for name, entry in entries:
        resolved = _source(entry)
        name = name or (entry if isinstance(entry, str) else resolved.kind)
        if name in named:
            raise DePassError(
                f"two sources are both called {name!r}; name them, as in source={{'early': Tokens(2), ...}}"
            )
        named[name] = resolved
    if not named:
        raise DePassError("source is empty; give at least one, such as 'tokens'")
    return named


def fitting(depass: DePass, sources: Sequence[Source]) -> list[Source]:
    """Return the sources for a model: on a hybrid, "modules" is what mixes positions in every block.

    Args:
        depass: the model.
        sources: results of `name_sources`.
    """
    hybrid = any(block.attention.mixer is not None for block in depass.decoder.blocks)
    return [Module("mixer") if hybrid and source is NAMED["modules"] else source for source in sources]


def check_settings(depass: DePass, sources: Sequence[Source], settings: RuleOptions) -> None:
    """Check, before training begins, that settings suit the model.

    Args:
        depass: the model.
        sources: what states are split into.
        settings: the rule and other settings of `DePass.attribute`.

    Raises:
        DePassError: a setting is unknown, two exclude each other, or the model has no such layer.
    """
    settings_by_rule(depass.decoder, sources, **settings)


def _source(entry: Any) -> Source:
    if isinstance(entry, Source):
        return entry
    if isinstance(entry, str) and entry in NAMED:
        return NAMED[entry]
    hint = "; give load_subspace(path, layer)" if entry == "subspace" else ""
    raise DePassError(f"source {entry!r} is none of {', '.join(NAMED)}, and no Source either{hint}")
