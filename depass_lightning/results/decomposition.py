"""One layer's residual stream as the sum of its components."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from depass_lightning.results.component import Component


@dataclass(frozen=True)
class Decomposition:
    """Every component's state at one layer.

    Attributes:
        states: `[component, position, hidden]`; within each group they sum to the model's residual stream.
        components: what each state belongs to.
        layer: the block whose input this is; the number of blocks for the last block's output.
    """

    states: Float[Tensor, "component position hidden"]
    components: list[Component]
    layer: int

    @property
    def names(self) -> list[str]:
        """The components' labels."""
        return [component.label for component in self.components]
