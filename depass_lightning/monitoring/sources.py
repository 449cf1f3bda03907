"""The callback's sources, by name or as objects."""

from collections.abc import Mapping, Sequence
from typing import Any

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.sources import Module, Source
from depass_lightning.sources.named import SOURCES

SourceLike = Source | str
Sources = SourceLike | Sequence[SourceLike] | Mapping[str, SourceLike] | None


def name_sources(source: Sources) -> dict[str, Source]:
    """Return the sources by name: a mapping's key, or the kind of source.

    Args:
        source: a `Source` or a name in `SOURCES`, or several in a list or a mapping from names.

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
    """Return the sources for a model: on a hybrid, "modules" is the attention or linear mixer of every block.

    Args:
        depass: the model.
        sources: results of `name_sources`.
    """
    hybrid = any(block.attention.mixer is not None for block in depass.decoder.blocks)
    return [Module("mixer") if hybrid and source is SOURCES["modules"] else source for source in sources]


def _source(entry: Any) -> Source:
    if isinstance(entry, Source):
        return entry
    if isinstance(entry, str) and entry in SOURCES:
        return SOURCES[entry]
    hint = "; give load_subspace(path, layer)" if entry == "subspace" else ""
    raise DePassError(f"source {entry!r} is none of {', '.join(SOURCES)}, and no Source either{hint}")
