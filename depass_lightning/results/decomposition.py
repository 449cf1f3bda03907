"""One layer's residual stream as the sum of its components."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """Every component's state at one layer.

    Attributes:
        states: `[component, position, hidden]`; within each group they sum to the model's residual stream.
        names: the components' names.
        layer: the block whose input this is; the number of blocks for the last block's output.
    """

    states: Float[Tensor, "component position hidden"]
    names: list[str]
    layer: int
