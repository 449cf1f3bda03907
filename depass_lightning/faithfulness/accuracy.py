"""Which prompts of a task the model answers right."""

from collections.abc import Iterable

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.component_masking import Asked, answer_ids, answers_given
from depass_lightning.prompts import prompts_of
from depass_lightning.tasks import Example


def answered_right(
    depass: DePass,
    task: Iterable[Example],
    batch_size: int = 16,
    *,
    exact: bool = False,
    progress: bool = False,
) -> list[int]:
    """Return the indices of the examples whose answer is what the model goes on with, greedily.

    A prompt that the model cannot read, because it is empty or too long, is not answered right.

    Args:
        depass: the model, with its tokenizer.
        task: the examples.
        batch_size: how many prompts go through the model at once.
        exact: ask for the whole answer; else its first token is enough.
        progress: show a progress bar.

    Raises:
        DePassError: there is no tokenizer.
    """
    if depass.tokenizer is None:
        raise DePassError("prompts are text, but there is no tokenizer; use DePass(model, tokenizer)")
    asked, indices = [], []
    for index, example in enumerate(task):
        try:
            (prompt,) = prompts_of(depass.decoder, depass.tokenizer, example.prompt, None, None)
        except DePassError:
            continue
        if answer := answer_ids(depass, example.prompt, example.answer):
            asked.append(Asked(prompt.ids, answer if exact else answer[:1]))
            indices.append(index)
    given = answers_given(depass.decoder, asked, batch_size=batch_size, progress=progress)
    return [index for index, own in zip(indices, given, strict=True) if own.exact]
