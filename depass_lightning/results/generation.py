"""Every token of a generated text, explained by all tokens before it."""

from dataclasses import dataclass

from typing_extensions import override

from depass_lightning.results.attributions import Attributions


@dataclass(frozen=True, eq=False, repr=False)
class Generation(Attributions):
    """The scores of all tokens of a finished text for each of its generated tokens.

    A generated token's scores are zero at its own position and after it.

    Attributes:
        attributions: one per generated token, in order, each over the whole finished text.
        decoded: the generated tokens decoded together; None without a tokenizer, and for attributions that
            were read from a file.
    """

    decoded: str | None = None

    def __repr__(self) -> str:
        return f"Generation({self.continuation!r}, {len(self)} tokens over {len(self.tokens)})"

    @property
    @override
    def first_generated(self) -> int:
        return len(self.tokens) - len(self)

    @property
    def generated(self) -> list[str]:
        """The text of each generated token, the end-of-text token included."""
        return self.tokens[self.first_generated :]

    @property
    def continuation(self) -> str:
        """The generated tokens as one text, decoded together: several may encode one character."""
        return "".join(self.generated) if self.decoded is None else self.decoded

    def _title(self) -> str:
        text = self.continuation
        return f"What the model bases {text if len(text) < 60 else text[:58] + '…'!r} on"
