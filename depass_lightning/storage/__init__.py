"""Results on disk: shards written atomically, merged by index and read back as attributions."""

from depass_lightning.storage.attribution_rows import (
    ATTRIBUTION_SCHEMA,
    attribution_from_row,
    attribution_to_row,
    read_attributions,
)
from depass_lightning.storage.checksums import check_file, checked_file
from depass_lightning.storage.component_states import read_states, write_states
from depass_lightning.storage.manifest import (
    Manifest,
    OtherRunError,
    keep_manifest,
    read_manifest,
    task_fingerprint,
    weights_fingerprint,
)
from depass_lightning.storage.run_store import RunStore
from depass_lightning.storage.shards import (
    UNREADABLE,
    RowFile,
    merge_shards,
    open_shard,
    read_rows,
    write_shard,
)
from depass_lightning.utils.atomic_files import read_json_lines, write_json, write_json_lines

__all__ = [
    "ATTRIBUTION_SCHEMA",
    "UNREADABLE",
    "Manifest",
    "OtherRunError",
    "RowFile",
    "RunStore",
    "attribution_from_row",
    "attribution_to_row",
    "check_file",
    "checked_file",
    "keep_manifest",
    "merge_shards",
    "open_shard",
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
