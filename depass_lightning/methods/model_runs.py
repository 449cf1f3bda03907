"""A batch of prompts and their targets, and passes of the model under the conditions of DePass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.attribution.question import Question
from depass_lightning.attribution.readout import ModelAnswer
from depass_lightning.engine.hooks import Capture
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import pad, read_length


@contextmanager
def as_depass_runs(decoder: Decoder) -> Iterator[None]:
    """Run the model as a recorded pass does, so that every method explains the same value.

    Gradients are off, but can be switched on inside, also where the caller is in inference mode.
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
    """Run the model with other token embeddings; position embeddings are still added."""

    def replace(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return embeddings.to(output)

    handle = decoder.token_embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def run(
    decoder: Decoder, ids: Int[Tensor, "batch position"], positions: Int[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch vocabulary"], Float[Tensor, "batch vocabulary"]]:
    """Run the model on right-padded ids, and read one position of each row.

    Returns:
        The logits as the model gives them, and the same before any soft cap.
    """
    logits, uncapped, kept = decoder.logits(ids, positions)
    places = torch.searchsorted(torch.tensor(kept, device=positions.device), positions).to(logits.device)
    rows = torch.arange(len(ids), device=logits.device)
    return logits[rows, places], uncapped[rows, places]


class Batch:
    """Prompts that are scored together: cut after their targets' positions, and padded on the right."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        questions: list[Question],
    ) -> None:
        self.decoder = decoder
        self.names = OutputNames.of(decoder, tokenizer)
        self.questions = questions
        self.prompts = [question.prompt for question in questions]
        ends = [question.position for question in questions]
        lengths = [read_length(decoder, question.prompt, question.position) for question in questions]
        self.rows = [prompt.ids[:length] for prompt, length in zip(self.prompts, lengths, strict=True)]
        self.ids = pad(self.rows).to(decoder.device)
        self.positions = torch.tensor(ends, device=decoder.device)
        self._answers: list[ModelAnswer] | None = None

    @property
    def real(self) -> Tensor:
        """`[batch, position]`, true where a position is not padding."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device).expand(self.ids.shape)
        # An encoder's texts have equal lengths.
        return places <= (self.positions[:, None] if self.decoder.causal else self.ids.shape[1])

    @property
    def answers(self) -> list[ModelAnswer]:
        """The model's answers for the targets."""
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

    def wanted(self) -> tuple[Int[Tensor, "batch token"], Float[Tensor, "batch token"]]:
        """The tokens whose logits make up each target, at least two, and the weight of each."""
        sums = [logits for answer in self.answers for logits in answer.logits]
        width = max(2, *(len(logits.tokens) for logits in sums))
        tokens, weights = [], []
        for logits in sums:
            missing = width - len(logits.tokens)
            # The first token again, with no weight: its logit is finite.
            tokens.append(torch.cat([logits.tokens, logits.tokens[:1].expand(missing)]))
            weights.append(nn.functional.pad(logits.weights, (0, missing)))
        device = self.ids.device
        return torch.stack(tokens).to(device), torch.stack(weights).to(device)

    def read(
        self, uncapped: Float[Tensor, "row vocabulary"], wanted: Tensor, weights: Tensor
    ) -> Float[Tensor, "row"]:
        """Return the targets' values from the logits of any rows.

        Args:
            uncapped: the logits.
            wanted: `[row, token]` the tokens, as `wanted` gives them.
            weights: `[row, token]` the weight of each.
        """
        logits = uncapped.gather(1, wanted.to(uncapped.device)).to(self.decoder.dtype)
        return (logits * weights.to(logits)).sum(1)

    def _read(self, logits: Tensor, uncapped: Tensor) -> list[ModelAnswer]:
        logits, uncapped = logits.to(self.decoder.dtype), uncapped.to(self.decoder.dtype)
        return [
            ModelAnswer.of_token(question.reads[0], logits[row], uncapped[row], self.names)
            for row, question in enumerate(self.questions)
        ]
