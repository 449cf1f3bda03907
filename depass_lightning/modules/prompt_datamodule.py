"""A task's prompts in batches of like length, shared out over the processes."""

from collections.abc import Callable, Collection, Iterator, Sequence

from lightning.pytorch import LightningDataModule

from depass_lightning.errors import DePassError
from depass_lightning.tasks import Example, Task


class PromptBatch:
    """Examples that are attributed together, each with its index in the task.

    No dataclass: Lightning looks for tensors to move and convert inside those, and trips over frozen ones.
    """

    def __init__(self, indices: list[int], examples: list[Example]) -> None:
        self.indices = indices
        self.examples = examples

    def __len__(self) -> int:
        return len(self.indices)


class PromptBatches:
    """One process's batches, in the order in which it does them.

    It has no length on purpose: Lightning refuses a loader that is empty on one process and not on another,
    as happens with fewer batches than processes.

    Args:
        task: the prompts.
        plan: the indices of each batch.
        prompts: how many prompts the batches of all processes hold.
    """

    def __init__(self, task: Task, plan: Sequence[Sequence[int]], prompts: int) -> None:
        self.task = task
        self.plan = plan
        self.prompts = prompts

    @property
    def share(self) -> int:
        """How many prompts this process's batches hold."""
        return sum(map(len, self.plan))

    def __iter__(self) -> Iterator[PromptBatch]:
        for indices in self.plan:
            yield PromptBatch(list(indices), [self.task[i] for i in indices])


class PromptData(LightningDataModule):
    """The prompts of a task, for `Trainer.predict`.

    Batches are planned for all processes at once, by length, the longest first: little is padding,
    processes end at about the same time, and what needs most memory comes first. A batch is the same
    whatever the number of processes, so results are too.

    Args:
        task: the prompts.
        batch_size: how many are attributed together.
        length: the length of a prompt, in whatever unit memory follows (characters where None).
        done: returns the indices of the prompts that need not be attributed again, the same on every process.
            It is asked when the run begins, after the callbacks' `setup`.
        together: every process gets every batch, of which it does a part.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 16,
        length: Callable[[str], int] | None = None,
        done: Callable[[], Collection[int] | None] | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DePassError(f"batch_size must be at least 1; got {batch_size}")
        self.task = task
        self.batch_size = batch_size
        self.length = length or len
        self.done = done
        self.together = together

    def predict_dataloader(self) -> PromptBatches:
        """Return this process's share: every so-manieth batch of the plan."""
        trainer = None if self.together else self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        lengths = [self.length(example.prompt) for example in self.task]
        done = None if self.done is None else self.done()
        plan = plan_batches(lengths, self.batch_size, done or ())
        return PromptBatches(self.task, plan[rank::world], sum(map(len, plan)))


def plan_batches(lengths: Sequence[int], batch_size: int, done: Collection[int] = ()) -> list[list[int]]:
    """Return the indices of each batch: like lengths together, the longest first, equals in their order.

    Args:
        lengths: each prompt's.
        batch_size: how many prompts a batch has at most.
        done: the prompts to leave out. Batches are made before: those that are left are the very same.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    plan = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    left = ([i for i in batch if i not in done] for batch in plan)
    return [batch for batch in left if batch]
