"""Prompts from a DataLoader: the batches of a training or an evaluation.

A batch is a mapping of tensors, one row per prompt:

- `input_ids` `[batch, position]`, and `attention_mask`, where rows are padded, on either side;
- `labels` `[batch, position]`, in the convention of transformers: -100 outside of the answer, and the ids of
  `input_ids` at the answer. The prompt is the part before the first answer of the row;
- or `target` `[batch]`: the id of the token that follows the row.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from depass_lightning.errors import DePassError

IGNORED = -100  # transformers' losses ignore these labels
Prompt = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of a prompt, and those of its answer


def prompts_in(name: str, loader: DataLoader, size: int) -> list[Prompt]:
    """Return the ids of the first `size` prompts of a loader, each with the ids of its answer.

    The loader's generators are not changed, and a shuffled loader gives the same prompts every time.

    Args:
        name: the probe set's name, for errors.
        loader: a loader of batches as described above.
        size: the maximum number of prompts.

    Raises:
        DePassError: a batch has another layout, or a row has no answer or nothing before it.
    """
    prompts: list[Prompt] = []
    with _repeatable(loader):
        for batch in loader:
            try:
                for row in _rows(batch):
                    if len(prompts) == size:
                        break
                    prompts.append(row)
            except DePassError as error:
                raise DePassError(f"prompt {len(prompts)} of {name!r}: {error}") from error
            if len(prompts) == size:
                break
    return prompts


def _rows(batch: Any) -> Iterator[Prompt]:
    """Read a batch row by row."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch or not {"labels", "target"} & set(batch):
        held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise DePassError(
            "a batch must be a mapping with input_ids and either labels (-100 outside of the answer) or "
            f"target (an id a row), but it is {held}"
        )
    ids = torch.as_tensor(batch["input_ids"])
    mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).bool()
    labels, target = batch.get("labels"), batch.get("target")
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise DePassError(f"input_ids of {_shape(ids)} and attention_mask of {_shape(mask)} must be 2d alike")
    if target is not None:
        answers = torch.as_tensor(target)
        if answers.shape != ids.shape[:1]:
            raise DePassError(f"target of {_shape(answers)} must be one id a row of input_ids {_shape(ids)}")
        for row, kept, answer in zip(ids, mask, answers, strict=True):
            yield tuple(row[kept].tolist()), (int(answer),)
        return
    marked = torch.as_tensor(labels)
    if marked.shape != ids.shape:
        raise DePassError(f"labels of {_shape(marked)} must be of the shape of input_ids {_shape(ids)}")
    for row, kept, row_labels in zip(ids, mask, marked, strict=True):
        yield _with_answer(row[kept].tolist(), row_labels[kept].tolist())


def _with_answer(ids: list[int], labels: list[int]) -> Prompt:
    """Cut a row where its first answer begins and where it ends."""
    first = next((i for i, label in enumerate(labels) if label != IGNORED), None)
    if first is None:
        raise DePassError("its labels are -100 throughout; mark the answer's tokens with their ids")
    if first == 0:
        raise DePassError("its labels mark the first token, so nothing is asked; set the prompt's to -100")
    end = next((i for i in range(first, len(labels)) if labels[i] == IGNORED), len(labels))
    for label, token in zip(labels[first:end], ids[first:end], strict=True):
        if label != token:
            raise DePassError(
                f"its labels have {label} where input_ids has {token}; labels must have the positions of "
                "their tokens, not one position earlier"
            )
    return tuple(ids[:first]), tuple(ids[first:end])


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


@contextmanager
def _repeatable(loader: DataLoader) -> Iterator[None]:
    """Read from a fixed seed, and restore the generators that shuffle."""
    holders: Any = (loader, loader.sampler, loader.batch_sampler)
    generators = [holder.generator for holder in holders if getattr(holder, "generator", None) is not None]
    states = [generator.get_state() for generator in generators]
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            for generator in generators:
                generator.manual_seed(0)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
