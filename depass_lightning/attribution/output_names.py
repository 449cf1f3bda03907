"""The names of a model's outputs: tokens of its vocabulary, or a classifier's labels."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.models.output_heads import OutputHead
from depass_lightning.utils.tokenization import token_id, token_text


@dataclass(frozen=True)
class OutputNames:
    """Converts outputs to their ids and back.

    Args:
        head: the model's output head.
        count: the number of outputs.
        tokenizer: the model's tokenizer; None shows ids.
    """

    head: OutputHead
    count: int
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None) -> "OutputNames":
        """Return the names of a model's outputs."""
        return cls(decoder.head, decoder.outputs, tokenizer)

    def id_of(self, output: str | int, prompt: str | None, *, first: bool = False) -> int:
        """Return the id of a token, or the index of a label.

        Args:
            output: the token's or the label's text, or its id.
            prompt: the prompt that the token follows; None if it was passed as ids.
            first: use the first token of a text of several tokens.

        Raises:
            DePassError: there is no such token or label.
        """
        if not self.head.labels:
            return token_id(output, prompt, self.tokenizer, self.count, first=first)
        return label_index(output, self.head.labels)

    def text_of(self, output: int) -> str:
        """Return the text of a token, with its leading space, or the name of a label."""
        if self.head.kind == "embedding":
            return ""  # a dimension
        labels = self.head.labels
        return labels[output] if labels else token_text(output, self.tokenizer)


def label_index(label: str | int, labels: tuple[str, ...]) -> int:
    """Return the index of a label.

    Args:
        label: its name or index; in files, an index may be text, and the only output's label any number.
        labels: the model's labels.

    Raises:
        DePassError: there is no such label.
    """
    if isinstance(label, str):
        name = label.strip()
        if name in labels:
            return labels.index(name)
        if len(labels) == 1 and _is_number(name):
            return 0
        index = int(name) if name.isdecimal() else -1
    else:
        index = -1 if isinstance(label, bool) else label
    if not 0 <= index < len(labels):
        known = ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")
        raise DePassError(
            f"the model has no label {label!r}; it has {len(labels)}: {known} (config.id2label)"
        )
    return index


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
