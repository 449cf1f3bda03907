"""Targets: a token's or label's logit or probability, whole answers, directions and similarities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from depass_lightning.errors import DePassError

LogitReading = Literal["logit", "centred", "log_odds", "logprob"]  # what is explained of one token
Reduction = Literal["sum", "mean"]
Pooling = Literal["mean", "cls"]  # how an encoder's states become the embedding of a text


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


@dataclass(frozen=True)
class LogProb:
    """One token's log-probability, by its linear part at the model's own distribution.

    The read-out is the gradient of `log p_y`: `u = W_U[y] - sum_v p_v W_U[v]`, with the distribution `p`
    frozen. The value, which scores sum to, is the token's logit less the expected logit. A log-probability is
    not linear in the logits: it is the value less the entropy of `p`, and `Attribution.remainder` holds the
    difference.

    Args:
        token: the token as text or id, or None for the model's most likely next token.
        position: the position whose next token is predicted; negative counts from the prompt's end.
        first: use the first token of a text of several tokens.
    """

    token: str | int | None = None
    position: int = -1
    first: bool = False


@dataclass(frozen=True)
class Continuation:
    """A whole answer: the sum of its tokens' targets, each read at the position before the token.

    The answer is given, not generated. Its tokens are appended to the prompt's, which stay as they are: a
    text is tokenised as the prompt's continuation, or alone where a token would then span both; ids are used
    unchanged. Components are all tokens of prompt and answer, and each contributes to the answer's tokens
    after it; `Attribution.part_sums` sums what the prompt and the answer's earlier tokens contribute.

    Args:
        answer: the answer as text (with its leading space) or as token ids.
        of: what is explained of each token: `logit`; `centred`, its logit less the mean logit; `log_odds`,
            see `LogOdds`; `logprob`, see `LogProb`.
        reduce: `sum`, or `mean` over the explained tokens.
        tokens: the explained tokens of the answer; None for all.

    Raises:
        DePassError: an argument is none of these.
    """

    answer: str | Sequence[int]
    of: LogitReading = "logit"
    reduce: Reduction = "sum"
    tokens: slice | None = None

    def __post_init__(self) -> None:
        if isinstance(self.answer, Tensor):
            object.__setattr__(self, "answer", self.answer.flatten().tolist())
        if not isinstance(self.answer, str | list | tuple):
            raise DePassError(
                f"Continuation: the answer is a {type(self.answer).__name__}; give its text or its token ids"
            )
        _check_choices("Continuation", self.of, self.reduce)
        if self.tokens is not None and not isinstance(self.tokens, slice):
            raise DePassError(
                f"Continuation: tokens is {self.tokens!r}; give a slice of the answer's tokens, such as "
                "slice(0, 3), or None for all"
            )


@dataclass(frozen=True)
class Preference:
    """Why one answer rather than another: the difference of two continuations of one prompt.

    With log-probabilities it is what preference training such as DPO raises (arXiv 2305.18290). Both answers
    are recorded. Each of the prompt's components has one score, its contribution to the chosen answer less
    that to the rejected one; the answers' tokens are components of kinds `chosen` and `rejected`.

    Args:
        chosen: the first answer as text or token ids, see `Continuation`.
        rejected: the second one.
        of: what is explained of each token, see `Continuation`.
        reduce: `sum`, or `mean` over each answer's tokens.

    Raises:
        DePassError: an argument is none of these.
    """

    chosen: str | Sequence[int]
    rejected: str | Sequence[int]
    of: LogitReading = "logprob"
    reduce: Reduction = "sum"

    def __post_init__(self) -> None:
        _ = self.answers  # refuses what is no answer

    @property
    def answers(self) -> tuple[Continuation, Continuation]:
        """The chosen and the rejected answer as targets of their own."""
        chosen, rejected = (
            Continuation(answer, self.of, self.reduce) for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


def _check_choices(
    name: str, of: str, reduce: str = "sum", comparison: tuple[object, object] = (None, None)
) -> None:
    for argument, value, known in (("of", of, LogitReading), ("reduce", reduce, Reduction)):
        if value not in get_args(known):
            choices = " or ".join(map(repr, get_args(known)))
            raise DePassError(f"{name}: {argument}={value!r} is unknown; choose {choices}")
    output, other = comparison
    if other is not None and (of != "logit" or output is None):
        raise DePassError(
            f"{name}: against= compares the logits of two outputs; name both, and leave of= out"
        )


@dataclass(frozen=True, eq=False)
class Direction:
    """The dot product of the residual stream with a direction, at one layer and position.

    Args:
        vector: `[hidden]` the direction; not normalised.
        layer: the block whose input is read; negative counts from the end; None for the output of the last
            block, before the final norm.
        position: the position that is read; negative counts from the end; `mean` for the mean of all.
    """

    vector: Float[Tensor, "hidden"]
    layer: int | None = None
    position: int | Literal["mean"] = -1


@dataclass(frozen=True)
class Similarity:
    """The cosine similarity of the text's embedding with that of another text, for an encoder without a head.

    The value is the dot product of the pooled states with a vector: the other text's embedding, normalised,
    divided by the norm of the text's own embedding. Both are frozen. Scores sum to the cosine similarity.

    Args:
        text: the other text.
        pooling: the embedding is the `mean` of all tokens' last states, or that of the first one (`cls`).

    Raises:
        DePassError: there is no other text, or no such pooling.
    """

    text: str
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise DePassError(f"Similarity: the other text is {self.text!r}; give a text that is not empty")
        if self.pooling not in get_args(Pooling):
            raise DePassError(f"Similarity: pooling={self.pooling!r} is unknown; choose 'mean' or 'cls'")


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


@dataclass(frozen=True)
class Label:
    """One label of a classifier: its logit, or another value computed from it, such as its log-probability.

    The labels of a whole text are read where transformers reads them: at the last token that is not padding.
    For a classifier, the targets of tokens, and plain names and numbers, refer to labels, too.

    Args:
        label: the label's name (`config.id2label`) or its index; None for the most likely one.
        against: the label to compare it with, by the difference of their logits; None for none.
        of: without `against`, what is explained, as in `Continuation`.
        position: the labelled token, for a token classifier; negative positions count from the end.

    Raises:
        DePassError: `of` is unknown, or given together with `against`.
    """

    label: str | int | None = None
    against: str | int | None = None
    of: LogitReading = "logit"
    position: int = -1

    def __post_init__(self) -> None:
        _check_choices("Label", self.of, comparison=(self.label, self.against))

    @property
    def logit_target(self) -> "LogitTarget":
        """The same target as one of logits."""
        return _compared(self.label, self.against, self.of, self.position)


@dataclass(frozen=True)
class Reward:
    """The score of a reward model: a classifier with one output."""

    @property
    def logit_target(self) -> Token:
        """The same target as one of logits."""
        return Token(0)


@dataclass(frozen=True)
class Masked:
    """One token at a masked position, for a masked language model: its logit, or a value computed from it.

    For such a model, the targets of tokens, and plain texts and ids, refer to a masked position, too.

    Args:
        position: the position of the mask token; negative counts from the text's end; None for the only mask
            token of the text.
        token: the token as text or id; None for the model's most likely one.
        against: the token to compare it with, by the difference of their logits; None for none.
        of: without `against`, what is explained, as in `Continuation`.

    Raises:
        DePassError: `of` is unknown, or given together with `against`.
    """

    position: int | None = None
    token: str | int | None = None
    against: str | int | None = None
    of: LogitReading = "logit"

    def __post_init__(self) -> None:
        _check_choices("Masked", self.of, comparison=(self.token, self.against))

    @property
    def logit_target(self) -> "LogitTarget":
        """The same target as one of logits."""
        return _compared(self.token, self.against, self.of, -1 if self.position is None else self.position)


def _compared(
    output: str | int | None, other: str | int | None, of: LogitReading, position: int
) -> "LogitTarget":
    """Return the target that one output is, in comparison with another one if there is one."""
    if output is not None and other is not None:
        return Contrast(output, other, position)
    return token_target(output, of, position)


LogitTarget = Token | Contrast | LogOdds | LogProb  # a weighted sum of logits at one position
HeadTarget = Label | Reward | Masked  # of a classifier or a masked language model
Target = LogitTarget | HeadTarget | Continuation | Preference | Direction | ProbeLogit | Similarity
TargetLike = Target | str | int | None
# How a known answer's first token is explained.
AnswerTarget = Literal["contrast", "token", "centred", "log_odds", "logprob"]


def token_target(
    token: str | int | None, reading: LogitReading, position: int = -1, *, first: bool = False
) -> Token | LogOdds | LogProb:
    """Return the target that one token is."""
    if reading == "log_odds":
        return LogOdds(token, position=position, first=first)
    if reading == "logprob":
        return LogProb(token, position, first)
    return Token(token, position, first, centred=reading == "centred")


def answer_target(
    token: str | int | None, kind: AnswerTarget, position: int = -1, *, first: bool = False
) -> Token | LogOdds | LogProb:
    """Return the target that an answer's token is, where there is no foil."""
    reading: LogitReading = "logit" if kind in ("contrast", "token") else kind
    return token_target(token, reading, position, first=first)


def as_target(target: TargetLike) -> Target:
    """Convert text, an id or None to a `Token`; other targets are returned unchanged.

    Raises:
        DePassError: the target is none of these.
    """
    if target is None or (isinstance(target, (str, int)) and not isinstance(target, bool)):
        return Token(target)
    if isinstance(target, Target):
        return target
    raise DePassError(
        f"target {target!r} is a {type(target).__name__}; pass a token's text or id, Token(...), "
        "Contrast(...), LogOdds(...), LogProb(...), Label(...), Reward(), Masked(...), Continuation(...), "
        "Preference(...), Direction(...), ProbeLogit(...), Similarity(...), or None for the model's own token"
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
