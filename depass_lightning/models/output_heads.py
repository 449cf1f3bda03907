"""The map from a model's last hidden state to its outputs: an unembedding, or a classifier's score map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import features

HeadKind = Literal["causal", "masked", "sequence", "token", "embedding"]
CLASSES: dict[str, HeadKind] = {
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
MAPS = ("score", "classifier")  # names of a classifier's last map


class PooledHead(nn.Module):
    """The map and the activation between an encoder's first state and its map to labels, at every position.

    Args:
        dense: the map.
        activation: the activation.
    """

    def __init__(self, dense: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.dense, self.activation, self.exit = dense, activation, nn.Identity()

    @classmethod
    def of(cls, model: Any) -> "PooledHead | None":
        """Find the modules in a sequence classifier; None for one without them."""
        pooler, head = getattr(model.base_model, "pooler", None), getattr(model, "classifier", None)
        if hasattr(model, "pre_classifier"):  # DistilBERT
            return cls(model.pre_classifier, nn.ReLU())
        for owner in (head, pooler):  # RoBERTa and ELECTRA; BERT
            if owner is not None and hasattr(owner, "dense"):
                return cls(owner.dense, getattr(owner, "activation", None) or nn.Tanh())
        return None

    @override
    def forward(self, states: Float[Tensor, "batch position hidden"]) -> Tensor:
        return self.exit(self.activation(self.dense(states)))


@dataclass(frozen=True)
class OutputHead:
    """The map from the last hidden state to tokens or to labels.

    Args:
        kind: `causal`, the next token at each position; `masked`, the token at each position; `sequence`, the
            labels of a whole text, read at one position; `token`, the labels of each position;
            `embedding`, no head: the outputs are the dimensions of each position's last state.
        output: the map, with a row for each token or label.
        labels: the labels' names, in the order of the rows; empty for tokens.
        independent: whether labels do not exclude each other, as in a multi-label classifier or for the only
            output of a reward model: a label's probability is then its logit's sigmoid.
        padding: the id of the padding token, if the configuration has one.
        pooled: what an encoder's first state goes through before `output`; the label of a text is then read
            at its first token.
    """

    kind: HeadKind
    output: nn.Module
    labels: tuple[str, ...] = ()
    independent: bool = False
    padding: int | None = None
    pooled: PooledHead | None = None

    @property
    def predicts_tokens(self) -> bool:
        """Whether the outputs are tokens, and not labels or the dimensions of a state."""
        return self.kind in ("causal", "masked")

    @classmethod
    def of(cls, model: PreTrainedModel, *, causal: bool = True) -> "OutputHead":
        """Find a model's output head.

        Args:
            model: the model.
            causal: a token sees only those before it; other models need no head.

        Raises:
            DePassError: the model has no head, or its labels are not those of its configuration.
        """
        owner, kind = type(model).__name__, _kind(model)
        if kind in ("causal", "masked"):
            unembedding = model.get_output_embeddings()
            if unembedding is None and not causal and model.base_model is not model:
                raise DePassError(
                    f"{owner} has a head that is not supported; load it with AutoModelForMaskedLM, as a "
                    "classifier, or with AutoModel for its states"
                )
            if unembedding is None and not causal:
                embedding: Any = model.get_input_embeddings()
                size: int = model.config.hidden_size
                same = nn.Linear(size, size, bias=False, device=embedding.weight.device)
                nn.init.eye_(same.weight)
                return cls("embedding", same.requires_grad_(requires_grad=False))
            if unembedding is None:
                raise DePassError(f"{owner} has no unembedding; load it with AutoModelForCausalLM")
            return cls(kind, unembedding)
        output = next((getattr(model, name) for name in MAPS if hasattr(model, name)), None)
        output = getattr(output, "out_proj", output)
        if not isinstance(output, nn.Module):
            raise DePassError(f"{owner} has no map to its labels named {' or '.join(MAPS)}")
        config: Any = model.config
        names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
        if len(names) != features(output)[1]:
            raise DePassError(
                f"{owner} gives {features(output)[1]} numbers, but its configuration names {len(names)} "
                "labels (id2label); set them to the labels that it was trained on"
            )
        independent = len(names) == 1 or config.problem_type == "multi_label_classification"
        pooled = PooledHead.of(model) if kind == "sequence" else None
        return cls(kind, output, names, independent, config.get_text_config().pad_token_id, pooled)

    def position_of(self, ids: Sequence[int]) -> int:
        """The position that a sequence classifier reads: the last token that is not padding, or the first.

        As in transformers, ids are compared: if a text ends with the padding token, which may also be the
        end-of-text token, the last token before it is read.
        """
        if self.pooled is not None:
            return 0
        if self.padding is None:
            return len(ids) - 1
        return max((place for place, token in enumerate(ids) if token != self.padding), default=0)

    def label_logits(
        self, model: PreTrainedModel, input_ids: Int[Tensor, "batch position"], positions: Int[Tensor, "kept"]
    ) -> Float[Tensor, "batch kept label"]:
        """Run a classifier on right-padded ids, and read its labels' logits, or an encoder's states.

        The decoder and the head are called separately, since a classifier refuses batches if its
        configuration has no padding token.
        """
        states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        if self.pooled is not None:
            states = self.pooled(states)
        states = states[:, positions.to(states.device)]
        return states if self.kind == "embedding" else self.output(states)

    def probabilities(self, logits: Float[Tensor, "*rows output"]) -> Float[Tensor, "*rows output"]:
        """The outputs' probabilities."""
        return logits.sigmoid() if self.independent else logits.softmax(-1)

    def log_probabilities(self, logits: Float[Tensor, "*rows output"]) -> Float[Tensor, "*rows output"]:
        """The logarithms of `probabilities`, without underflow."""
        return nn.functional.logsigmoid(logits) if self.independent else logits.log_softmax(-1)

    def log_odds(self, logits: Float[Tensor, "*rows output"], wanted: Int[Tensor, "*rows 1"]) -> Tensor:
        """The log-odds of one output per row: against all others, or of an independent label."""
        chosen = logits.gather(-1, wanted)[..., 0]
        if self.independent:
            return chosen
        return chosen - logits.scatter(-1, wanted, -torch.inf).logsumexp(-1)


def kind_of(names: Sequence[str]) -> HeadKind:
    """Return the kind of head by the names of a model's class and its bases, or of its architectures."""
    kinds: list[HeadKind] = [kind for name in names for end, kind in CLASSES.items() if name.endswith(end)]
    return kinds[0] if kinds else "causal"


def has_head(model: PreTrainedModel) -> bool:
    """Return whether a model has an output head, and is not just a decoder without one."""
    return _kind(model) != "causal" or model.get_output_embeddings() is not None


def _kind(model: PreTrainedModel) -> HeadKind:
    return kind_of([base.__name__ for base in type(model).__mro__])
