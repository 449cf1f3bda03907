"""The circuit of a probe set: the mean over its probes, and its largest edges, which runs are compared by."""

from collections.abc import Mapping, Sequence
from typing import Any

from depass_lightning.attribution.automatic_rule import AUTO
from depass_lightning.attribution.settings import RuleOptions
from depass_lightning.depass import DePass
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.rules import rule_named
from depass_lightning.errors import DePassError
from depass_lightning.monitoring.probe_sets import ProbePrompt
from depass_lightning.results.circuit import Circuit
from depass_lightning.results.circuit_edges import overlap

EDGES = 50  # the largest edges, which runs are compared by
CIRCUIT_SCALARS = ("circuit_overlap_first", "circuit_overlap_previous")


def circuit_options(settings: RuleOptions) -> dict[str, Any]:
    """Return the options of `DePass.circuit` that the settings of attributions imply.

    Args:
        settings: the settings; for `auto`, the rule is `half`.

    Raises:
        DePassError: the rule is not linear.
    """
    chosen: dict[str, Any] = {**settings}
    options = {name: chosen[name] for name in ("rule", "score_weight") if name in chosen}
    options["rule"] = "half" if options.get("rule", AUTO) == AUTO else options["rule"]
    if not isinstance(
        rule_named(options["rule"], score_weight=options.get("score_weight", 0.5)), LinearPaths
    ):
        raise DePassError(
            f"circuit=True needs a linear rule, not {options['rule']!r}: auto, half, taylor, shap or dual"
        )
    return options


def circuit_of_probe(depass: DePass, probe: ProbePrompt, options: Mapping[str, Any]) -> Circuit:
    """Return a probe's circuit, with one node for all tokens."""
    prompt = {"prompt": probe.prompt} if probe.ids is None else {"input_ids": [list(probe.ids)]}
    return depass.circuit(**prompt, target=probe.target, nodes=("embedding", "heads", "mlps"), **options)


def largest_edges(circuit: Circuit | None) -> dict[str, float]:
    """Return the scores of a circuit's largest edges by the edges' names; None has no edges."""
    edges = [] if circuit is None else circuit.top(EDGES)
    paths = {edge.path: "" if edge.path == "value" else f", {edge.path}" for edge in edges}
    return {f"{edge.source.label} → {edge.reader.label}{paths[edge.path]}": edge.score for edge in edges}


def overlaps(edges: Mapping[str, float], runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return how many of the largest edges of this run and of an earlier one are the same, of all of either.

    A first run is compared with itself.
    """
    earlier = (runs[0], runs[-1]) if runs else (edges, edges)
    return {
        name: overlap(before.keys(), edges.keys())
        for name, before in zip(CIRCUIT_SCALARS, earlier, strict=True)
    }
