"""DePass itself behind the same face, so that a comparison is a loop over methods."""

from typing import Any, ClassVar

from depass_lightning.depass import DePass
from depass_lightning.engine.rules import RuleName
from depass_lightning.methods.base import Method
from depass_lightning.sources import Source


class DePassMethod(Method):
    """DePass under the softmax rule, or another one.

    Args:
        depass: the model, with its tokenizer.
        source: what states are split into; by default `Tokens()`.
        options: what else `DePass.attribute` takes: `rule`, `temperature`, `bias`, `attention_path`.
    """

    name: ClassVar[str] = "depass"
    rule: ClassVar[RuleName] = "softmax"

    def __init__(self, depass: DePass, source: Source | None = None, **options: Any) -> None:
        super().__init__(depass, source)
        self.options: dict[str, Any] = {"rule": self.rule, **options}

    def _attribute(self, prompt: Any, target: Any, **given: Any) -> Any:
        return self.depass.attribute(prompt, target, source=self.source, **given, **self.options)


class Taylor(DePassMethod):
    """DePass under the taylor rule, which is linear in the components.

    Args:
        depass: the model, with its tokenizer.
        source: what states are split into; by default `Tokens()`.
        options: as for `DePassMethod`.
    """

    name: ClassVar[str] = "taylor"
    rule: ClassVar[RuleName] = "taylor"


class Dual(DePassMethod):
    """DePass under the dual rule, for models whose MLPs are gated.

    Args:
        depass: the model, with its tokenizer.
        source: what states are split into; by default `Tokens()`.
        options: as for `DePassMethod`.
    """

    name: ClassVar[str] = "dual"
    rule: ClassVar[RuleName] = "dual"
