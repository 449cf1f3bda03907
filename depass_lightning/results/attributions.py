"""Several targets of one prompt: the same components, a score for each target."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from depass_lightning.errors import DePassError
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import Component


@dataclass(frozen=True, eq=False, repr=False)
class Attributions(Sequence[Attribution]):
    """The scores of one prompt's components for several targets: a sequence of one `Attribution` per target.

    Attributes:
        attributions: one per target, in their order, all over the same components.

    Raises:
        DePassError: there are none, or their components differ.
    """

    attributions: list[Attribution]

    def __post_init__(self) -> None:
        if not self.attributions:
            raise DePassError("there is no attribution of any target; give at least one")
        first, *others = self.attributions
        if any(other.components != first.components for other in others):
            raise DePassError(
                "the targets' attributions are not over the same components; keep them in a list"
            )

    @overload
    def __getitem__(self, index: int) -> Attribution: ...

    @overload
    def __getitem__(self, index: slice) -> list[Attribution]: ...

    def __getitem__(self, index: int | slice) -> Attribution | list[Attribution]:
        return self.attributions[index]

    def __len__(self) -> int:
        return len(self.attributions)

    def __repr__(self) -> str:
        count = len(self.components)
        return f"Attributions(targets={self.targets}, {count} components of {self[0].source!r})"

    @property
    def scores(self) -> Float[Tensor, "target component"]:
        """Each component's contribution to each target's value."""
        return torch.stack([attribution.scores for attribution in self])

    @property
    def values(self) -> Float[Tensor, "target"]:
        """The model's value of each target."""
        return torch.tensor([attribution.value for attribution in self])

    @property
    def names(self) -> list[str]:
        """The components' labels, as in `Attribution`; the last may be "bias"."""
        return self[0].names

    @property
    def components(self) -> list[Component]:
        """What each column of the scores belongs to."""
        return self[0].components

    @property
    def targets(self) -> list[str]:
        """Each target in words."""
        return [attribution.target for attribution in self]

    @property
    def first_generated(self) -> int | None:
        """The position of the first target in the text; None where targets are not part of the text."""
        return None

    @property
    def completeness(self) -> Float[Tensor, "target"]:
        """Each target's completeness error, as in `Attribution`."""
        return torch.tensor([attribution.completeness for attribution in self])

    @property
    def text(self) -> str:
        """The prompt, or "" where only ids were given."""
        return self[0].text

    @property
    def tokens(self) -> list[str]:
        """The text of the token at each position."""
        return self[0].tokens

    def words(self) -> "Attributions":
        """Return the same with the pieces of each word summed into one component, as `Attribution.words`."""
        return Attributions([attribution.words() for attribution in self])

    # The pictures are imported where they are drawn, as in `Attribution`.

    def show(self) -> None:
        """Print the scores as a matrix: one row per component, one column per target."""
        from rich.console import Console

        from depass_lightning.reports.matrix import score_matrix

        console = Console()
        console.print(score_matrix(self, console.width))

    def _repr_html_(self) -> str:
        from depass_lightning.reports.matrix import score_matrix
        from depass_lightning.reports.notebook import console_html

        return console_html(score_matrix(self, 110))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with all scores as a matrix, one row per target: one file, which needs no network.

        Args:
            path: the page's file.
        """
        from depass_lightning.reports.page import write_matrix_page

        write_matrix_page(path, self, title=self._title())

    def _title(self) -> str:
        few = self.targets[:3]
        more = f" and {len(self) - 3} more" if len(self) > 3 else ""
        return f"What the model relies on for {', '.join(few)}{more}"
