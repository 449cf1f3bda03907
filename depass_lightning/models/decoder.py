"""A language model or classifier as the method needs it: blocks, norms, linear maps and outputs."""

import inspect
import sys
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from depass_lightning.errors import DePassError
from depass_lightning.models.affine import AffineMap, features, has_bias, is_quantised, linear_of, rows_of
from depass_lightning.models.binding import bind, bind_head
from depass_lightning.models.output_heads import OutputHead
from depass_lightning.models.rotary import Regime, position_limit, regime
from depass_lightning.models.sharding import check_shards
from depass_lightning.models.spec import FamilySpec, HeadSpec, ModelSpec, configured, submodule
from depass_lightning.models.unwrapping import check_values, original, unwrapped

READOUT_ROWS = 16_384  # of the unembedding that are read at once


class Decoder:
    """Binds a family's declaration to one model.

    Args:
        model: a causal or masked language model of transformers, a classifier, or a model of a declared
            class; it may be compiled or have `peft` adapters.
        spec: its family's declaration (`engine/validate.py` finds and checks it).
        compute_dtype: the precision that components are carried in; by default float64 for a model in
            float64 and float32 for every other.
        max_positions: the tokens that a prompt may have; by default what the configuration states.
        recomputes: probabilities are recomputed from queries and keys, not read from eager attention.

    Raises:
        DePassError: this is no causal language model, it has no weights, the declaration does not name its
            parts, or its positions end before `max_positions`.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: FamilySpec,
        *,
        compute_dtype: torch.dtype | None = None,
        max_positions: int | None = None,
        recomputes: bool = True,
    ) -> None:
        self.model: Any = original(model) if spec.model is None else unwrapped(model)
        owner = type(self.model).__name__
        check_values(self.model)
        check_shards(self.model)
        self.config = self.config_of(model) if spec.model is None else _described(self.model, spec.model)
        self.spec, self.causal = spec, spec.causal(self.config)
        inner: nn.Module = self.model
        if spec.model is None:
            self.token_embedding: nn.Module = self.model.get_input_embeddings()
            self.head = OutputHead.of(self.model, causal=self.causal)
            if self.head.kind != "embedding":  # else the model is its own decoder
                inner = submodule(inner, spec.decoder, owner) if spec.decoder else self.model.get_decoder()
        else:
            self.token_embedding = submodule(inner, spec.model.embedding, owner)
            self.head = OutputHead("causal", submodule(inner, spec.model.unembedding, owner))
        if not self.causal and self.head.kind == "causal":
            raise DePassError(
                f"{owner} has no causal mask, so that it predicts no next token; load it as a masked "
                "language model (AutoModelForMaskedLM) or a classifier "
                "(AutoModelForSequenceClassification, AutoModelForTokenClassification)"
            )
        self.unembedding = self.head.output
        self.final_norm = None if spec.final_norm is None else submodule(inner, spec.final_norm, owner)
        self.final_projection: nn.Module | None = getattr(inner, spec.final_projection or "", None)
        self.max_positions = position_limit(inner, self.config, max_positions)
        modules = submodule(inner, spec.blocks, owner)
        self.blocks = [
            bind(spec, index, module, self.config, f"block {index} of {owner}")
            for index, module in enumerate(modules.children())
        ]
        self._bind_head(owner)
        self.recomputes = recomputes and all(
            any(  # the class may be wrapped, as FSDP2 does
                hasattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS")
                for kind in type(block.attention.module).__mro__
            )
            for block in self.blocks
            if block.attention.mixer is None
        )
        self._compute_dtype = compute_dtype
        places = self._places or {}
        # An index would have to be where the last block is, and accelerate brings it to the first.
        spread = len({place for place in places.values() if place not in ("cpu", "disk")}) > 1
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters and spec.head is None
        self._takes_logits_to_keep = takes and not spread

    def _bind_head(self, owner: str) -> None:
        """Bind what is between the last block and the output map, if anything, as an additional block."""
        spec, sizes = self.spec.head, (self.hidden_size, self.heads)
        if spec is not None and self.head.predicts_tokens:
            norm, self.final_norm = self.final_norm, None
            head = submodule(self.model, spec.module, owner)
            self.blocks.append(bind_head(spec, len(self.blocks), norm, head, sizes))
        elif self.head.pooled is not None:
            pooler = HeadSpec("", norm="exit")
            self.blocks.append(bind_head(pooler, len(self.blocks), None, self.head.pooled, sizes))

    @staticmethod
    def config_of(model: nn.Module) -> PretrainedConfig:
        """The configuration of a model's decoder, its text part where there are others.

        Raises:
            DePassError: it is none.
        """
        return original(model).config.get_text_config()

    @property
    def _places(self) -> dict[str, Any] | None:
        return getattr(self.model, "hf_device_map", None)

    @property
    def placed(self) -> bool:
        """Whether the model was put on its devices when it was loaded, and may not be moved again."""
        return self._places is not None

    @property
    def name(self) -> str:
        """What the model is called: the name or folder that it was loaded from, or its class."""
        config = getattr(self.model, "config", None)
        return str(getattr(config, "_name_or_path", "") or type(self.model).__name__)

    @property
    def notes(self) -> dict[str, Any]:
        """What an attribution's metadata has of the model: its name, and the kind of an encoder's head."""
        return {"model": self.name} | ({} if self.causal else {"encoder": self.head.kind})

    @property
    def embedding(self) -> Float[Tensor, "vocabulary hidden"]:
        """The token embedding's weights."""
        weight = self.token_embedding.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        if not self.embedding.is_meta:
            return self.embedding.device
        hook = getattr(self.token_embedding, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")

    @property
    def model_dtype(self) -> torch.dtype:
        """The precision that the model itself computes in."""
        return self.embedding.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The precision that components are carried in."""
        if self._compute_dtype is not None:
            return self._compute_dtype
        return torch.float64 if self.model_dtype == torch.float64 else torch.float32

    @property
    def rounds(self) -> bool:
        """Whether the model itself computes less precisely than components are carried."""
        return self.quantised or self.model_dtype.itemsize < self.dtype.itemsize

    @property
    def quantised(self) -> bool:
        """Whether any of its maps is kept more coarsely than in half precision."""
        return is_quantised(self.unembedding) or any(block.quantised for block in self.blocks)

    @property
    def has_biases(self) -> bool:
        """Whether any constant enters the residual stream, so that a bias component exists."""
        ends = [self.unembedding] if self.final_norm is None else [self.unembedding, self.final_norm]
        return any(map(has_bias, ends)) or any(block.has_biases for block in self.blocks)

    @property
    def adds_to_scores(self) -> bool:
        """Whether any attention scores contain constants."""
        return any(block.adds_to_scores for block in self.blocks)

    @property
    def hidden_size(self) -> int:
        """The size of the residual stream."""
        return self.blocks[0].attention.output.shape[0]

    @property
    def heads(self) -> int:
        """The number of query heads of a block with attention, or of the first mixer's where none has."""
        parts = [block.attention for block in self.blocks]
        return next((part.heads for part in parts if part.mixer is None), parts[0].heads)

    def check_attention(self, method: str) -> None:
        """Refuse a method that reads attention's probabilities, if a block has none.

        Raises:
            DePassError: a block has a linear mixer, or no attention.
        """
        for block in self.blocks:
            if block.attention.mixer is not None:
                raise DePassError(
                    f"{method}: block {block.index} of {type(self.model).__name__} has no attention "
                    f"probabilities ({block.attention.mixer.kind}); choose another method, such as 'depass'"
                )

    @property
    def neurons(self) -> int:
        """The number of neurons of the widest MLP; a mixture's experts add up."""
        return max(block.mlp.width for block in self.blocks)

    def regime(self, length: int) -> Regime:
        """Name what the model chooses by a prompt's length: only prompts of one name may share a batch."""
        # Tokens of an encoder see what follows them, padding too: only equal lengths share a batch.
        return regime(self.config, length) if self.causal else (length,)

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens: the rows of the unembedding, or of a classifier's token embedding."""
        return self.outputs if self.head.predicts_tokens else len(self.embedding)

    @property
    def outputs(self) -> int:
        """The number of tokens or labels that have a logit."""
        return features(self.unembedding)[1]

    @property
    def logit_scale(self) -> float:
        """What the model multiplies the unembedding's output by; 1 for labels."""
        if not self.head.predicts_tokens:
            return 1.0
        spec = self.spec
        return configured(self.config, spec.logit_scale) / configured(self.config, spec.logit_divisor)

    @property
    def soft_capped(self) -> bool:
        """Whether logits go through a soft cap last; scores sum to the logit before it."""
        caps = ("final_logit_softcapping", "logits_soft_cap")
        return any(getattr(self.config, name, None) for name in caps)

    def unembedded(self) -> AffineMap:
        """The map from the final norm's output to the logits before any soft cap."""
        linear = linear_of(self.unembedding, self.dtype).to(self.device)
        if self.logit_scale == 1 and self.final_projection is None:
            return linear
        weight, bias = self._projected(linear.weight, linear.bias)
        return AffineMap(weight * self.logit_scale, None if bias is None else bias * self.logit_scale)

    def _projected(
        self, rows: Float[Tensor, "target out"], biases: Float[Tensor, "target"] | None
    ) -> tuple[Float[Tensor, "target hidden"], Float[Tensor, "target"] | None]:
        """Read rows of the unembedding through the projection before it, where there is one."""
        if self.final_projection is None:
            return rows, biases
        projection = linear_of(self.final_projection, self.dtype).to(rows.device)
        if projection.bias is not None:
            biases = rows @ projection.bias + (0 if biases is None else biases)
        return rows @ projection.weight, biases

    def readout(
        self, tokens: Int[Tensor, "target"]
    ) -> tuple[Float[Tensor, "target hidden"], Float[Tensor, "target"]]:
        """The unembedding's rows and biases of some tokens: a logit is `row . state + bias`.

        Args:
            tokens: `[target]` token ids.
        """
        rows, biases = self._projected(*rows_of(self.unembedding, tokens, self.dtype))
        assert biases is not None
        return rows.to(self.device) * self.logit_scale, biases.to(self.device) * self.logit_scale

    def summed_readout(
        self, tokens: Int[Tensor, "token"], weights: Float[Tensor, "sum token"]
    ) -> tuple[Float[Tensor, "sum hidden"], Float[Tensor, "sum"]]:
        """Weighted sums of the unembedding's rows and biases of some tokens, some thousand rows at a time.

        Args:
            tokens: `[token]` token ids.
            weights: `[sum, token]` the weight of each in each sum.
        """
        sums = []
        for some, weight in zip(tokens.split(READOUT_ROWS), weights.split(READOUT_ROWS, 1), strict=True):
            rows, biases = self.readout(some)
            sums.append((weight.to(rows) @ rows, weight.to(rows) @ biases))
        vectors, constants = zip(*sums, strict=True)
        return torch.stack(vectors).sum(0), torch.stack(constants).sum(0)

    def logits(
        self, input_ids: Tensor, positions: Tensor
    ) -> tuple[Float[Tensor, "batch kept vocabulary"], Float[Tensor, "batch kept vocabulary"], list[int]]:
        """Run the model once on right-padded ids; a classifier's logits are its labels'.

        Padding needs no mask: attention is causal, and an encoder's prompts are not padded (`regime`).

        Args:
            input_ids: `[batch, position]`.
            positions: every position at which logits are wanted, in any shape.

        Returns:
            The logits as the model gives them, the same before any soft cap, and the positions that they
            stand at.
        """
        kept: Tensor = positions.unique()
        if not self.head.predicts_tokens:
            logits = self.head.label_logits(self.model, input_ids, kept)
            return logits, logits, kept.tolist()
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _arguments: object, output: Tensor) -> None:
            seen.append(output)

        with ExitStack() as stack:
            if self.soft_capped:
                stack.callback(self.unembedding.register_forward_hook(keep).remove)
            arguments = {"logits_to_keep": kept} if self._takes_logits_to_keep else {}
            if self.spec.model is None:
                logits = self.model(input_ids=input_ids, use_cache=False, **arguments).logits
            else:
                logits = self.spec.model.logits(self.model, input_ids)
        before = seen[0].to(logits.dtype) * self.logit_scale if self.soft_capped else logits
        if not self._takes_logits_to_keep:
            logits, before = logits[:, kept], before[:, kept]
        return logits, before, kept.tolist()


def _described(model: nn.Module, spec: ModelSpec) -> PretrainedConfig:
    """Return a configuration with the fields that the engine reads, for a model of another library."""
    config: Any = PretrainedConfig()
    config.model_type = type(model).__name__
    config.num_attention_heads = spec.heads(model)
    config.max_position_embeddings = spec.positions(model)
    config.final_logit_softcapping = spec.soft_cap(model)
    return config
