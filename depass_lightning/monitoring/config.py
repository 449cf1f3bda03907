"""What the callback splits states into, by name or as it is, and whether a model can be asked so."""

from collections.abc import Mapping, Sequence
from typing import Any

from depass_lightning.attribution.settings import RuleOptions, settings_of
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.sources import Heads, Module, Neurons, Source, Spans, Tokens

SourceLike = Source | str
Sources = SourceLike | Sequence[SourceLike] | Mapping[str, SourceLike] | None

# What `analyze.py source=` takes by these names, unless it is told more.
NAMED: dict[str, Source] = {
    "tokens": Tokens(),
    "spans": Spans("word"),
    "heads": Heads(),
    "modules": Module("attention"),
    "neurons": Neurons(-2),
}


def name_sources(source: Sources) -> dict[str, Source]:
    """Give every source its name: a mapping's key, or what kind of source it is.

    Args:
        source: one, several in a list or by names of one's own; each a `Source` or a name in `NAMED`.

    Raises:
        DePassError: a name or an object that is no source, none at all, or two of one name.
    """
    if source is None or isinstance(source, Source | str):
        given: list[tuple[str | None, Any]] = [(None, "tokens" if source is None else source)]
    elif isinstance(source, Mapping):
        given = list(source.items())
    else:
        given = [(None, own) for own in source]
    named: dict[str, Source] = {}
    for name, own in given:
        resolved = _source(own)
        name = name or (own if isinstance(own, str) else resolved.kind)
        if name in named:
            raise DePassError(
                f"two sources are both called {name!r}; name them, as in source={{'early': Tokens(2), ...}}"
            )
        named[name] = resolved
    if not named:
        raise DePassError("source is empty; give at least one, such as 'tokens'")
    return named


def check_settings(depass: DePass, sources: Sequence[Source], settings: RuleOptions) -> None:
    """Refuse settings that could attribute no probe, before training begins.

    Raises:
        DePassError: a setting is unknown, two do not go together, or the model has no such layer.
    """
    settings_of(depass.decoder, sources, **settings)


def _source(own: Any) -> Source:
    if isinstance(own, Source):
        return own
    if isinstance(own, str) and own in NAMED:
        return NAMED[own]
    hint = "; give load_subspace(path, layer)" if own == "subspace" else ""
    raise DePassError(f"source {own!r} is none of {', '.join(NAMED)}, and no Source either{hint}")
