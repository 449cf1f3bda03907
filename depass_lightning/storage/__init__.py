"""Results on disk: shards that are whole or absent, merged by index, read back as attributions."""

from depass_lightning.storage.fingerprint import weights_fingerprint
from depass_lightning.storage.journal import Journal
from depass_lightning.storage.json_files import read_json_lines, write_json, write_json_lines
from depass_lightning.storage.manifest import Manifest, keep_manifest, read_manifest, task_fingerprint
from depass_lightning.storage.rows import (
    ATTRIBUTION_SCHEMA,
    attribution_from_row,
    attribution_to_row,
    read_attributions,
)
from depass_lightning.storage.shards import RowFile, merge_shards, read_rows, write_shard
from depass_lightning.storage.states import read_states, write_states

__all__ = [
    "ATTRIBUTION_SCHEMA",
    "Journal",
    "Manifest",
    "RowFile",
    "attribution_from_row",
    "attribution_to_row",
    "keep_manifest",
    "merge_shards",
    "read_attributions",
    "read_json_lines",
    "read_manifest",
    "read_rows",
    "read_states",
    "task_fingerprint",
    "weights_fingerprint",
    "write_json",
    "write_json_lines",
    "write_shard",
    "write_states",
]
