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
    "depass_lightning/engine/rules.py": "engine/rules engine/linear_rules",
    "depass_lightning/engine/adjoint.py": "engine/adjoint engine/linear_rules",
    "depass_lightning/engine/variants/top_neurons.py": "engine/neurons",
    "depass_lightning/engine/freeze.py": "engine/twin models/families",
    "depass_lightning/engine/attention.py": "engine/twin engine/batches",
    "depass_lightning/engine/state.py": "engine/twin engine/batches",
    "depass_lightning/engine/control.py": "engine/linear_rules engine/adjoint",
    "depass_lightning/engine/score_path.py": "engine/linear_rules",
    "depass_lightning/engine/frozen.py": "engine/twin models/families",
    "depass_lightning/engine/component_groups.py": "engine/twin_sources engine/neurons",
    "depass_lightning/engine/isolation.py": "engine/isolation engine/untouched",
    "depass_lightning/engine/packing.py": "engine/twin engine/batches",
    "depass_lightning/engine/memory.py": "engine/neurons attribution/layers",
    "depass_lightning/engine/propagate.py": "engine/twin engine/twin_sources",
    "depass_lightning/engine/record.py": "engine/twin engine/untouched",
    "depass_lightning/engine/variants/paper_code.py": "engine/oracle engine/oracle_sources",
    "depass_lightning/engine/variants/rounding.py": "commands/precision",
    "depass_lightning/engine/mlp.py": "engine/twin engine/batches engine/parallel",
    "depass_lightning/engine/parallel.py": "engine/parallel",
    "depass_lightning/engine/validate.py": "models/families",
    "depass_lightning/attribution/refinement.py": "attribution/refinement",
    "depass_lightning/storage/checksums.py": "storage/damage",
    "depass_lightning/storage/run_store.py": "storage/storage storage/damage commands/resume",
    "depass_lightning/utils/atomic_files.py": "utils/json_files storage/damage",
    "depass_lightning/storage/manifest.py": "storage/storage commands/resume storage/damage",
    "depass_lightning/storage/attribution_rows.py": "storage/storage",
    "depass_lightning/storage/shards.py": "storage/storage storage/damage",
    "depass_lightning/storage/component_states.py": "storage/component_states storage/damage",
    "depass_lightning/monitoring/dataloader_prompts.py": "callbacks/callback_loader",
    "depass_lightning/monitoring/history.py": "callbacks/callback",
    "depass_lightning/monitoring/throttle.py": "callbacks/callback_pace",
    "depass_lightning/monitoring/probe_sets.py": "callbacks/callback_probes",
    "depass_lightning/monitoring/sinks.py": "callbacks/loggers callbacks/loggers_served",
    "depass_lightning/monitoring/runner.py": "callbacks/callback callbacks/callback_failures",
    "callbacks/process_monitor.py": "callbacks/callback_watch commands/resume",
    "callbacks/prediction_writer.py": "commands/resume storage/damage",
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


def paths_of(tests: str) -> list[str]:
    """Return the test files that an entry of `TESTS` names."""
    return [f"tests/{folder}/test_{name}.py" for folder, name in (test.split("/") for test in tests.split())]


def survivors(file: str, copy: Path, folder: Path) -> tuple[int, list[str]]:
    """Return how many changes of a file were tried, and those that no test has noticed.

    Args:
        file: the file, as in `TESTS`.
        copy: a copy of the repository, which is changed.
        folder: where the list of changes is kept meanwhile.
    """
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command = shlex.join([*pytest, *paths_of(TESTS[file])])
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
