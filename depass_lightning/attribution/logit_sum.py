"""One token's target as a weighted sum of logits at one position: its token ids, weights, value and name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.errors import DePassError
from depass_lightning.targets import Contrast, LogitTarget, LogOdds, LogProb, Token

LISTED = 3  # alternatives of a log-odds target, in its name


def finite(value: float, name: str) -> float:
    """Return a target's value if it is finite.

    Raises:
        DePassError: the value is infinite or NaN, so no scores can sum to it.
    """
    if not math.isfinite(value):
        raise DePassError(
            f"the model's value of the target {name} is {value}: it rules the token out; choose another "
            "target"
        )
    return value


def target_ids(
    target: LogitTarget, prompt: str | None, names: OutputNames, predicted: int | None = None
) -> list[int] | None:
    """Return the id of a target's token, and after it those of the tokens that it is compared with.

    Args:
        target: the target.
        prompt: the prompt up to the target's position; None if it was passed as ids.
        names: the model's tokens or labels.
        predicted: the model's most likely next token, if it is known.

    Returns:
        The ids; None for the model's most likely next token if that is not known.

    Raises:
        DePassError: a token is compared with itself, alternatives are missing or repeated, or there is
            no such token or label.
    """

    def resolve(token: str | int) -> int:
        return names.id_of(token, prompt, first=target.first)

    token = predicted if target.token is None else resolve(target.token)
    others: list[int] = []
    if isinstance(target, Contrast):
        others = [resolve(target.foil)]
        shown = f"Contrast({target.token!r}, {target.foil!r})"
    elif isinstance(target, LogOdds) and target.against is not None:
        if isinstance(target.against, str) or not isinstance(target.against, Sequence) or not target.against:
            raise DePassError(
                f"LogOdds: against is {target.against!r}; give a list of at least one token, or None for all "
                "others"
            )
        others = [resolve(other) for other in target.against]
        shown = f"LogOdds({target.token!r}, against={list(target.against)!r})"
    else:
        return None if token is None else [token]
    if token in others:
        raise DePassError(f"{shown} compares a token with itself; explain Token alone")
    if len(set(others)) < len(others):
        raise DePassError(f"{shown} names a token twice; give each alternative once")
    return None if token is None else [token, *others]


@dataclass(frozen=True)
class LogitSum:
    """A target as a weighted sum of logits, with constant weights.

    Args:
        tokens: `[token]` ids.
        weights: `[token]` each logit's weight.
    """

    tokens: Int[Tensor, "token"]
    weights: Float[Tensor, "token"]

    @classmethod
    def of(cls, target: LogitTarget, ids: list[int], logits: Float[Tensor, "vocabulary"]) -> "LogitSum":
        """Return the weights of a target.

        Args:
            target: the target.
            ids: its tokens, as `target_ids` finds them.
            logits: the model's own logits at its position; minus infinity rules a token out.
        """
        tokens = torch.tensor(ids, device=logits.device)
        if isinstance(target, Contrast):
            return cls(tokens, logits.new_tensor([1.0, -1.0]))
        if isinstance(target, Token) and not target.centred:
            return cls(tokens, logits.new_ones(1))
        others, weights = cls._others(target, ids, logits)
        # A log-probability's gradient is 1 - p_y at the token itself, the others' total weight.
        first = weights.sum() if isinstance(target, LogProb) else weights.new_ones(())
        return cls(torch.cat([tokens[:1], others]), torch.cat([first[None], -weights]))

    @classmethod
    def _others(
        cls, target: LogitTarget, ids: list[int], logits: Float[Tensor, "vocabulary"]
    ) -> tuple[Int[Tensor, "token"], Float[Tensor, "token"]]:
        """Return the tokens that a target's token is compared with, and how much each counts."""
        possible = torch.isfinite(logits)
        if isinstance(target, Token):  # centred: the mean of all, the token itself included
            others = possible.nonzero()[:, 0]
            return others, logits.new_full((len(others),), 1 / len(others))
        possible[ids[0]] = False
        others = possible.nonzero()[:, 0]
        if len(ids) > 1:
            alternatives = torch.tensor(ids[1:], device=logits.device)
            others = alternatives[possible[alternatives]]
        exact = logits.double()
        if isinstance(target, LogProb):
            weights = exact.softmax(0)[others].to(logits)
        else:
            # A softmax over the others alone is p_v / (1 - p_y), however close p_y is to one.
            weights = exact[others].softmax(0).to(logits)
        return others[weights > 0], weights[weights > 0]

    def value(self, logits: Float[Tensor, "vocabulary"]) -> float:
        """Return the sum."""
        return float(self.weights.to(logits) @ logits[self.tokens.to(logits.device)])


def true_value(target: LogitTarget, ids: list[int], logits: Float[Tensor, "vocabulary"]) -> float | None:
    """Return the log-probability or log-odds that a target's value is the linear part of.

    Returns:
        The number in nats; None for a target that is linear in the logits.
    """
    exact = logits.double()
    if isinstance(target, LogProb):
        return float(exact[ids[0]] - exact.logsumexp(0))
    if not isinstance(target, LogOdds):
        return None
    others = exact[ids[1:]] if len(ids) > 1 else torch.cat([exact[: ids[0]], exact[ids[0] + 1 :]])
    return float(exact[ids[0]] - others.logsumexp(0))


def target_name(target: LogitTarget, ids: list[int], names: OutputNames) -> str:
    """Return the name of a target in results."""
    token, *others = (repr(names.text_of(token)) for token in ids)
    if isinstance(target, Contrast):
        return f"{token} − {others[0]}"
    if isinstance(target, Token):
        return f"{token} − mean logit" if target.centred else token
    if isinstance(target, LogProb):
        return f"linear log-probability of {token}"
    rest = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
    return f"linear log-odds of {token}" + (f" against {', '.join(others[:LISTED])}{rest}" if others else "")
