"""Convert an attribution to a row of a table, and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from depass_lightning.results.attribution import Attribution
from depass_lightning.results.component import from_columns, to_columns
from depass_lightning.storage.shards import read_rows
from depass_lightning.utils.sections import Section

RANGES = pa.list_(pa.list_(pa.int32()))
ROLES = pa.list_(pa.struct([("name", pa.string()), ("start", pa.int32()), ("end", pa.int32())]))
SECTIONS = pa.list_(
    pa.struct([("kind", pa.string()), ("name", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
)
CURVE = pa.list_(pa.float64())
REMOVAL = ("patch_top", "recover_top", "patch_random", "recover_random")
READINGS = ("_logit", "_log_odds", "_rank")
RATIONALES = ("comprehensiveness", "sufficiency", "comprehensiveness_random", "sufficiency_random")
MASKING = ("mask_top", "mask_bottom", "mask_random")

ATTRIBUTION_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        # the attribution
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("token_ids", pa.list_(pa.int64())),
        ("offsets", RANGES),
        ("target", pa.string()),
        ("value", pa.float64()),
        ("scores", pa.list_(pa.float32())),
        # its components, a list each: see `results.component.Component`
        ("kinds", pa.list_(pa.string())),
        ("names", pa.list_(pa.string())),
        ("layers", pa.list_(pa.int32())),
        ("indices", pa.list_(pa.int32())),
        ("positions", RANGES),
        ("groups", pa.int32()),
        ("source", pa.string()),
        ("rule", pa.string()),
        ("layer", pa.int32()),
        ("position", pa.int32()),
        ("prediction", pa.string()),
        ("probability", pa.float64()),
        ("rank", pa.int32()),
        ("remainder", pa.float64()),
        ("answer_start", pa.int32()),
        ("completeness", pa.float64()),
        ("target_ids", pa.list_(pa.int64())),
        ("method", pa.string()),
        ("attention_path", pa.string()),
        ("sections", SECTIONS),
        ("metadata", pa.string()),
        # what is known about the prompt, and measured on it
        ("answer", pa.string()),
        ("foil", pa.string()),
        ("correct", pa.bool_()),
        ("roles", ROLES),
        ("evidence", RANGES),
        ("evidence_first", pa.bool_()),
        ("evidence_chance", pa.float64()),
        ("evidence_auroc", pa.float64()),
        # citations removed
        ("lds", pa.float64()),
        *((f"drop_{count}{suffix}", pa.float64()) for count in (1, 3, 5) for suffix in ("", "_random")),
        # tokens removed, the last one too or never ("kept_"), or their embeddings zeroed
        ("percents", CURVE),
        *((name, CURVE) for name in REMOVAL),
        *((f"{name}{reading}", CURVE) for reading in READINGS for name in REMOVAL),
        *((f"kept_{name}{reading}", CURVE) for reading in ("", *READINGS) for name in REMOVAL),
        *((f"zero_{name}", CURVE) for name in REMOVAL),
        *((f"zero_{name}_logit", CURVE) for name in REMOVAL),
        *(
            (f"{prefix}{name}{reading}", pa.float64())
            for prefix in ("", "kept_")
            for reading in ("", "_log_odds")
            for name in RATIONALES
        ),
        # heads or neurons masked
        ("masked_percents", CURVE),
        *((name, CURVE) for name in MASKING),
        *((f"{name}_probability", CURVE) for name in MASKING),
        # the run
        ("model", pa.string()),
        ("fingerprint", pa.string()),
        ("states", pa.string()),
    ]
)
"""The columns of a run's attributions.

Ranges are pairs `[start, end)` of characters or tokens. `states` is the SHA-256 of the file with the prompt's
component states.
"""

PLAIN = tuple(field.name for field in dataclasses.fields(Attribution) if field.name != "components")


def attribution_to_row(attribution: Attribution) -> dict[str, Any]:
    """Return the attribution's fields and completeness error as columns of `ATTRIBUTION_SCHEMA`."""
    row = {name: getattr(attribution, name) for name in PLAIN} | to_columns(attribution.components)
    row["scores"] = attribution.scores.tolist()
    row["sections"] = [section._asdict() for section in attribution.sections]
    row["completeness"] = attribution.completeness
    row["metadata"] = json.dumps(attribution.metadata, ensure_ascii=False)
    return row


def attribution_from_row(row: Mapping[str, Any]) -> Attribution:
    """Return the attribution that `attribution_to_row` converted to this row.

    Raises:
        DePassError: an earlier version wrote the row.
    """
    components = from_columns(row)  # first: an earlier version's rows lack other fields too
    fields = {name: row[name] for name in PLAIN}
    fields["sections"] = [Section(**section) for section in row["sections"]]
    fields["scores"] = torch.tensor(row["scores"], dtype=torch.float32)
    fields["metadata"] = json.loads(row["metadata"])
    if row["offsets"] is not None:
        fields["offsets"] = [tuple(pair) for pair in row["offsets"]]
    return Attribution(components=components, **fields)


def read_attributions(path: str | Path) -> list[Attribution]:
    """Read the attributions of a run, in the order of its prompts.

    Args:
        path: a run's `attributions` folder, or a Parquet file in it.
    """
    return [attribution_from_row(row) for row in read_rows(path)]
