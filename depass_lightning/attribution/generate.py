"""Attribute every token that a model generates, or of a given text, from one recorded pass over all of it.

1. The model generates by its own `generate`, unless the continuation is given.
2. One plain pass over the finished text is recorded. Later tokens cannot reach earlier ones, so every
   generated token depends on the same states as when it was generated.
3. Components are propagated through that pass once, and read at every position from which a token was
   generated, with that token's row of the unembedding.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from depass_lightning.attribution.attribute import attribute_batch, warn_of_gaps
from depass_lightning.attribution.question import Question, answer_ids, check_continues
from depass_lightning.attribution.settings import Settings
from depass_lightning.engine.isolation import undisturbed
from depass_lightning.errors import DePassError, DePassWarning
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import Prompt, continued
from depass_lightning.results.generation import Generation
from depass_lightning.sources import Tokens
from depass_lightning.targets import LogitReading, token_target
from depass_lightning.utils.tokenization import continuation


def generate(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: list[Prompt],
    settings: Settings,
    arguments: Mapping[str, Any],
    reading: LogitReading = "logit",
    answer: str | Sequence[int] | None = None,
) -> Generation:
    """Generate a continuation of a prompt, or take a given one, and attribute every token of it.

    Args:
        decoder: the model.
        tokenizer: its tokenizer; None shows ids.
        prompts: one prompt.
        settings: how the pass is made, for one source.
        arguments: of the model's own `generate`, `max_new_tokens` among them.
        reading: what is explained of each token.
        answer: the continuation as text or ids; None generates one.

    Raises:
        DePassError: there are several prompts, the source is not `Tokens`, the text would be longer than the
            model's context, `generate` refuses an argument, the given continuation is invalid, or the model's
            values are not finite.
    """
    check_continues(decoder)
    if len(prompts) != 1:
        raise DePassError(f"there are {len(prompts)} prompts; generate from one at a time")
    (source,), (prompt,) = settings.sources, prompts
    if not isinstance(source, Tokens):
        raise DePassError(f"source is {type(source).__name__}; what is generated is attributed to Tokens()")
    if source.refine is not None:
        raise DePassError("Tokens(refine=) explains one target at a time; leave refine out for an answer")
    count = len(prompt.ids)
    if answer is None:
        ids = _generated(decoder, tokenizer, prompt, arguments)
        _warn_of_borders(decoder, count, len(ids))
    elif unused := sorted(arguments.keys() - {"max_new_tokens"}):
        raise DePassError(f"the continuation is given, so that nothing is generated; leave out {unused[0]}")
    else:
        ids = answer_ids(decoder, tokenizer, prompt, answer)
    text = continued(prompt, ids, tokenizer)
    # The token after a position is that position's target.
    questions = [
        Question.of(decoder, tokenizer, text, token_target(token, reading, count - 1 + index))
        for index, token in enumerate(ids)
    ]
    ((results,),) = attribute_batch(decoder, tokenizer, [questions], settings)
    if settings.complete:
        warn_of_gaps(results)
    decoded = None if tokenizer is None else continuation(text.ids, count, tokenizer)
    return Generation(results, decoded)


def _warn_of_borders(decoder: Decoder, count: int, new: int) -> None:
    """Warn where a text grew past a length at which the model changes its rotary frequencies."""
    last = count + new - 1
    if decoder.regime(count) == decoder.regime(last):
        return
    border = next(
        length for length in range(count, last) if decoder.regime(length + 1) != decoder.regime(length)
    )
    warnings.warn(
        f"past {border} tokens the model changes the frequencies of its positions, and this text grew from "
        f"{count} to {last}: what was generated before is explained as the model reads it in the "
        "finished text, where its values may be others; attribute shorter texts to see it as it was "
        "generated",
        DePassWarning,
        stacklevel=3,
    )


class _StopStrings(StoppingCriteria):
    """Ends what is generated at a string. transformers' criterion cannot read word-level vocabularies."""

    def __init__(self, strings: Sequence[str], start: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings, self.start, self.tokenizer = strings, start, tokenizer

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        texts = [continuation(ids, self.start, self.tokenizer) for ids in input_ids.tolist()]
        ended = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _generated(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    arguments: Mapping[str, Any],
) -> list[int]:
    """The ids that the model itself adds, greedily unless it is asked for something else."""
    new, count, limit = arguments["max_new_tokens"], len(prompt.ids), decoder.max_positions
    if not isinstance(new, int) or new < 1:
        raise DePassError(f"max_new_tokens is {new!r}; it must be a whole number of at least 1")
    if limit is not None and count + new > limit:
        raise DePassError(
            f"{prompt.name} has {count} tokens, and {new} new ones are more than the model's context of "
            f"{limit} takes; shorten it, or take fewer by max_new_tokens"
        )
    chosen = dict(arguments)
    configured = chosen.get("generation_config") or getattr(decoder.model, "generation_config", None)
    stops = chosen.pop("stop_strings", None) or getattr(configured, "stop_strings", None)
    if stops:
        if tokenizer is None:
            raise DePassError(
                f"stop_strings={stops!r} is text, but there is no tokenizer; pass one to DePass"
            )
        stop = _StopStrings([stops] if isinstance(stops, str) else stops, len(prompt.ids), tokenizer)
        criteria = StoppingCriteriaList([*chosen.get("stopping_criteria", []), stop])
        chosen |= {"stop_strings": None, "stopping_criteria": criteria}
    if "generation_config" not in chosen:
        chosen.setdefault("do_sample", False)
    ids = torch.tensor([prompt.ids], device=decoder.device)
    if not hasattr(decoder.model, "generate"):
        raise DePassError(f"{decoder.name} has no generate(); pass the answer as continuation=")
    with undisturbed(decoder.model):
        try:
            output: Any = decoder.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids, attention_mask=torch.ones_like(ids), **chosen
            )
        except (TypeError, ValueError) as error:
            raise DePassError(f"the model's generate refuses these arguments: {error}") from error
    sequences = output if isinstance(output, Tensor) else output.sequences
    if len(sequences) != 1:
        raise DePassError(f"generate gave {len(sequences)} texts; ask for one: num_return_sequences=1")
    return sequences[0, len(prompt.ids) :].tolist()
