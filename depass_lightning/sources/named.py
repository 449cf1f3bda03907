"""Sources by their names on the command line."""

from depass_lightning.errors import DePassError, suggested
from depass_lightning.sources.base import Source
from depass_lightning.sources.sublayers import Heads, Module, Neurons
from depass_lightning.sources.tokens import Spans, Tokens

SOURCES: dict[str, Source] = {
    "tokens": Tokens(),
    "spans": Spans("word"),
    "turns": Spans("turn"),
    "documents": Spans("sentence"),
    "heads": Heads(),
    "modules": Module("attention"),
    "neurons": Neurons(-2),
}


def as_source(source: Source | str | None) -> Source:
    """Return the source with a name, or `Tokens()` for None; a source is returned unchanged.

    Args:
        source: the source, one of the names `SOURCES`, or None.

    Raises:
        DePassError: there is no source of this name.
    """
    if source is None:
        return Tokens()
    if not isinstance(source, str):
        return source
    if source not in SOURCES:
        raise DePassError(f"source '{source}' is unknown{suggested(source, SOURCES)}")
    return SOURCES[source]
