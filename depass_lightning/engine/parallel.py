"""The components of a prompt shared out over processes, which meet in every MLP (Hong et al., section 3).

Attention, norms and reading treat each component by itself. Only where components compete for a neuron must
all processes know what normalises the shares: under the softmax rule its maximum and its sum over the
components, one number each for every position and neuron.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from depass_lightning.engine.rules import CompetingRule, SoftmaxRule, Summary


@dataclass(frozen=True)
class ComponentParallel:
    """A group of processes that share the components of each prompt, all of which make the same calls.

    Args:
        group: the processes.
    """

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def keep_own(
        self, start_positions: Int[Tensor, "batch component"], lengths: Int[Tensor, "batch"], positions: int
    ) -> Int[Tensor, "batch component"]:
        """Let all components but this process's be born behind the last position: they never live.

        Args:
            births: the position where each component begins.
            lengths: real positions of each prompt.
            positions: the number of positions, padding included.
        """
        rows = (lengths[:, None] - start_positions).clamp_min(0).sum(0).cumsum(0)
        # Early components live longest: what is shared out evenly is how many rows they have.
        bounds = rows[-1] * torch.tensor([self.rank, self.rank + 1]) / self.world
        first, behind = (int((rows <= bound).sum()) for bound in bounds)
        own = torch.zeros(start_positions.shape[1], dtype=torch.bool)
        own[first : start_positions.shape[1] if self.rank == self.world - 1 else behind] = True
        return torch.where(own, start_positions, positions)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of every process's values."""
        values = values.contiguous()
        dist.all_reduce(values, group=self.group)
        return values

    def merged(self, rule: CompetingRule, summary: Summary) -> Summary:
        """What normalises the shares, from what every process's components come to.

        Args:
            rule: the rule.
            summary: of this process's components.
        """
        if isinstance(rule, SoftmaxRule):
            own, sums = summary
            greatest = own.contiguous().clone()
            dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.group)
            base = greatest.clamp_min(torch.finfo(greatest.dtype).min)
            return greatest, self.summed(sums * (own - base).exp())
        merged: Summary | None = None
        for each in zip(*map(self._gathered, summary), strict=True):
            merged = each if merged is None else rule.merge(merged, each)
        assert merged is not None
        return merged

    def _gathered(self, values: Tensor) -> list[Tensor]:
        """Every process's values, in the order of the processes and so of the components."""
        values = values.contiguous()
        each = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(each, values, group=self.group)
        return each


@dataclass(frozen=True)
class ParallelRule:
    """A competing rule whose components are spread over processes.

    Args:
        rule: the rule.
        spread: the processes.
    """

    rule: CompetingRule
    spread: ComponentParallel
