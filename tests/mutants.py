"""Change one thing after another in a file, and list the changes that no test notices: `make mutants`.

Each file is changed in a copy of the last commit by cosmic-ray, and its tests are run there until the first
fails. That takes between minutes and hours a file, and days for all; for one take
`make mutants ARGS=depass_lightning/monitoring/throttle.py`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "depass_lightning/engine/rules.py": "rules linear_rules",
    "depass_lightning/engine/adjoint.py": "adjoint linear_rules",
    "depass_lightning/engine/variants/top_neurons.py": "neurons",
    "depass_lightning/engine/freeze.py": "engine_twin families",
    "depass_lightning/engine/state.py": "engine_twin engine_batches",
    "depass_lightning/engine/control.py": "linear_rules adjoint",
    "depass_lightning/engine/frozen.py": "engine_twin families",
    "depass_lightning/engine/component_groups.py": "twin_sources neurons",
    "depass_lightning/engine/isolation.py": "isolation engine_untouched",
    "depass_lightning/engine/packing.py": "engine_twin engine_batches",
    "depass_lightning/engine/memory.py": "neurons layers",
    "depass_lightning/engine/propagate.py": "engine_twin twin_sources",
    "depass_lightning/engine/record.py": "engine_twin engine_untouched",
    "depass_lightning/engine/variants/paper_code.py": "oracle oracle_sources",
    "depass_lightning/engine/variants/rounding.py": "precision",
    "depass_lightning/engine/mlp.py": "engine_twin engine_batches spread",
    "depass_lightning/engine/parallel.py": "spread",
    "depass_lightning/engine/validate.py": "families",
    "depass_lightning/storage/checksums.py": "damage storage",
    "depass_lightning/storage/fingerprint.py": "storage",
    "depass_lightning/storage/run_store.py": "storage damage resume",
    "depass_lightning/storage/json_files.py": "storage damage",
    "depass_lightning/storage/manifest.py": "resume damage",
    "depass_lightning/storage/attribution_rows.py": "storage",
    "depass_lightning/storage/shards.py": "storage damage",
    "depass_lightning/storage/component_states.py": "storage damage",
    "depass_lightning/monitoring/dataloader_prompts.py": "callback_loader",
    "depass_lightning/monitoring/history.py": "callback",
    "depass_lightning/monitoring/throttle.py": "callback_pace",
    "depass_lightning/monitoring/probe_sets.py": "callback_probes",
    "depass_lightning/monitoring/publish.py": "loggers loggers_served",
    "depass_lightning/monitoring/runner.py": "callback callback_failures",
    "callbacks/process_monitor.py": "callback_watch resume",
    "callbacks/prediction_writer.py": "resume damage",
}
CONFIG = """\
[cosmic-ray]
module-path = "{file}"
timeout = 300.0
excluded-modules = []
test-command = "{command}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
# Types are written with |, and a decorator is missed by every test or by none.
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*", "core/RemoveDecorator"]
"""


def survivors(file: str, copy: Path, folder: Path) -> tuple[int, list[str]]:
    """Return how many changes of a file were tried, and those that no test has noticed.

    Args:
        file: the file, as in `TESTS`.
        copy: a copy of the repository, which is changed.
        folder: where the list of changes is kept meanwhile.
    """
    tests = [f"tests/test_{name}.py" for name in TESTS[file].split()]
    command = shlex.join([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests])
    config, session = folder / "mutants.toml", folder / "mutants.sqlite"
    config.write_text(CONFIG.format(file=file, command=command), encoding="utf-8")
    session.unlink(missing_ok=True)
    for tool, *arguments in (
        ("cosmic_ray.cli", "init", str(config), str(session)),
        ("cosmic_ray.tools.filters.operators_filter", str(session), str(config)),
        ("cosmic_ray.cli", "exec", str(config), str(session)),
    ):
        subprocess.run([sys.executable, "-m", tool, *arguments], cwd=copy, check=True)
    report = [sys.executable, "-m", "cosmic_ray.tools.report", "--show-diff", str(session)]
    said = subprocess.run(report, cwd=copy, check=True, capture_output=True, text=True).stdout
    tried = [part for part in said.split("[job-id]") if "test outcome: TestOutcome." in part]
    return len(tried), [part for part in tried if "test outcome: TestOutcome.SURVIVED" in part]


def main() -> int:
    files = sys.argv[1:] or list(TESTS)
    if unknown := [file for file in files if file not in TESTS]:
        print(f"{unknown[0]} has no tests here; there are {', '.join(TESTS)}", file=sys.stderr)
        return 2
    alive = 0
    with TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        for file in files:
            count, changes = survivors(file, copy, Path(folder))
            print(*changes, f"{file}: {len(changes)} of {count} changes survive", sep="\n", flush=True)
            alive += len(changes)
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
