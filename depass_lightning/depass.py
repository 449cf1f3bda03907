"""DePass: attribution by one decomposed forward pass (Hong et al., NeurIPS 2025, arXiv 2510.18462).

Each call resolves its arguments, and refuses what cannot be done, before the model runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack, overload

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.attribute import attribute_by_rule, settings_by_rule
from depass_lightning.attribution.call_options import (
    AttributeOne,
    AttributeSeveral,
    DecomposeOne,
    DecomposeOptions,
    DecomposeSeveral,
    EstimateOptions,
    SourcesOne,
    SourcesSeveral,
)
from depass_lightning.attribution.cost import Estimate, estimate
from depass_lightning.attribution.decompose import decompose, decompose_layers
from depass_lightning.attribution.edges import CircuitOptions, circuit_of
from depass_lightning.attribution.generate import generate
from depass_lightning.attribution.preference import results_of, with_both_answers
from depass_lightning.attribution.question import questions_of
from depass_lightning.attribution.settings import BiasMode, Settings, check_choices, checked, settings_of
from depass_lightning.engine.rules import AttentionPath
from depass_lightning.engine.validate import bind_checked
from depass_lightning.errors import DePassError
from depass_lightning.models.load import dtype_of, load_model
from depass_lightning.prompts import IdsLike, prompts_of
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.attributions import Attributions
from depass_lightning.results.circuit import Circuit
from depass_lightning.results.component import Decomposition
from depass_lightning.results.generation import Generation
from depass_lightning.sources import Source, Tokens, as_source
from depass_lightning.targets import LogitReading, TargetLike, as_targets


class DePass:
    """Attributes what a causal language model predicts to components of its prompts.

    The model is left unchanged: its mode, hooks, attention implementation, gradients and random state. Calls
    from several threads take turns on a model, and plain forward passes of other threads wait meanwhile.

    Args:
        model: a Hugging Face causal language model of a supported family.
        tokenizer: its tokenizer; without one, prompts and targets are passed as ids.
        compute_dtype: the precision of components and scores; by default float64 for a model in float64 and
            float32 for every other.
        memory_budget: bytes of working memory for one step of the engine, in addition to the components; by
            default chosen for the device.
        max_positions: the most tokens that a prompt may have; by default the configuration's
            `max_position_embeddings`. More is possible where positions are rotary, such as with scaled RoPE.
        process_group: a `torch.distributed` group whose processes share the components of each prompt, for
            very long prompts. All of them must make the same calls, and all get the same scores.

    Raises:
        DePassError: the model's architecture is not supported, or is not built as its family is declared.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        compute_dtype: str | torch.dtype | None = None,
        memory_budget: int | None = None,
        max_positions: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.memory_budget = memory_budget
        self.process_group = process_group
        precision = None if compute_dtype is None else dtype_of(compute_dtype)
        self.decoder = bind_checked(model, compute_dtype=precision, max_positions=max_positions)

    def __repr__(self) -> str:
        family = getattr(self.decoder.config, "model_type", None) or type(self.decoder.model).__name__
        return (
            f"DePass({self.decoder.name!r}, family {family}, {len(self.decoder.blocks)} blocks, "
            f"scores in {str(self.decoder.dtype).removeprefix('torch.')}, rule softmax unless rule= is given)"
        )

    @classmethod
    @checked
    def from_pretrained(
        cls,
        name: str = "tiny",
        *,
        compute_dtype: str | torch.dtype | None = None,
        memory_budget: int | None = None,
        max_positions: int | None = None,
        **options: Any,
    ) -> "DePass":
        """Load a model and its tokenizer.

        Args:
            name: `tiny` for the bundled model, a hub name, a folder, or the path of a `.gguf` file.
            compute_dtype: the precision of components and scores.
            memory_budget: bytes of working memory for one step of the engine.
            max_positions: the most tokens that a prompt may have.
            options: those of `depass_lightning.models.load.load_model`: `revision`, `dtype`, `device`,
                `device_map`.

        Raises:
            DePassError: the model cannot be loaded, or its architecture is not supported.
        """
        return cls(
            *load_model(name, **options),
            compute_dtype=compute_dtype,
            memory_budget=memory_budget,
            max_positions=max_positions,
        )

    @overload
    def attribute(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: str | None = None, target: TargetLike = None, **options: Unpack[AttributeOne]
    ) -> Attribution: ...

    @overload
    def attribute(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: str | None = None, target: Sequence[TargetLike] = (), **options: Unpack[AttributeOne]
    ) -> Attributions: ...

    @overload
    def attribute(
        self,
        prompt: Sequence[str] | None = None,
        target: TargetLike | Sequence[TargetLike] = None,
        **options: Unpack[AttributeSeveral],
    ) -> list[Attribution]: ...

    @overload
    def attribute(
        self,
        prompt: Sequence[str] | None = None,
        target: Sequence[Sequence[TargetLike]] = (),
        **options: Unpack[AttributeSeveral],
    ) -> list[Attributions]: ...

    @checked
    def attribute(  # noqa: D417 - the options are described by name
        self,
        prompt: str | Sequence[str] | None = None,
        target: TargetLike | Sequence[TargetLike] | Sequence[Sequence[TargetLike]] = None,
        **options: Any,
    ) -> Any:
        """Compute how much each component of a prompt contributes to a target.

        Args:
            prompt: one prompt, or several; `messages=` takes a conversation `[{"role", "content"}, ...]` or
                several in its place, here and in the other calls.
            target: what is explained; None for the model's own next token. For one prompt a list explains
                several targets from one recorded pass. For several prompts it is one for all, a list with one
                per prompt, or a list with a list for each prompt.
            source: what the state is split into, or its name, such as "heads"; by default `Tokens()`.
            rule: softmax (by default), max, relu, linear, taylor, half, shap, dual, auto, or a file (.json).
            temperature: of the softmax rule, by default 0.1.
            score_weight: of attention's scores under shap, from 0 (which is half) to 1; by default 0.5.
            bias: `component` (the default) scores constants as a component, so that scores sum to the value;
                `drop` leaves them out.
            compat: `paper_code` reproduces the published code, with its quirks; by default None.
            engine: `propagate` propagates components forward; `adjoint` scores a linear rule by one backward
                pass from the target; `auto` (the default) prefers the latter where it is exact.
            attention_path: `content` (the default) holds attention's probabilities fixed; `control`, under
                taylor, scores what is added when they are not: all paths to the target that pass at least
                once through a query or a key. These scores do not sum to the value.
            batch_size: how many prompts go through the model at once, by default 16; a prompt with several
                targets goes alone.
            progress: show a progress bar.
            input_ids: token ids instead of prompts, padded on either side; or lists of ids.
            attention_mask: 1 at the real positions of `input_ids`.

        Returns:
            One `Attribution` for one prompt; `Attributions`, a sequence with one per target, where its
            targets are a list. For several prompts or for ids a list of these, in their order.

        Raises:
            DePassError: a prompt is empty or too long, a target is not one token, there are too few or too
                many targets, a layer is out of range, a setting is unknown, or a value is not finite.
        """
        results = self.attribute_sources(prompt, target, [options.pop("source", None) or "tokens"], **options)
        return results[0] if isinstance(prompt, str) else [result for (result,) in results]

    @overload
    def attribute_sources(  # pyright: ignore[reportOverlappingOverload]
        self,
        prompt: str | None = None,
        target: TargetLike = None,
        sources: Sequence[Source | str] = (),
        **options: Unpack[SourcesOne],
    ) -> list[Attribution]: ...

    @overload
    def attribute_sources(
        self,
        prompt: str | None = None,
        target: Sequence[TargetLike] = (),
        sources: Sequence[Source | str] = (),
        **options: Unpack[SourcesOne],
    ) -> list[Attributions]: ...

    @overload
    def attribute_sources(
        self,
        prompt: Sequence[str] | None = None,
        target: TargetLike | Sequence[TargetLike] | Sequence[Sequence[TargetLike]] = None,
        sources: Sequence[Source | str] = (),
        **options: Unpack[SourcesSeveral],
    ) -> list[list[Any]]: ...

    @checked
    def attribute_sources(
        self,
        prompt: str | Sequence[str] | None = None,
        target: TargetLike | Sequence[TargetLike] | Sequence[Sequence[TargetLike]] = None,
        sources: Sequence[Source | str] = (),
        **options: Any,
    ) -> Any:
        """Attribute targets to the components of several sources, each by itself, from one recorded pass.

        Sources of one linear rule share the backward pass, too.

        Args:
            prompt: one prompt or several, as in `attribute`.
            target: what is explained, as in `attribute`.
            sources: what the state is split into, each source by itself.
            options: the other arguments of `attribute`.

        Returns:
            For one prompt a list with one result a source, each as `attribute` returns it; for several
            prompts or for ids a list of such lists, in their order.

        Raises:
            DePassError: the list of sources is empty, or what `attribute` raises.
        """
        parts = [as_source(source) for source in sources]
        ids, mask = options.pop("input_ids", None), options.pop("attention_mask", None)
        batch_size, progress = options.pop("batch_size", 16), options.pop("progress", False)
        settings = settings_by_rule(
            self.decoder,
            parts,
            memory_budget=self.memory_budget,
            process_group=self.process_group,
            **options,
        )
        prompts = prompts_of(self.decoder, self.tokenizer, prompt, ids, mask)
        targets = as_targets(target, None if isinstance(prompt, str) else len(prompts))
        asked = with_both_answers(self.decoder, self.tokenizer, prompts, targets, parts)
        questions = questions_of(self.decoder, self.tokenizer, *asked, parts)
        scored = attribute_by_rule(
            self.decoder, self.tokenizer, questions, settings, batch_size=batch_size, progress=progress
        )
        results = results_of(targets, prompts, scored)
        return results[0] if isinstance(prompt, str) else results

    @overload
    def decompose(  # pyright: ignore[reportOverlappingOverload]
        self, prompt: str | None = None, *, to_layer: int | None = None, **options: Unpack[DecomposeOne]
    ) -> Decomposition: ...

    @overload
    def decompose(
        self,
        prompt: Sequence[str] | None = None,
        *,
        to_layer: int | None = None,
        **options: Unpack[DecomposeSeveral],
    ) -> list[Decomposition]: ...

    @checked
    def decompose(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        to_layer: int | None = None,
        batch_size: int = 16,
        input_ids: IdsLike | None = None,
        attention_mask: IdsLike | None = None,
        **options: Any,
    ) -> Decomposition | list[Decomposition]:
        """Compute every component's state at one layer.

        Args:
            prompt: one prompt, or several.
            to_layer: the block whose input is decomposed; None for what the last block leaves.
            batch_size: how many prompts go through the model at once.
            input_ids: token ids instead of prompts.
            attention_mask: 1 at the real positions of `input_ids`.
            options: `source`, `rule`, `temperature`, `bias` and `compat` of `attribute`.

        Returns:
            One `Decomposition` for one prompt, a list for several or for ids, in their order.

        Raises:
            DePassError: what `attribute` raises; or the layer is out of range or before the source's.
        """
        settings = self._settings(engine="propagate", **options)
        prompts = prompts_of(self.decoder, self.tokenizer, prompt, input_ids, attention_mask)
        results = decompose(self.decoder, prompts, settings, to_layer, batch_size)
        return results[0] if isinstance(prompt, str) else results

    @checked
    def decompose_layers(
        self,
        prompt: str | None = None,
        *,
        input_ids: IdsLike | None = None,
        **options: Unpack[DecomposeOptions],
    ) -> Iterator[Decomposition]:
        """Compute every component's state at every layer of one prompt, one layer after another.

        Args:
            prompt: one prompt.
            input_ids: `[1, position]` the prompt's ids instead.
            options: `source`, `rule`, `temperature`, `bias` and `compat` of `attribute`.

        Returns:
            An iterator from the first layer at which all components exist. The model runs while it is read,
            and only the current layer is held.

        Raises:
            DePassError: there are several prompts, or what `attribute` raises.
        """
        settings = self._settings(engine="propagate", **options)
        prompts = prompts_of(self.decoder, self.tokenizer, prompt, input_ids, None)
        if len(prompts) != 1:
            raise DePassError(f"there are {len(prompts)} prompts; decompose the layers of one at a time")
        return decompose_layers(self.decoder, prompts[0], settings)

    @checked
    def attribute_generation(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 20,
        continuation: str | Sequence[int] | None = None,
        target: LogitReading = "logit",
        source: Tokens | None = None,
        rule: str = "softmax",
        rule_temperature: float = 0.1,
        score_weight: float = 0.5,
        bias: BiasMode = "component",
        attention_path: AttentionPath = "content",
        input_ids: IdsLike | None = None,
        **arguments: Any,
    ) -> Generation:
        """Generate a continuation, or take a given one, and attribute each token to all tokens before it.

        Args:
            prompt: one prompt.
            max_new_tokens: the most tokens to generate.
            continuation: a text or token ids to explain in place of what the model would generate.
            target: what is explained of each token, as in `Continuation`.
            source: the tokens of which layer; by default `Tokens()`.
            rule: how neurons are shared, as in `attribute`.
            rule_temperature: of the softmax rule.
            score_weight: of the shap rule.
            bias: whether constants have a component of their own, as in `attribute`.
            attention_path: `content` or `control`, as in `attribute`.
            input_ids: `[1, position]` the prompt's ids instead.
            arguments: of the model's own `generate`, `temperature` among them; greedy by default.

        Raises:
            DePassError: what `attribute` raises; or the finished text would be longer than the model's
                context, or `generate` refuses an argument.
        """
        settings = self._settings(
            source,
            rule=rule,
            temperature=rule_temperature,
            score_weight=score_weight,
            bias=bias,
            attention_path=attention_path,
        )
        check_choices(target=target)
        prompts = prompts_of(self.decoder, self.tokenizer, prompt, input_ids, None)
        arguments["max_new_tokens"] = max_new_tokens
        return generate(
            self.decoder, self.tokenizer, prompts, settings, arguments, target, answer=continuation
        )

    @checked
    def circuit(
        self,
        prompt: str | None = None,
        target: TargetLike = None,
        *,
        input_ids: IdsLike | None = None,
        **options: Unpack[CircuitOptions],
    ) -> Circuit:
        """Compute what every node of the model contributes directly through every later node.

        Args:
            prompt: one prompt.
            target: what is explained, as in `attribute`.
            input_ids: `[1, position]` the prompt's ids instead.
            nodes: `tokens`, or `embedding` for their sum; `heads`, or `attentions`; and `mlps`.
            rule: a linear rule, by default half; shap and dual separate values, queries and keys.
            score_weight: of the shap rule.
            corrupted: a second prompt with as many tokens, for `Circuit.difference`: the circuit of the
                difference between the two runs.
            by_position: give heads and MLPs a node at each position.

        Raises:
            DePassError: the rule is not linear, there are several prompts or targets, the prompts differ in
                length, the edges do not fit in memory, or what `attribute` raises.
        """
        prompts = prompts_of(self.decoder, self.tokenizer, prompt, input_ids, None)
        return circuit_of(self.decoder, self.tokenizer, prompts, target, self.memory_budget, **options)

    @checked
    def estimate(
        self,
        prompt: str | Sequence[str] | None = None,
        source: Source | str | None = None,
        *,
        batch_size: int = 16,
        input_ids: IdsLike | None = None,
        attention_mask: IdsLike | None = None,
        **options: Unpack[EstimateOptions],
    ) -> Estimate:
        """Estimate the time and memory that `attribute` will take, by trying a small piece of it.

        Args:
            prompt: one prompt, or several; or `messages=`.
            source: what the state is split into; by default `Tokens()`.
            batch_size: how many prompts go through the model at once.
            input_ids: token ids instead of prompts.
            attention_mask: 1 at the real positions of `input_ids`.
            options: `rule`, `temperature`, `bias`, `engine` and `attention_path` of `attribute`.

        Raises:
            DePassError: what `attribute` raises.
        """
        settings = self._settings(source, **options)
        prompts = prompts_of(self.decoder, self.tokenizer, prompt, input_ids, attention_mask)
        return estimate(self.decoder, prompts, settings, batch_size)

    def _settings(self, source: Source | str | None = None, **options: Any) -> Settings:
        return settings_of(self.decoder, [as_source(source)], memory_budget=self.memory_budget, **options)
