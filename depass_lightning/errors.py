"""The error that the library raises on bad input."""


class DePassError(ValueError):
    """Say what is wrong with something the caller gave, and what to give instead.

    Everything that this library refuses is refused with this class or a subclass of it, so that a caller can
    tell a mistake in the input from a fault in the code. Code that catches `ValueError` catches it too.
    """
