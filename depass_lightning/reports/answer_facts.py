"""What reports write of whole answers: the model's own tokens, and what prompt and answer contribute."""

from depass_lightning.reports.numbers import ordinal, percent, signed, visible
from depass_lightning.results.attribution import Attribution

PARTS = {
    "prompt": "from the prompt",
    "answer": "from the answer's earlier tokens",
    "chosen": "from the chosen answer's tokens",
    "rejected": "from the rejected answer's tokens",
    "other": "from elsewhere",
}


COMPARED = "compared with"  # of an embedding, in place of a prediction


def prediction_name(attribution: Attribution) -> str:
    """Return what an attribution's prediction is: a token, a label, an answer's start, another text.

    Args:
        attribution: the attribution.
    """
    if "chosen_log_probability" in attribution.metadata:
        return "the more likely answer"
    if attribution.metadata.get("labels"):
        return "most likely label"
    if attribution.metadata.get("encoder") in ("masked", "embedding"):
        return "masked token" if attribution.metadata["encoder"] == "masked" else COMPARED
    return "model's answer begins" if attribution.whole_answer else "next token"


def prediction_text(attribution: Attribution) -> str:
    """Return the model's prediction, and the target's rank and probability.

    Args:
        attribution: the attribution.
    """
    if prediction_name(attribution) == COMPARED and not attribution.prediction:
        return ""  # an encoder without a head predicts nothing
    text = f"{prediction_name(attribution)} {visible(attribution.prediction)!r}"
    if attribution.rank is not None:
        text += f"; the target is the model's {ordinal(attribution.rank)} choice"
    if attribution.probability is not None:
        of = ", " if attribution.rank is not None else "; the target's "
        text += f"{of}probability {percent(attribution.probability)}"
    return text


def answer_facts(attribution: Attribution) -> dict[str, str]:
    """Return the sums of an answer's scores by part, and the remainder, each with its name.

    Args:
        attribution: the attribution; of a prompt without an answer only the remainder is returned.
    """
    sums = attribution.part_sums()
    facts: dict[str, str] = {}
    if sums.keys() & {"answer", "chosen", "rejected"}:
        facts = {name: signed(sums[part]) for part, name in PARTS.items() if part in sums}
    if attribution.remainder is not None:
        kind = "log-odds" if "log-odds" in attribution.target else "log-probability"
        facts[f"remainder to the {kind}"] = signed(attribution.remainder)
    return facts
