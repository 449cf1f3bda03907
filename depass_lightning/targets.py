"""Targets: a token's logit or log-odds, a difference of logits, a direction or a probe's logit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.utils.tokenization import token_id, token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Token:
    """The logit of one token.

    Args:
        token: the token as text (with its leading space, as in `" Mary"`), as an id, or None for the
            model's most likely next token.
        position: the position whose next token is predicted; negative counts from the prompt's end.
        first: use the first token of a text of several tokens, for data sets with long answers.
        centred: subtract the mean logit of all tokens, which cancels what they have in common.
    """

    token: str | int | None = None
    position: int = -1
    first: bool = False
    centred: bool = False


@dataclass(frozen=True)
class Contrast:
    """The difference of two tokens' logits: why this one rather than that one.

    Args:
        token: the token to explain, as text or id.
        foil: the token to compare it with.
        position: the position whose next token is predicted; negative counts from the prompt's end.
        first: use the first tokens of texts of several tokens; they must differ.
    """

    token: str | int
    foil: str | int
    position: int = -1
    first: bool = False


@dataclass(frozen=True)
class LogOdds:
    """One token's logit in contrast to all others: why this token rather than what else is likely.

    The read-out is the gradient of the log-odds `log p_y / (1 - p_y)` at the model's own distribution `p`:
    `u = W_U[y] - sum_{v != y} p_v / (1 - p_y) W_U[v]`. The gradient of `log p_y` is `u` times `1 - p_y`. The
    value, which scores sum to, is the token's logit less the expected logit of the others: the log-odds plus
    the entropy of the others' distribution. If logits are soft-capped, `p` is that of the model, and the
    logits are those before the cap, as for the other targets.

    Args:
        token: the token as text or id, or None for the model's most likely next token.
        against: the alternatives, as text or ids, whose probabilities are renormalised; None for all others.
        position: the position whose next token is predicted; negative counts from the prompt's end.
        first: use the first tokens of texts of several tokens.
    """

    token: str | int | None = None
    against: Sequence[str | int] | None = None
    position: int = -1
    first: bool = False


@dataclass(frozen=True, eq=False)
class Direction:
    """The dot product of the residual stream with a direction, at one layer and position.

    Args:
        vector: `[hidden]` the direction; not normalised.
        layer: the block whose input is read; negative counts from the end; None for the output of the last
            block, before the final norm.
        position: the position that is read; negative counts from the prompt's end.
    """

    vector: Float[Tensor, "hidden"]
    layer: int | None = None
    position: int = -1


@dataclass(frozen=True, eq=False)
class ProbeLogit:
    """The logit of a linear probe on the residual stream, its intercept included.

    Args:
        probe: a fitted scikit-learn classifier with two classes (`coef_`, `intercept_`).
        layer: the block whose input the probe was fitted on; negative counts from the end; None for the
            output of the last block, before the final norm.
        position: the position that is read; negative counts from the prompt's end.
    """

    probe: Any
    layer: int | None = None
    position: int = -1


LogitTarget = Token | Contrast | LogOdds  # a weighted sum of logits
Target = LogitTarget | Direction | ProbeLogit
TargetLike = Target | str | int | None
AnswerTarget = Literal["contrast", "token", "centred", "log_odds"]  # how a known answer is explained


def answer_target(
    token: str | int | None, kind: AnswerTarget, position: int = -1, *, first: bool = False
) -> Token | LogOdds:
    """One token by itself, as a kind of target.

    Args:
        token: the token.
        kind: "token" (or "contrast", where there is no foil), "centred" or "log_odds".
        position: the position whose next token is predicted.
        first: use the first token of a text of several tokens.
    """
    if kind == "log_odds":
        return LogOdds(token, position=position, first=first)
    return Token(token, position, first, centred=kind == "centred")


def as_target(target: TargetLike) -> Target:
    """Convert text, an id or None to a `Token`; other targets are returned unchanged.

    Args:
        target: a target, a token's text or id, or None for the model's most likely next token.

    Raises:
        DePassError: the target is none of these.
    """
    if target is None or (isinstance(target, (str, int)) and not isinstance(target, bool)):
        return Token(target)
    if isinstance(target, LogitTarget | Direction | ProbeLogit):
        return target
    raise DePassError(
        f"target {target!r} is a {type(target).__name__}; pass a token's text or id, Token(...), "
        "Contrast(...), LogOdds(...), Direction(...), ProbeLogit(...), or None for the model's own next token"
    )


def as_targets(target: Any, prompts: int | None) -> list[Target | list[Target]]:
    """Return each prompt's target or list of targets.

    Args:
        target: one target for all prompts; a list with one target or one list of targets per prompt; for a
            single prompt also a list of its targets.
        prompts: the number of prompts; None for a single prompt.

    Raises:
        DePassError: a list is empty or has the wrong length, lists and single targets are mixed, or an entry
            is not a target.
    """
    if not isinstance(target, (list, tuple)):
        return [as_target(target)] * (prompts or 1)
    if prompts is None:
        return [_listed(target, "the list of targets")]
    if len(target) != prompts:
        raise DePassError(
            f"there are {len(target)} targets for {prompts} prompts; pass one per prompt, one for all, or a "
            "list of several for each prompt"
        )
    lists = [isinstance(entry, (list, tuple)) for entry in target]
    if not any(lists):
        return [as_target(entry) for entry in target]
    if not all(lists):
        raise DePassError(
            f"the target of prompt {lists.index(False)} is not a list, but others are; give each a list"
        )
    return [_listed(entry, f"the list of targets of prompt {index}") for index, entry in enumerate(target)]


def _listed(targets: Sequence[Any], name: str) -> list[Target]:
    if not targets:
        raise DePassError(f"{name} is empty; give at least one, or None for the model's own next token")
    return [as_target(entry) for entry in targets]


def inner_reading(target: Direction | ProbeLogit, hidden: int) -> tuple[Float[Tensor, "hidden"], float]:
    """Return the vector and the constant that read a target inside the model from a state.

    Args:
        target: the target.
        hidden: the size of the residual stream.

    Returns:
        The vector, `[hidden]`, and the constant added to its dot product with the state.

    Raises:
        DePassError: the vector has another size or is not finite, or the probe is not a binary linear one.
    """
    constant = 0.0
    if isinstance(target, Direction):
        what = "Direction"
        try:
            vector = torch.as_tensor(target.vector)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DePassError(f"{what}: vector is a {type(target.vector).__name__}, not numbers") from error
    else:
        what = f"ProbeLogit({type(target.probe).__name__})"
        if not hasattr(target.probe, "coef_"):
            raise DePassError(f"{what}: it has no coef_; fit a linear probe first")
        vector = torch.as_tensor(target.probe.coef_)
        if vector.ndim == 2 and len(vector) == 1:
            vector = vector[0]
        constant = float(torch.as_tensor(getattr(target.probe, "intercept_", 0.0)).flatten()[0])
    if vector.shape != (hidden,):
        raise DePassError(
            f"{what}: its shape is {tuple(vector.shape)}, but the model's states have {hidden} numbers; "
            "give one direction"
        )
    if not bool(torch.isfinite(vector).all()):
        raise DePassError(f"{what}: the direction is not finite")
    return vector.detach(), constant


def finite(value: float, name: str) -> float:
    """Return a target's value if it is finite.

    Args:
        value: the model's value of the target.
        name: the name of the target, for the error.

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
    target: LogitTarget,
    prompt: str | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    vocabulary: int,
    predicted: int | None = None,
) -> list[int] | None:
    """Return the id of a target's token, and after it those of the tokens that it is compared with.

    Args:
        target: the target.
        prompt: the prompt up to the target's position; None if it was passed as ids.
        tokenizer: the model's tokenizer; required for text.
        vocabulary: the number of tokens.
        predicted: the model's most likely next token, if it is known.

    Returns:
        The ids; None for the model's most likely next token if that is not known.

    Raises:
        DePassError: a token is compared with itself, alternatives are missing or repeated, or `token_id`
            refuses a token.
    """

    def resolve(token: str | int) -> int:
        return token_id(token, prompt, tokenizer, vocabulary, first=target.first)

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
        possible = torch.isfinite(logits)
        if isinstance(target, Token):
            if not target.centred:
                return cls(tokens, logits.new_ones(1))
            others = possible.nonzero()[:, 0]
            weights = logits.new_full((len(others),), 1 / len(others))
        else:
            if len(ids) == 1:
                possible[ids[0]] = False
                others = possible.nonzero()[:, 0]
            else:
                others = tokens[1:][possible[tokens[1:]]]
            # A softmax over the others alone is p_v / (1 - p_y), however close p_y is to one.
            weights = logits[others].double().softmax(0).to(logits)
            others, weights = others[weights > 0], weights[weights > 0]
        return cls(torch.cat([tokens[:1], others]), torch.cat([logits.new_ones(1), -weights]))

    def value(self, logits: Float[Tensor, "vocabulary"]) -> float:
        """Return the sum.

        Args:
            logits: the logits that scores sum to.
        """
        return float(self.weights.to(logits) @ logits[self.tokens.to(logits.device)])


def target_name(
    target: LogitTarget, ids: list[int], tokenizer: "PreTrainedTokenizerBase | None", shown: int = 3
) -> str:
    """Return the name of a target in results.

    Args:
        target: the target.
        ids: its tokens, as `target_ids` finds them.
        tokenizer: to name tokens by; None shows ids.
        shown: how many alternatives are listed.
    """
    token, *others = (repr(token_text(token, tokenizer)) for token in ids)
    if isinstance(target, Contrast):
        return f"{token} − {others[0]}"
    if isinstance(target, Token):
        return f"{token} − mean logit" if target.centred else token
    rest = f" and {len(others) - shown} more" if len(others) > shown else ""
    return f"log-odds of {token}" + (f" against {', '.join(others[:shown])}{rest}" if others else "")
