"""Check a command's configuration before anything is loaded: every setting's type and bounds.

The commands' settings are declared here. Objects that Hydra instantiates (`_target_`: sources, callbacks,
loggers, the trainer, ...) and methods are checked against their signatures.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from hydra.utils import get_object
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from depass_lightning import tasks
from depass_lightning.attribution.automatic_rule import AUTO
from depass_lightning.attribution.settings import BiasMode
from depass_lightning.engine.linear_rules import CalibratedRule
from depass_lightning.engine.rule_files import read_rule
from depass_lightning.engine.rules import AttentionPath, RuleName, rule_named
from depass_lightning.errors import DePassError, suggested
from depass_lightning.methods import METHODS, Baseline
from depass_lightning.models.load import dtype_of
from depass_lightning.modules.attribution_module import TARGETS
from depass_lightning.targets import LogitReading, Reduction

MAX_COUNT = 10_000_000  # prompts, rows, steps; a larger number is a typing error
HYDRA_KEYS = ("_target_", "_convert_", "_partial_", "_recursive_", "_args_")
SEED_LIMIT = 2**32  # of numpy
ACCELERATORS = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]


def _one_of(names: tuple[str, ...]) -> BeforeValidator:
    """Refuse an unknown name, and suggest the most similar one."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in names:
            raise DePassError(f"there is no {value!r}{suggested(value, names)}")
        return value

    return BeforeValidator(check)


def _dtype(value: str) -> str:
    dtype_of(value)
    return value


def _temperature(value: float) -> float:
    rule_named("softmax", value)
    return value


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Many = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Name = Annotated[str, Field(min_length=1)]
DType = Annotated[str, AfterValidator(_dtype)]
Temperature = Annotated[float, AfterValidator(_temperature)]
Object = dict[str, Any]


class StrictSettings(BaseModel):
    """Settings without type conversion: no text for a number, and no float for an integer."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ModelSettings(StrictSettings):
    """The model, and how it is loaded."""

    name: Name
    revision: Name | None = None
    dtype: DType | None = None
    device_map: str | int | Object | None = None


class TrainerSettings(StrictSettings):
    """The number of processes and their devices; Lightning checks the rest."""

    accelerator: ACCELERATORS = "auto"
    devices: int | str | list[int] = 1
    num_nodes: Count = 1
    strategy: Annotated[str, _one_of(("auto", *StrategyRegistry.available_strategies()))] | Object = "auto"


class CommonSettings(StrictSettings):
    """Settings of every command."""

    task_name: Name
    tags: list[str] | None = None
    seed: Seed
    print_config: bool
    model: ModelSettings
    trainer: TrainerSettings
    callbacks: Object | None = None
    logger: Object | None = None


class TrainSettings(CommonSettings):
    """Settings of `python train.py`."""

    ckpt_path: Name | None
    dtype: DType
    untrained: Object | None
    module: Object
    data: Object
    export_dir: Name | None
    export_dtype: DType | None


class TaskSettings(StrictSettings, extra="forbid"):
    """The prompts."""

    name: Annotated[str, _one_of(tasks.NAMES)]
    size: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    split: Name = "test"
    path: Name | None = None
    rows: list[dict[str, Any]] | None = None
    language: Name | None = None
    kind: Name | None = None
    sentences: Many | None = None


class RuleSettings(StrictSettings, extra="forbid"):
    """How a neuron is shared among the components."""

    name: Annotated[str, _one_of((AUTO, *get_args(RuleName), CalibratedRule.name))]
    path: Name | None = None
    temperature: Temperature = 0.1
    score_weight: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _check_path(self) -> "RuleSettings":
        if (self.name == CalibratedRule.name) != (self.path is not None):
            raise DePassError(
                "rule.path is the file of a calibrated rule; give both, rule=calibrated rule.path=rule.json, "
                "or another rule"
            )
        if self.path is not None:
            read_rule(self.path)
        return self


class TargetSettings(StrictSettings, extra="forbid"):
    """The target."""

    kind: Annotated[str, _one_of(TARGETS)]
    max_new_tokens: Annotated[int, Field(le=MAX_COUNT)] = 1
    readout: LogitReading = "logit"
    answer: Literal["whole", "first"] = "whole"
    reduce: Reduction = "sum"
    task_answer: bool = False


class ReportSettings(StrictSettings, extra="forbid"):
    """The size of the report; a page needs a prompt."""

    prompts: Count
    shown: Many
    figures: Many
    lens: bool


class WatchSettings(StrictSettings, extra="forbid"):
    """Whose checkpoints are attributed as they appear, and until when."""

    folder: Name | None
    until: Many | None
    poll: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CheckSettings(StrictSettings, extra="forbid"):
    """What an analysis is compared with, and the conditions under which it fails."""

    reference: Name | None
    alarms: list[Name]


class AnalyzeSettings(CommonSettings):
    """Settings of `python analyze.py`."""

    task: TaskSettings
    source: Object
    rule: RuleSettings
    method: Object
    target: TargetSettings
    faithfulness: Object | None
    study: Object | None
    batch_size: Count
    parallel: Literal["prompts", "components"]
    resume: bool
    log_every: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    compute_dtype: DType | None
    bias: BiasMode
    attention_path: AttentionPath
    compat: Literal["paper_code"] | None
    states: int | Literal["end"] | None
    circuit: bool
    compare: list[Annotated[str, Field(min_length=1)]] | None
    timeline: Name | None
    checkpoint: Name | None
    watch: WatchSettings
    check: CheckSettings
    report: ReportSettings
    sweep_report: Name | None
    open: bool
    serve: bool


def check_config(config: DictConfig, settings: type[CommonSettings]) -> None:
    """Check a composed configuration.

    Raises:
        DePassError: a setting is wrong; the message names the first one and the valid values.
        MissingMandatoryValue: a required setting is missing.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    _check(TypeAdapter(settings), plain, "")
    for path, node in _targets(plain, ""):
        _check_call(_object(path, node["_target_"]), node, path)
    if isinstance(method := plain.get("method"), dict):
        _check_method(method)
    _check_devices(plain["trainer"])


