"""The colours of scores: blue supports the target, orange opposes it.

The pair is distinguishable with every common kind of colour blindness, and by lightness alone in print.
"""

from dataclasses import dataclass

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """The colours of a light or a dark background.

    Attributes:
        ground: the background.
        ink: text.
        muted: secondary text.
        line: thin rules, and tokens without a score.
        positive: the largest supporting score.
        negative: the largest opposing score.
    """

    ground: Colour
    ink: Colour
    muted: Colour
    line: Colour
    positive: Colour
    negative: Colour


LIGHT = Theme((255, 255, 255), (24, 27, 33), (92, 99, 112), (223, 226, 231), (30, 84, 214), (214, 84, 20))
DARK = Theme((22, 25, 31), (236, 238, 242), (158, 166, 180), (54, 60, 71), (92, 148, 255), (255, 132, 66))


def hexadecimal(colour: Colour) -> str:
    """Return a colour as HTML writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def mixed(one: Colour, other: Colour, part: float) -> Colour:
    """Return the mixture of two colours; `part` is the second one's, from 0 to 1."""
    r, g, b = (round(a + (c - a) * part) for a, c in zip(one, other, strict=True))
    return r, g, b


def shade(theme: Theme, strength: float) -> Colour:
    """Return the colour of a score on a theme's background.

    Args:
        theme: light or dark.
        strength: the score relative to the largest, from -1 to 1.
    """
    full = theme.positive if strength > 0 else theme.negative
    return mixed(theme.ground, full, min(abs(strength), 1.0))


def ink(ground: Colour) -> Colour:
    """Return near black or white, whichever has more contrast with a background (at least 4.5 to 1)."""
    channels = ((c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in ground)
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    return (255, 255, 255) if luminance < 0.18 else (14, 16, 20)


def css_variables(theme: Theme) -> str:
    """Return a theme as CSS variables, without braces."""
    return " ".join(f"--{name}: {hexadecimal(colour)};" for name, colour in vars(theme).items())
