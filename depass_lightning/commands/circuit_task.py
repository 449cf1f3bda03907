"""`python analyze.py circuit=true`: the circuit of every prompt of a task, and their mean by role."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from depass_lightning.commands.attribute_task import resolve_rule, rule_options, task_of
from depass_lightning.commands.shell import first_process, print_stderr
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.logit_lens import describe_nodes
from depass_lightning.modules.attribution_module import Explained
from depass_lightning.prompts import prompts_of
from depass_lightning.reports.circuit_page import write_circuit_page
from depass_lightning.results.circuit import Circuit
from depass_lightning.sources import Tokens
from depass_lightning.storage import write_json
from depass_lightning.tasks import Example


def run_circuits(
    config: DictConfig, folder: Path, load: Callable[[DictConfig], DePass], console: Console
) -> int:
    """Compute the circuits of a task's prompts, write them with a page, and return the exit code.

    Raises:
        DePassError: the rule is not linear, or no prompt has a circuit.
    """
    if not first_process():
        return 0
    explained = Explained(**config.target)
    if explained.kind == "generation":
        raise DePassError("a circuit explains one target: choose target=own or target=contrast")
    task = task_of(config)
    depass = load(config)
    resolve_rule(config, depass.decoder, Tokens())
    options = {
        name: value for name, value in rule_options(config).items() if name in ("rule", "score_weight")
    }
    task = task.formatted(depass.tokenizer)
    circuits: list[Circuit] = []
    by_role, skipped = [], list(task.skipped)
    for number, example in enumerate(task):
        try:
            circuit = depass.circuit(example.prompt, explained.target(example, depass.tokenizer), **options)
        except DePassError as error:
            skipped.append({"id": example.id, "reason": str(error)})
            if "no linear rule" in str(error):
                raise DePassError(f"{error}; add rule=half") from error
            continue
        circuit.metadata |= {"id": example.id, "model": config.model.name}
        circuit.save(folder / "circuits" / f"{number:05d}.safetensors")
        circuits.append(circuit)
        by_role.append(circuit.by_role(_roles(depass, example, circuit.position)))
    if not circuits:
        raise DePassError(f"none of {len(task)} prompts has a circuit; the first: {skipped[0]['reason']}")
    mean = _write(folder, [describe_nodes(depass, circuits[0]), *circuits[1:]], by_role, task.name)
    numbers = {
        "prompts": len(circuits),
        "skipped": skipped,
        "completeness": max(circuit.completeness for circuit in circuits),
    }
    write_json(folder / "summary.json", numbers)
    mean.show()
    console.print(Text(f"page     {folder / 'report.html'}\nfolder   {folder}"), soft_wrap=True)
    if skipped:
        print_stderr(f"{len(skipped)} prompts were skipped, listed in {folder / 'summary.json'}", "red")
    return int(bool(skipped))


def _write(folder: Path, circuits: list[Circuit], by_role: list[Circuit], task: str) -> Circuit:
    """Write the mean with its page and figure, and the page of the first prompt; return the mean."""
    first = circuits[0]
    several = len(circuits) > 1
    mean = Circuit.mean(by_role) if several else first
    mean.save(folder / "circuit.safetensors")
    mean.plot(folder / "figures" / "circuit.svg")
    title = f"{task}: mean circuit of {len(circuits)} prompts" if several else f"{task}: one prompt's circuit"
    write_circuit_page(folder / "report.html", mean, title=title, subtitle=mean.text)
    if several:
        first.to_html(folder / "first.html")
    return mean


def _roles(depass: DePass, example: Example, position: int) -> dict[int, str]:
    """Return the role of each token that has one; the spans of a role with several are numbered."""
    (prompt,) = prompts_of(depass.decoder, depass.tokenizer, example.prompt, None, None)
    roles = {position: "end"}
    for name, spans in example.roles.items():
        for number, (start, end) in enumerate(sorted(spans), start=1):
            label = name.replace("_", " ") + (f" {number}" if len(spans) > 1 else "")
            for place, (low, high) in enumerate((prompt.offsets or [])[: position + 1]):
                if low < end and start < high:
                    roles[place] = label
    return roles