def _check(adapter: TypeAdapter[Any], value: Any, path: str) -> None:
    """Check a value against a declared type."""
    try:
        adapter.validate_python(value)
    except ValidationError as failed:
        raise DePassError(_error_text(failed, path, value)) from None


def _error_text(failed: ValidationError, path: str, value: Any) -> str:
    """Describe the first error in one line; for a union, the errors of all its members."""
    errors = failed.errors(include_url=False)
    # In a union's errors, the members' names follow the setting's; they are not keys of the value.
    place = _place(errors[0]["loc"], value)
    messages = dict.fromkeys(_message(error) for error in errors if _place(error["loc"], value) == place)
    full = ".".join([*([path] if path else []), *map(str, place)])
    error = errors[0]
    if error["type"] == "missing":
        return f"{full} has to be given: {full}=..."
    if error["type"] == "extra_forbidden":
        return f"there is no setting {full}; leave it out"
    return f"{full}={error['input']!r}: {'; or '.join(messages)}"


def _place(loc: tuple[int | str, ...], value: Any) -> tuple[int | str, ...]:
    """Return the part of an error's location that consists of keys of the value."""
    place: list[int | str] = []
    for key in loc:
        if (isinstance(value, dict) and key in value) or (
            isinstance(value, list | tuple) and isinstance(key, int) and key < len(value)
        ):
            inside: Any = value
            value = inside[key]
        elif isinstance(value, dict) and key == loc[-1]:  # a missing key
            return (*place, key)
        else:
            break
        place.append(key)
    return tuple(place)


def _message(error: Any) -> str:
    message = str(error.get("ctx", {}).get("error") or error["msg"])
    return message.replace("Input should be", "it should be").replace("Value error, ", "")


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every node of a configuration that Hydra instantiates, with its path."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")


def _object(path: str, target: str) -> Any:
    """Import the object that a `_target_` names."""
    try:
        return get_object(target)
    except Exception as error:  # an import may raise any error
        raise DePassError(f"{path}._target_={target!r} cannot be imported: {error}") from error


def _check_call(function: Any, node: Mapping[str, Any], path: str) -> None:
    """Check a call's arguments against the function's signature."""
    try:
        parameters = inspect.signature(function).parameters
        hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    except (TypeError, ValueError, NameError):  # implemented in C, or annotated for type checkers only
        return
    stars = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {name for name, parameter in parameters.items() if parameter.kind not in stars}
    takes_any = False
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            unpacked = get_args(hints.pop(name, None))  # Unpack[TypedDict]
            takes_any = not unpacked
            for options in unpacked:
                hints |= get_type_hints(options, include_extras=True)
                known |= get_type_hints(options).keys()
    for name, value in node.items():
        if name in HYDRA_KEYS:
            continue
        if name not in known and not takes_any:
            raise DePassError(f"there is no setting {path}.{name}{suggested(name, sorted(known))}")
        if name in hints and not _is_instantiated(value):
            _check_hint(hints[name], value, f"{path}.{name}")


def _check_method(method: dict[str, Any]) -> None:
    """Check a method's name and options."""
    name = method.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise DePassError(f"method.name={name!r}: there is no such method{suggested(str(name), METHODS)}")
    if issubclass(METHODS[name], Baseline):
        options = {key: value for key, value in method.items() if key != "name"}
        _check_call(METHODS[name], options, "method")


def _check_hint(hint: Any, value: Any, path: str) -> None:
    """Check a value against a type that a signature declares."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticUserError:
        try:
            adapter = TypeAdapter(hint)
        except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError):
            return  # not a type of configuration values
    except (PydanticSchemaGenerationError, TypeError, NameError):
        return
    try:
        adapter.validate_python(_tupled(value), strict=True)
    except ValidationError:
        _check(adapter, value, path)


def _is_instantiated(value: Any) -> bool:
    """Return whether Hydra instantiates the value or a part of it."""
    return next(_targets(value, ""), None) is not None


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse an invalid number of devices, and GPUs that do not exist."""
    devices, accelerator = trainer.get("devices", 1), trainer.get("accelerator", "auto")
    listed = isinstance(devices, list) or "," in str(devices)
    entries = devices if isinstance(devices, list) else str(devices).split(",")
    numbers = [str(entry).strip() for entry in entries]
    count = None if listed or devices == "auto" else numbers[0]
    whole = all(re.fullmatch("[0-9]{1,6}", number) for number in numbers) or count == "-1"
    if devices != "auto" and (not numbers or not whole or count == "0"):
        raise DePassError(
            f"trainer.devices={devices!r}: give how many, from 1, their numbers, as trainer.devices=[0,1], "
            "or auto"
        )
    if accelerator not in ("gpu", "cuda"):
        return
    gpus = torch.cuda.device_count() or (torch.mps.device_count() if accelerator == "gpu" else 0)
    if not gpus:
        raise DePassError(f"trainer.accelerator={accelerator!r}: there is no GPU here; take trainer=cpu")
    if count is not None and int(count) > gpus:
        raise DePassError(f"trainer.devices={devices!r}: there are {gpus} GPUs here")
