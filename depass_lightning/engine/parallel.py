"""Component parallelism: the components of a prompt are divided among ranks (Hong et al., section 3).

Attention, norms and reading treat each component independently. Only where components compete for a neuron do
the ranks communicate, to normalise the shares: under the softmax rule the maximum and the sum over all
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
    """The ranks among which the components of each prompt are divided; all of them make the same calls.

    Args:
        group: the process group.
    """

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """This process's rank."""
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        """World size."""
        return dist.get_world_size(self.group)

    def keep_own(
        self, start_positions: Int[Tensor, "batch component"], lengths: Int[Tensor, "batch"], positions: int
    ) -> Int[Tensor, "batch component"]:
        """Keep only this rank's components: all other start positions are moved past the prompt's end."""
        rows = (lengths[:, None] - start_positions).clamp_min(0).sum(0).cumsum(0)
        # Early components have the most rows: rows are divided evenly, not components.
        bounds = rows[-1] * torch.tensor([self.rank, self.rank + 1]) / self.world
        first, stop = (int((rows <= bound).sum()) for bound in bounds)
        kept = torch.zeros(start_positions.shape[1], dtype=torch.bool)
        kept[first : start_positions.shape[1] if self.rank == self.world - 1 else stop] = True
        return torch.where(kept, start_positions, positions)

    def summed(self, values: Tensor) -> Tensor:
        """Sum values over all ranks."""
        values = values.contiguous()
        dist.all_reduce(values, group=self.group)
        return values

    def merged(self, rule: CompetingRule, summary: Summary) -> Summary:
        """Merge the summaries of all ranks' components into what normalises the shares."""
        if isinstance(rule, SoftmaxRule):
            maximum, sums = summary
            greatest = maximum.contiguous().clone()
            dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.group)
            base = greatest.clamp_min(torch.finfo(greatest.dtype).min)
            return greatest, self.summed(sums * (maximum - base).exp())
        merged: Summary | None = None
        for rank_summary in zip(*map(self._gathered, summary), strict=True):
            merged = rank_summary if merged is None else rule.merge(merged, rank_summary)
        assert merged is not None
        return merged

    def _gathered(self, values: Tensor) -> list[Tensor]:
        """Every rank's values, in the order of the ranks and so of the components."""
        values = values.contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values, group=self.group)
        return gathered


@dataclass(frozen=True)
class ParallelRule:
    """A competing rule whose components are divided among ranks."""

    rule: CompetingRule
    ranks: ComponentParallel
