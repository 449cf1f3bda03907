"""The error that the library raises on bad input, and its warning."""


class DePassError(ValueError):
    """Say what is wrong with something the caller gave, and what to give instead.

    Everything that this library refuses is refused with this class or a subclass of it, so that a caller can
    tell a mistake in the input from a fault in the code. Code that catches `ValueError` catches it too.
    """


def reason_of(error: Exception) -> str:
    """Return what an error says, with its class where that is not `DePassError`.

    Args:
        error: the error.
    """
    reason = str(error) if isinstance(error, DePassError) else f"{type(error).__name__}: {error}"
    return reason.encode(errors="backslashreplace").decode()  # it may quote what no file can hold


class DePassWarning(UserWarning):
    """Say why a result may not mean what it seems to mean."""
