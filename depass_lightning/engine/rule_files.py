"""Files of calibrated rules: the weights of each block, the model that they were fitted to, and on what."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depass_lightning.engine.linear_rules import CalibratedRule
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder

SUFFIX = ".json"
KIND = "depass-lightning rule"


def rule_content(weights: Sequence[tuple[float, float]], decoder: Decoder, **notes: Any) -> dict[str, Any]:
    """Return what a rule's file holds.

    Args:
        weights: of each block that of the gate and that of attention's scores.
        decoder: the model that they were fitted to.
        notes: what else the file records, such as the prompts.
    """
    return {
        "kind": KIND,
        "family": decoder.config.model_type,
        "blocks": [{"gate": gate, "scores": scores} for gate, scores in weights],
        **notes,
    }


def read_rule(path: str) -> CalibratedRule:
    """Read a calibrated rule.

    Args:
        path: its file, as `experiment=calibrate` writes it.

    Raises:
        DePassError: the file is missing or is no such file, or a weight is not between 0 and 1.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DePassError(f"there is no rule file {path}; `experiment=calibrate` writes one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DePassError(f"the rule file {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DePassError(f'{path} is no rule file: its "kind" is not {KIND!r}')
    family, blocks = content.get("family"), content.get("blocks")
    if not isinstance(family, str) or not isinstance(blocks, list) or not blocks:
        raise DePassError(f'the rule file {path} needs a "family" and a list of "blocks"')
    weights = tuple(
        CalibratedRule.weights(_weight(path, index, block, "gate"), _weight(path, index, block, "scores"))
        for index, block in enumerate(blocks)
    )
    return CalibratedRule(blocks=weights, path=path, family=family)


def _weight(path: str, index: int, block: Any, name: str) -> float:
    value = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise DePassError(
            f'the rule file {path}: "{name}" of block {index} is {value!r}; it must be from 0 to 1'
        )
    return float(value)


def check_rule(rule: CalibratedRule, decoder: Decoder) -> None:
    """Refuse a rule that was fitted to another kind of model.

    Raises:
        DePassError: the model's type or its number of blocks is another one.
    """
    ours = decoder.config.model_type, len(decoder.blocks)
    theirs = rule.family, len(rule.blocks)
    if ours != theirs:
        raise DePassError(
            f"the rule file {rule.path} was fitted to a model of type '{theirs[0]}' with {theirs[1]} blocks; "
            f"this one is of type '{ours[0]}' with {ours[1]}. Run experiment=calibrate on it"
        )
