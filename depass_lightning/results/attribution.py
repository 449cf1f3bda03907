"""The result of one prompt: a score for every component, and what the components are."""

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.results.comparison import Comparison, compare_scores
from depass_lightning.results.component import Component, from_columns, to_columns
from depass_lightning.results.grouping import (
    Citation,
    characters_of,
    citations,
    part_sums,
    sections_summed,
    words_summed,
)
from depass_lightning.results.score_file import read_result, write_result
from depass_lightning.utils.sections import Section, SectionUnit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class Attribution:
    """The scores of one prompt's components for one target; they sum to the model's value of it.

    Attributes:
        scores: each component's contribution to the value, in logits; float32, on the CPU.
        components: what each score belongs to; the last may be the bias.
        value: the model's value of the target: a logit, a difference of two, the sum of an answer's.
        target: the target in words: "' Mary'" or "' Mary' − ' John'".
        text: the prompt, or "" where only token ids were given.
        tokens: the text of the token at each position; together they read like the prompt.
        token_ids: the id at each position.
        offsets: the character span in `text` of each position ((0, 0) for special tokens), if known.
        source: what the state was split into: "tokens".
        rule: how neurons were shared: "softmax".
        layer: the layer at which the state was split.
        position: the position at which the target was read, an index into `tokens`.
        prediction: the text of the most likely next token there; of a whole answer the beginning of the
            greedy one, up to the first token that differs.
        probability: the model's probability of the target's token or whole answer, if the target is one.
        rank: that token's among all, from 1 for the most likely; of an answer its lowest-ranked token's.
        remainder: the true log-probability or log-odds less the value; None where the target is linear.
        answer_start: the first position after the prompt, before a generated or given answer; else None.
        groups: the number of successive groups of components of equal size, such as each layer's heads, whose
            scores sum to the value separately.
        target_ids: the explained tokens' ids, the answer first; empty for directions and whole answers.
        method: the method that made the scores; those of others than `depass` need not sum to the value.
        attention_path: `content`, or `control` for scores of the query and key path alone.
        sections: the turns of a conversation and the documents in `text`.
        metadata: anything else worth keeping; JSON must be able to hold it.
    """

    scores: Float[Tensor, " component"]
    components: list[Component]
    value: float
    target: str
    text: str
    tokens: list[str]
    token_ids: list[int]
    offsets: list[tuple[int, int]] | None
    source: str
    rule: str
    layer: int
    position: int
    prediction: str
    probability: float | None = None
    rank: int | None = None
    remainder: float | None = None
    answer_start: int | None = None
    groups: int = 1
    target_ids: list[int] = field(default_factory=list)
    method: str = "depass"
    attention_path: str = "content"
    sections: list[Section] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = torch.as_tensor(self.scores).detach().to("cpu", torch.float32)
        if self.scores.ndim != 1:
            raise DePassError(f"scores is one number a component, not a tensor of {tuple(self.scores.shape)}")
        for unit, count, of in (
            ("component", len(self.scores), ("components",)),
            ("token", len(self.tokens), ("token_ids", "offsets")),
        ):
            for name in of:
                entries = getattr(self, name)
                if entries is not None and len(entries) != count:
                    raise DePassError(f"{name} has {len(entries)} entries, but one a {unit} makes {count}")

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The components' labels: a token's text (" Mary"), "head 3", "bias"."""
        return [component.label for component in self.components]

    @property
    def last(self) -> int:
        """The last position that can contribute: the target's; for an encoder the last of all."""
        return len(self.tokens) - 1 if self.metadata.get("encoder") else self.position

    @property
    def positions(self) -> list[tuple[int, int] | None]:
        """The token range [start, end) of each component; None for a bias, a head and the like."""
        return [component.span for component in self.components]

    def __repr__(self) -> str:
        top = ", ".join(f"{name!r} {score:+.3g}" for name, score in self.top(3, absolute=True))
        return (
            f"Attribution(target={self.target}, value={self.value:.4g}, {len(self)} components of "
            f"{self.source!r} at layer {self.layer}, rule={self.rule!r}, top: {top or 'none'}, "
            f"completeness={self.completeness:.1e})"
        )

    @property
    def completeness(self) -> float:
        """The completeness error: |sum of scores - value|, relative to the larger of |value| and top |score|.

        With several groups, the largest of theirs.
        """
        if not len(self.scores):
            return 0.0 if self.value == 0 else 1.0
        scores = self.grid().double()
        scale = scores.abs().amax(1).clamp_min(abs(self.value))
        errors = (scores.sum(1) - self.value).abs() / scale.where(scale > 0, 1.0)
        return errors.max().item()

    @property
    def correct(self) -> bool | None:
        """Whether the target's token is the model's most likely one; None where its rank is not known."""
        return None if self.rank is None else self.rank == 1

    @property
    def whole_answer(self) -> bool:
        """Whether the target is all of an answer that the text ends in."""
        return self.answer_start is not None and not self.target_ids

    def in_answer(self, component: Component) -> bool:
        """Return whether a component is part of the answer, not of the prompt.

        Args:
            component: one of the components.
        """
        return (
            self.answer_start is not None
            and component.span is not None
            and component.span[0] >= self.answer_start
        )

    def part_sums(self) -> dict[str, float]:
        """Return the sums of the scores of the prompt, of the answer's earlier tokens and of everything else.

        Returns:
            Sums by `prompt`; `answer`, or `chosen` and `rejected` of a preference; and `other`, such as
            constants and components without a position. A part without components is left out.
        """
        return part_sums(self)

    def grid(self) -> Float[Tensor, "group component"]:
        """Return the scores with one row per group, such as a layer's heads; each row sums to the value."""
        return self.scores.view(self.groups, -1)

    def top(self, k: int, absolute: bool = False) -> list[tuple[str, float]]:
        """Return the names and scores of the `k` components with the largest scores, the largest first.

        Args:
            k: the largest number of components.
            absolute: rank by absolute value.
        """
        return [(self.components[i].label, self.scores[i].item()) for i in self.ranked(k, absolute)]

    def ranked(self, k: int, absolute: bool = False) -> list[int]:
        """Return the indices of the `k` components with the largest scores, the largest first.

        Args:
            k: the largest number of indices.
            absolute: rank by absolute value.
        """
        scores = self.scores.abs() if absolute else self.scores
        return torch.sort(scores, descending=True, stable=True).indices[: max(k, 0)].tolist()

    def words(self) -> "Attribution":
        """Return the same attribution with the pieces of each word summed into one component.

        Punctuation marks, special tokens and components without a position, such as the bias, stay as they
        are. Where the offsets or the text are not known, a word begins at a token that begins with a space.
        """
        return words_summed(self)

    def grouped(self, by: SectionUnit) -> "Attribution":
        """Return the same attribution with the components of each unit of the text summed into one.

        What belongs to a template is one component, "template"; a bias stays as it is.

        Args:
            by: `sentence`, `paragraph`, `turn` (named by its role) or `document` (by its name).

        Raises:
            DePassError: the text is not known, there is no such unit, or a component has several.
        """
        return sections_summed(self, by)

    def cite(self, k: int = 3, by: SectionUnit = "sentence") -> list[Citation]:
        """Return the parts of the prompt's documents with the largest scores, the largest first.

        Args:
            k: the largest number of citations.
            by: what is cited: `sentence`, `paragraph` or `document`.

        Raises:
            DePassError: the prompt has no documents, or a component is more than one such part.
        """
        return citations(self, k, by)

    def text_of(self, positions: tuple[int, int] | None) -> str:
        """Return the text of a token range, from the prompt where its offsets are known.

        Only the prompt shows a character that is spread over several tokens.

        Args:
            positions: the range [start, end); None for no text.
        """
        start, end = positions or (0, 0)
        joined = "".join(self.tokens[start:end])
        if end - start < 2 or not self.text or self.offsets is None:
            return joined
        text = self.text[self.offsets[start][0] : self.offsets[end - 1][1]]
        return " " + text if joined.startswith(" ") and not text.startswith(" ") else text

    def without(self, names: str | Iterable[str]) -> "Attribution":
        """Return the attribution without every component that has one of some names.

        The value stays the model's, so `completeness` shows how much was left out.

        Args:
            names: one name, or several.

        Raises:
            DePassError: no component has one of the names, or the groups left would differ in size.
        """
        dropped = {names} if isinstance(names, str) else set(names)
        if unknown := sorted(dropped - set(self.names)):
            raise DePassError(f"no component is named {unknown[0]!r}; the names are {_listing(self.names)}")
        kept = [i for i, component in enumerate(self.components) if component.label not in dropped]
        size = len(self) // self.groups
        if len({sum(i // size == group for i in kept) for group in range(self.groups)}) > 1:
            raise DePassError("each group has to lose as many components: name those of every layer")
        return replace(self, scores=self.scores[kept], components=[self.components[i] for i in kept])

    def compare(self, other: "Attribution") -> Comparison:
        """Compare the scores (before) with another attribution's (after), component by component.

        Args:
            other: over the same components.

        Raises:
            DePassError: the two are not over the same components.
        """
        return compare_scores(self.names, self.scores, other.names, other.scores)

    def positive_fraction(self, ranges: Sequence[tuple[int, int]]) -> float:
        """Return the fraction of all positive score on the components that overlap some character ranges.

        Args:
            ranges: the character ranges [start, end) of `text`. White space around a component's text does
                not count as part of it.

        Returns:
            A number from 0 to 1; 0 where no score is positive.

        Raises:
            DePassError: the tokens' offsets in the text are not known, or a range lies outside of it.
        """
        on = self.overlapping(ranges)
        positive = self.scores.double().clamp(min=0)
        total = positive.sum().item()
        return positive[on].sum().item() / total if total else 0.0

    def overlapping(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Return the indices of the components whose text overlaps character ranges of the prompt.

        Args:
            ranges: the character ranges [start, end) of `text`.

        Raises:
            DePassError: the tokens' offsets in the text are not known, or a range lies outside of it.
        """
        if self.offsets is None or not self.text:
            raise DePassError(
                "the tokens' places in the text are not known; give the prompt as text, with a fast tokenizer"
            )
        for start, end in ranges:
            if not 0 <= start < end <= len(self.text):
                raise DePassError(f"({start}, {end}) is no range of characters of a text of {len(self.text)}")
        return [
            i
            for i, (low, high) in enumerate(characters_of(self))
            if any(low < end and start < high for start, end in ranges)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the attribution to one safetensors file: the scores as a tensor, the rest in its header.

        Args:
            path: the file, which is written whole or not at all.

        Raises:
            DePassError: `metadata` holds something that JSON cannot.
        """
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        del record["scores"]
        columns = {"components": to_columns(self.components)}
        write_result(path, "attribution", {"scores": self.scores}, record | columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Attribution":
        """Read an attribution that `save` wrote.

        Args:
            path: the file.

        Raises:
            DePassError: the file is no saved attribution, or one of another version's format.
        """
        tensors, record = read_result(path, "attribution")
        record["components"] = from_columns(record["components"])
        if record["offsets"] is not None:
            record["offsets"] = [tuple(span) for span in record["offsets"]]
        record["sections"] = [Section(*section) for section in record["sections"]]
        return cls(scores=tensors["scores"], **record)

    # The pictures are imported where they are drawn: reports build on this module, and matplotlib, rich and
    # jinja2 take longer to import than an attribution takes to compute.

    def show(self) -> None:
        """Show the attribution: as a panel in a notebook, in colours in a terminal."""
        if _in_notebook():
            # A kernel brings IPython; the library does not ask for it.
            shown = importlib.import_module("IPython.display")
            shown.display(shown.HTML(self._repr_html_()))
            return
        from rich.console import Console

        from depass_lightning.reports.terminal import attribution_text

        Console().print(attribution_text(self))

    def _repr_html_(self) -> str:
        from depass_lightning.reports.notebook import attribution_html

        return attribution_html(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that shows the attribution: one file, which needs no network.

        Args:
            path: the page's file.
        """
        from depass_lightning.reports.page import write_page

        write_page(path, [self], title=f"What the model relies on for {self.target}")

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw the tokens coloured by score, a map of layers and heads, or bars.

        Args:
            path: the picture's file, with the format as its ending (.png, .svg, .pdf); None writes none.
        """
        from depass_lightning.reports.component_figures import attribution_figure
        from depass_lightning.reports.figures import save_figure

        figure = attribution_figure(self)
        if path is not None:
            save_figure(figure, path)
        return figure


def _listing(names: Sequence[str], most: int = 20) -> str:
    """Return the distinct names in quotes, a long list cut."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(map(repr, distinct[:most])) + (", ..." if len(distinct) > most else "")


def _in_notebook() -> bool:
    """Return whether the code runs in a notebook's kernel, without importing IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None
