"""Which rule `rule="auto"` takes for a source (docs/which-rule.md has the evidence)."""

from typing import Literal

from depass_lightning.sources import Heads, Source

Automatic = Literal["auto"]
AUTO: Automatic = "auto"


def automatic_rule(
    source: Source, compat: str | None = None, engine: str = "auto", attention_path: str = "content"
) -> str:
    """Return the name of the rule that `rule="auto"` takes.

    It is `shap` for heads, whose effect runs through queries and keys too, and `half` for everything else,
    whatever the target. Some settings determine the rule: `softmax` for the published code and for
    `Neurons(top=)`, `taylor` for the control path, and `half` for heads that are propagated forward.

    Args:
        source: what the state is split into.
        compat: `paper_code`, or None.
        engine: auto, propagate or adjoint.
        attention_path: content or control.
    """
    if compat is not None or source.top is not None:
        return "softmax"
    if attention_path == "control":
        return "taylor"
    return "shap" if isinstance(source, Heads) and engine != "propagate" else "half"
