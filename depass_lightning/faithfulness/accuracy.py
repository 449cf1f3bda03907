"""Which prompts of a task the model answers right."""

from collections.abc import Iterable

from depass_lightning.attribution.question import Question
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.component_masking import MaskedPrompt, answer_ids, check_answers
from depass_lightning.prompts import prompts_of
from depass_lightning.targets import Token
from depass_lightning.tasks import Example


def answered_right(
    depass: DePass,
    task: Iterable[Example],
    batch_size: int = 16,
    *,
    exact: bool = False,
    progress: bool = False,
) -> list[int]:
    """Return the indices of the examples whose answer is the model's greedy continuation.

    A prompt that is empty, too long for the model, or has no known answer is not answered right. A masked
    language model's answer is the token at the mask, a classifier's the label.

    Args:
        depass: the model, with its tokenizer.
        task: the examples.
        batch_size: the number of prompts in one pass.
        exact: compare the whole answer; otherwise its first token.
        progress: show a progress bar.

    Raises:
        DePassError: there is no tokenizer.
    """
    if depass.tokenizer is None:
        raise DePassError("prompts are text, but there is no tokenizer; use DePass(model, tokenizer)")
    prompts: list[MaskedPrompt] = []
    indices: list[int] = []
    for index, example in enumerate(task):
        try:
            (prompt,) = prompts_of(depass.decoder, depass.tokenizer, example.prompt, None, None)
        except DePassError:
            continue
        if example.answer is None:
            continue
        if depass.decoder.head.kind != "causal":
            try:
                question = Question.of(
                    depass.decoder, depass.tokenizer, prompt, Token(example.answer, first=True)
                )
            except DePassError:
                continue
            prompts.append(MaskedPrompt(prompt.ids, question.reads[0].ids or [], position=question.position))
            indices.append(index)
        elif answer := answer_ids(depass, example.prompt, example.answer):
            prompts.append(MaskedPrompt(prompt.ids, answer if exact else answer[:1]))
            indices.append(index)
    checks = check_answers(depass.decoder, prompts, batch_size=batch_size, progress=progress)
    return [index for index, check in zip(indices, checks, strict=True) if check.exact]
