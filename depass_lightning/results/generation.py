"""Every token of a generated or given text, explained by all tokens before it."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from depass_lightning.errors import DePassError
from depass_lightning.results.attribution import Attribution
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

    def trace(self, tokens: slice | None = None, hops: int | None = None) -> Attribution:
        """Attribute an answer to the prompt through the generated text that it relies on.

        In each hop, the score of every generated token is divided among the components that support that
        token, in proportion to their positive scores in its row; it keeps its sign. Where nothing supports a
        token, its score stays. No hop changes the sum, and none needs a further pass. In FlashTrace (Pan et
        al., arXiv 2602.01914) a hop is a pass that explains all reasoning tokens as one weighted target, and
        scores are shares that need not sum to it.

        Args:
            tokens: the generated tokens that are the answer, such as `slice(-3, None)`; None for all.
            hops: the largest number of hops; None goes on until no score is left to move.

        Returns:
            The answer's attribution: its value is the sum of the tokens' values, and `metadata["hops"]` lists
            the absolute score that each hop moved.

        Raises:
            DePassError: no token is selected, or `hops` is negative.
        """
        selected = sorted(range(len(self))[slice(None) if tokens is None else tokens])
        if not selected:
            raise DePassError(f"tokens={tokens} selects none of the {len(self)} generated tokens")
        if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int) or hops < 0):
            raise DePassError(f"hops is {hops!r}; it must be a whole number of at least 0, or None for all")
        rows = self.scores.double()
        scores, moved = _passed_on(rows, rows[selected].sum(0), self._columns(), hops)
        chosen = [self[index] for index in selected]
        remainders = [row.remainder for row in chosen if row.remainder is not None]
        return replace(
            chosen[-1],
            scores=scores,
            value=sum(row.value for row in chosen),
            target=", ".join(row.target for row in chosen[:3]) + (", ..." if len(chosen) > 3 else ""),
            probability=None,
            rank=None,
            remainder=sum(remainders) if remainders else None,
            target_ids=[],
            metadata=chosen[-1].metadata | {"hops": moved},
        )

    def _columns(self) -> list[int]:
        """Return the component that each generated token is."""
        by_position = {span[0]: i for i, span in enumerate(self[0].positions) if span is not None}
        return [by_position[position] for position in range(self.first_generated, len(self.tokens))]

    def _title(self) -> str:
        text = self.continuation
        return f"What the model relies on for {text if len(text) < 60 else text[:58] + '…'!r}"


def _passed_on(
    rows: Float[Tensor, "generated component"],
    scores: Float[Tensor, "component"],
    columns: list[int],
    hops: int | None,
) -> tuple[Float[Tensor, "component"], list[float]]:
    """Pass generated tokens' scores on to what supports them; return also the score that each hop moved."""
    positive = rows.clamp(min=0)
    total = positive.sum(1, keepdim=True)
    supported = total[:, 0] > 0
    shares = positive / torch.where(total > 0, total, 1.0)  # [generated, component]
    moved: list[float] = []
    # A token is supported by earlier ones alone: after as many hops as there are tokens nothing is left.
    while hops is None or len(moved) < hops:
        amounts = torch.where(supported, scores[columns], 0.0)  # [generated]
        if not bool(amounts.any()):
            break
        scores = scores.clone()
        scores[columns] -= amounts
        scores += amounts @ shares
        moved.append(float(amounts.abs().sum()))
    return scores, moved
