"""The error that the library raises on bad input, and its warning."""

import difflib
from collections.abc import Iterable


class DePassError(ValueError):
    """An error in what the caller passed: names what is wrong and what to pass instead.

    All input errors of this library are of this class or a subclass, which distinguishes them from bugs.
    Code that catches `ValueError` catches them too.
    """


def reason_of(error: Exception) -> str:
    """Return an error's message, with its class where that is not `DePassError`."""
    reason = str(error) if isinstance(error, DePassError) else f"{type(error).__name__}: {error}"
    return reason.encode(errors="backslashreplace").decode()  # it may quote what no file can hold


def suggested(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the most similar known name, or all of them."""
    names = list(map(str, known))
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names) or 'none'}"


class DePassWarning(UserWarning):
    """A warning that a result may be misleading, with the reason."""
