"""A batch of prompts and its target, run as DePass runs the model: as often as a method needs it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from depass_lightning.engine.freeze import Capture
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, pad, read_length
from depass_lightning.targets import Contrast, Token, finite, target_ids
from depass_lightning.utils.tokenization import token_text


@contextmanager
def as_depass_runs(decoder: Decoder) -> Iterator[None]:
    """Run the model as a recorded pass does, so that every method explains the same value.

    Gradients are off, but can be switched on inside, also where the caller is in inference mode.

    Args:
        decoder: the model.
    """
    with torch.inference_mode(False), undisturbed(decoder.model), ExitStack() as stack:
        for block in decoder.blocks:
            if block.attention.in_mask is not None:  # eager attention would count it twice
                for handle in Capture(everything=False).hooks(block):
                    stack.callback(handle.remove)
        yield


@contextmanager
def embeddings_replaced(
    decoder: Decoder, embeddings: Float[Tensor, "batch position hidden"]
) -> Iterator[None]:
    """Let the model go on with other token embeddings than its own; what positions add stays.

    Args:
        decoder: the model.
        embeddings: what stands in their place.
    """

    def replace(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return embeddings.to(output)

    handle = decoder.model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def run(
    decoder: Decoder, ids: Int[Tensor, "batch position"], positions: Int[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch vocabulary"], Float[Tensor, "batch vocabulary"]]:
    """Run the model on right-padded ids, and read one position of each row.

    Args:
        decoder: the model.
        ids: the token ids.
        positions: each row's position.

    Returns:
        The logits as the model gives them, and the same before any soft cap.
    """
    logits, uncapped, kept = decoder.logits(ids, positions)
    places = torch.searchsorted(torch.tensor(kept, device=positions.device), positions).to(logits.device)
    rows = torch.arange(len(ids), device=logits.device)
    return logits[rows, places], uncapped[rows, places]


@dataclass(frozen=True)
class Answer:
    """One prompt's target as the model itself has it; as in `Attribution`."""

    position: int
    ids: list[int]
    name: str
    value: float
    prediction: str
    probability: float
    rank: int


class Batch:
    """Prompts that are scored together: cut behind their targets' positions, and padded on the right.

    Args:
        decoder: the model.
        tokenizer: to name tokens by; None shows ids.
        prompts: the prompts.
        targets: one a prompt.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        prompts: list[Prompt],
        targets: list[Token | Contrast],
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.targets = targets
        ends = [own.resolve_position(aim.position) for own, aim in zip(prompts, targets, strict=True)]
        self.rows = [
            own.ids[: read_length(decoder, own, end)] for own, end in zip(prompts, ends, strict=True)
        ]
        self.ids = pad(self.rows).to(decoder.device)
        self.positions = torch.tensor(ends, device=decoder.device)
        self._answers: list[Answer] | None = None

    @property
    def real(self) -> Tensor:
        """`[batch, position]` which positions are no padding."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return places <= self.positions[:, None]

    @property
    def answers(self) -> list[Answer]:
        """What the model itself says of the targets."""
        if self._answers is None:
            self.values()
        assert self._answers is not None
        return self._answers

    def values(self) -> Float[Tensor, "batch"]:
        """Run the model once, and return the targets' values, with their graph where gradients are on.

        The first run, which must be of the model as it is, also finds the answers.
        """
        logits, uncapped = run(self.decoder, self.ids, self.positions)
        if self._answers is None:
            self._answers = self._read(logits.detach(), uncapped.detach())
        return self.read(uncapped, *self.wanted())

    def wanted(self) -> tuple[Int[Tensor, "batch 2"], Float[Tensor, "batch 2"]]:
        """The tokens whose logits make up each target, and how each of them counts."""
        rows = [(own.ids * 2)[:2] for own in self.answers]
        signs = [[1.0, -1.0 if len(own.ids) == 2 else 0.0] for own in self.answers]
        device = self.ids.device
        return torch.tensor(rows, device=device), torch.tensor(signs, device=device)

    def read(
        self, uncapped: Float[Tensor, "row vocabulary"], wanted: Tensor, signs: Tensor
    ) -> Float[Tensor, "row"]:
        """Return the targets' values from the logits of any rows.

        Args:
            uncapped: the logits.
            wanted: `[row, 2]` the tokens, as `wanted` gives them.
            signs: `[row, 2]` how they count.
        """
        logits = uncapped.gather(1, wanted.to(uncapped.device)).to(self.decoder.dtype)
        return (logits * signs.to(logits)).sum(1)

    def _read(self, logits: Tensor, uncapped: Tensor) -> list[Answer]:
        answers = []
        for row, (prompt, target) in enumerate(zip(self.prompts, self.targets, strict=True)):
            position, own = int(self.positions[row]), logits[row].to(self.decoder.dtype)
            ids = target_ids(
                target,
                prompt.text_until(position),
                self.tokenizer,
                self.decoder.vocabulary_size,
                int(own.argmax()),
            )
            name = " − ".join(repr(token_text(token, self.tokenizer)) for token in ids)
            values = uncapped[row, ids].to(self.decoder.dtype)
            answers.append(
                Answer(
                    position=position,
                    ids=ids,
                    name=name,
                    value=finite(float(values[0] - values[1:].sum()), name),
                    prediction=token_text(int(own.argmax()), self.tokenizer),
                    probability=float(own.softmax(-1)[ids[0]]),
                    rank=1 + int((own > own[ids[0]]).sum()),
                )
            )
        return answers
