"""DePass as a method, so that a comparison is a loop over methods."""

from typing import Any, ClassVar

from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.engine.rules import RuleName
from depass_lightning.errors import DePassError
from depass_lightning.methods.base import Method
from depass_lightning.results.component import Decomposition
from depass_lightning.results.generation import Generation
from depass_lightning.sources import Source
from depass_lightning.targets import LogitReading

STATE_OPTIONS = ("source", "rule", "temperature", "bias", "compat")  # that components' states depend on


class DePassMethod(Method):
    """DePass under the softmax rule, or another one.

    Args:
        depass: the model, with its tokenizer.
        source: what states are split into; by default `Tokens()`.
        options: further arguments of `DePass.attribute`: `rule`, `temperature`, `bias`, `attention_path`.
    """

    name: ClassVar[str] = "depass"
    rule: ClassVar[RuleName] = "softmax"

    def __init__(self, depass: DePass, source: Source | None = None, **options: Any) -> None:
        super().__init__(depass, source)
        self.options: dict[str, Any] = {"rule": self.rule, **options}

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `DePass.attribute`."""
        return {"source": self.source, **self.options}

    def decompose(self, prompts: list[str], to_layer: int | None) -> list[Decomposition]:
        """Return the components' states of prompts, which are propagated in one pass.

        Args:
            prompts: the prompts.
            to_layer: the block that the states enter; None for the last block's output.
        """
        options: dict[str, Any] = {key: self.settings[key] for key in STATE_OPTIONS if key in self.settings}
        layer: Any = to_layer
        return self.depass.decompose(prompts, to_layer=layer, batch_size=len(prompts), **options)

    def attribute_generation(
        self,
        prompt: str,
        max_new_tokens: int,
        target: LogitReading = "logit",
        continuation: str | None = None,
    ) -> Generation:
        """Let the model continue a prompt, and attribute every generated token.

        Args:
            prompt: the prompt.
            max_new_tokens: the maximum number of generated tokens.
            target: what is explained of each: `logit`, `centred`, `log_odds` or `logprob`.
            continuation: a text to explain in place of what the model would generate.

        Raises:
            DePassError: the method is the paper's code, which explains no generated tokens.
        """
        settings = self.settings
        if settings.pop("compat", None) is not None:
            raise DePassError("compat='paper_code' explains no generated tokens; leave out one of the two")
        if "temperature" in settings:  # also an argument of `generate`
            settings["rule_temperature"] = settings.pop("temperature")
        return self.depass.attribute_generation(
            prompt, max_new_tokens=max_new_tokens, continuation=continuation, target=target, **settings
        )

    @override
    def _attribute(self, prompt: Any, target: Any, **options: Any) -> Any:
        return self.depass.attribute(prompt, target, source=self.source, **options, **self.options)


def under(rule: RuleName) -> type[DePassMethod]:
    """Return the class of DePass under a rule, which also is the method's name."""
    return type(
        rule.capitalize(), (DePassMethod,), {"name": rule, "rule": rule, "__doc__": f"DePass under {rule}."}
    )


class Calibrated(DePassMethod):
    """DePass under a rule that was fitted to the model at hand (`experiment=calibrate`).

    Args:
        depass: the model, with its tokenizer.
        source: what states are split into; by default `Tokens()`.
        path: the rule's file.
        options: further options of `DePassMethod`.

    Raises:
        DePassError: there is no path.
    """

    name: ClassVar[str] = "calibrated"

    def __init__(
        self, depass: DePass, source: Source | None = None, *, path: str | None = None, **options: Any
    ) -> None:
        if path is None:
            raise DePassError("the method calibrated needs the rule's file, as path=rule.json")
        super().__init__(depass, source, rule=path, **options)
