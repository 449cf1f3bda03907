"""What a misled model answers with tokens masked in one way or another, and how the ways compare."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from depass_lightning.studies.study_result import Cell, Curve, Panel
from depass_lightning.studies.truthfulness.questions import Reply
from depass_lightning.utils.bootstrap import Interval, bootstrap

DEPASS, PROBE, RANDOM, NONE = "DePass", "probe itself", "random", "no information"
METHODS = (DEPASS, PROBE, RANDOM)


@dataclass(frozen=True)
class Answers:
    """All replies, and their means.

    Attributes:
        replies: by method, number of masked tokens and prompt, one a random draw.
        counts: the numbers of masked tokens.
        prompts: how many prompts there are.
        by_options: whether the right option must only be more likely than the false one.
        seed: of the intervals.
        covered: by method and number, for each prompt whether a token that states the false answer is
            masked, the mean over random draws; empty where that is not known.
    """

    replies: dict[tuple[str, int, int], list[Reply]]
    counts: list[int]
    prompts: int
    by_options: bool
    seed: int
    covered: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def right(self, method: str, count: int) -> list[float]:
        """Return for each prompt whether it is answered right, the mean over random draws."""
        return [
            sum(reply.preferred if self.by_options else reply.rank == 1 for reply in several) / len(several)
            for several in (self.replies[method, count, number] for number in range(self.prompts))
        ]

    def share(self, method: str, count: int) -> list[float]:
        """Return for each prompt the right answer's probability among the right and the false one."""
        return [
            sum(reply.share for reply in several) / len(several)
            for several in (self.replies[method, count, number] for number in range(self.prompts))
        ]

    @property
    def misled(self) -> list[int]:
        """The prompts that are answered right without the information, and wrong with it."""
        before, after = self.right(NONE, 0), self.right(DEPASS, 0)
        return [i for i in range(self.prompts) if before[i] == 1 and after[i] == 0]

    def panels(self) -> list[Panel]:
        """Return the curves over the number of masked tokens."""
        kept = self.misled
        label = "right option" if self.by_options else "right answer first"
        panels = [
            self._panel("all prompts", label, self.right, range(self.prompts)),
            self._panel(
                "right over false answer", "probability among the two", self.share, range(self.prompts)
            ),
        ]
        if kept:
            panels.append(self._panel(f"right again, of {len(kept)} misled prompts", label, self.right, kept))
        if self.covered:
            name, told = "the false answer is among the masked", "share of prompts"
            panels.append(
                self._panel(name, told, lambda *key: self.covered[key], range(self.prompts), bare=True)
            )
        return panels

    def _panel(
        self, name: str, y_label: str, values: Any, kept: Sequence[int], *, bare: bool = False
    ) -> Panel:
        curves = {
            method: Curve.of(self.counts, [self._over(values(method, count), kept) for count in self.counts])
            for method in METHODS
        }
        if len(kept) == self.prompts and not bare:
            none = self._over(values(NONE, 0), kept)
            curves[NONE] = Curve.of(self.counts, [none for _ in self.counts])
        return Panel(name, "tokens masked", y_label, curves)

    def table(self) -> list[dict[str, Cell]]:
        """Return one row for each method and number of masked tokens."""
        rows = [self._row(NONE, NONE, 0), self._row("nothing masked", DEPASS, 0)]
        return rows + [self._row(method, method, count) for method in METHODS for count in self.counts[1:]]

    def _row(self, name: str, method: str, count: int) -> dict[str, Cell]:
        everything, kept = range(self.prompts), self.misled
        masked = count > 0
        row: dict[str, Cell] = {
            "method": name,
            "masked": count,
            "right": self._over(self.right(method, count), everything),
            "right_again": self._over(self.right(method, count), kept) if kept and method != NONE else None,
            "of_the_two": self._over(self.share(method, count), everything),
        }
        if self.covered:
            row["false_answer_found"] = (
                self._over(self.covered[method, count], everything) if masked else None
            )
        for measure, values in (("right", self.right), ("of_the_two", self.share)):
            for told, other in (("random", RANDOM), ("the_probe", PROBE)):
                cell = None
                if masked and method == DEPASS:
                    pairs = zip(values(method, count), values(other, count), strict=True)
                    cell = self._over([a - b for a, b in pairs], everything)
                row[f"{measure}_over_{told}"] = cell
        return row

    def _over(self, values: Sequence[float], kept: Sequence[int]) -> Interval:
        return bootstrap([values[i] for i in kept], seed=self.seed)
