"""Every option of every configuration group composes, for each command that has the group."""

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from depass_lightning.attribution.automatic_rule import AUTO
from depass_lightning.depass import DePass
from depass_lightning.engine.rules import rule_named
from depass_lightning.models.load import dtype_of
from depass_lightning.modules.attribution_module import TARGETS, Explained
from depass_lightning.sources import Heads, Module, Neurons, Spans, Subspace, Tokens
from depass_lightning.targets import Continuation, Preference
from depass_lightning.tasks import Example
from tests.conftest import ROOT

CONF = ROOT / "conf"
COMMANDS = [path.stem for path in sorted(CONF.glob("*.yaml"))]
INNER = {"hydra", "local"}  # Hydra's own, and whatever somebody keeps for their machine
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and any(folder.glob("*.yaml")))
OPTIONS = [
    (group, path.stem)
    for group in GROUPS
    if group not in INNER
    for path in sorted((CONF / group).glob("*.yaml"))
]
# What only the reader can say.
REQUIRED = {
    ("rule", "calibrated"): ["rule.path=rule.json"],
    ("model", "hf"): ["model.name=folder"],
    ("model", "gguf"): ["model.path=file.gguf"],
    ("source", "subspace"): ["source.path=file.npy"],
    ("task", "jsonl"): ["task.path=file.jsonl"],
    ("task", "labelled"): ["task.path=file.csv"],
    ("task", "chat"): ["task.path=file.jsonl"],
}


def groups_of(command):
    """Return the groups that a command's defaults name."""
    defaults = OmegaConf.load(CONF / f"{command}.yaml").defaults
    return {str(key).rpartition(" ")[2] for entry in defaults if not isinstance(entry, str) for key in entry}


def _meant_for(experiment, command):
    """Whether an experiment's choices are all groups of a command."""
    loaded = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"))
    assert isinstance(loaded, dict)
    defaults = loaded.get("defaults", [])
    chosen = {
        str(key).removeprefix("override ").strip().strip("/")
        for entry in defaults
        if not isinstance(entry, str)
        for key in entry
    }
    return chosen <= groups_of(command)


COMPOSED = {"tiny", "smollm2-135m", "llama2-7b", *(name for group, name in REQUIRED if group == "model")}
CHOICES = [
    (command, group, option)
    for group, option in OPTIONS
    for command in COMMANDS
    if (_meant_for(option, command) if group == "experiment" else group in groups_of(command))
]


def composed(command, overrides, folder):
    """Compose a command's configuration as Hydra would, with everything in it resolved."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        config = compose(command, overrides=overrides, return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
        config.hydra.runtime.cwd = str(folder)
        config.hydra.job.num = 0
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    try:
        resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
        assert isinstance(resolved, DictConfig)
        return resolved
    finally:
        HydraConfig.instance().cfg = None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_by_itself(command, tmp_path):
    config = composed(command, [], tmp_path)
    assert config.task_name
    assert config.paths.output_dir == str(tmp_path)


def test_every_option_has_a_command():
    """An option that no command could take would be dead."""
    assert set(OPTIONS) == {(group, option) for _, group, option in CHOICES}


@pytest.mark.covering
@pytest.mark.parametrize(
    ("command", "group", "option"),
    [
        # The keys of models' files are compared below; composing each of them as well is slow.
        pytest.param(
            *choice, marks=[pytest.mark.slow] if choice[1] == "model" and choice[2] not in COMPOSED else []
        )
        for choice in CHOICES
    ],
)
def test_every_option_composes(command, group, option, tmp_path):
    """Each command that knows the group takes it."""
    composed(command, [f"{group}={option}", *REQUIRED.get((group, option), [])], tmp_path)


def test_a_wrong_key_and_a_wrong_choice_are_refused(tmp_path):
    with pytest.raises(ConfigCompositionException, match=r"model\.nam"):
        composed("analyze", ["model.nam=tiny"], tmp_path)
    with pytest.raises(Exception, match="softmax"):  # Hydra's own message lists the choices
        composed("analyze", ["rule=sofmax"], tmp_path)


MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
ANY = {"hf", "gguf"}  # what the reader names
PAPERS = {
    *("llama2-7b", "llama2-7b-chat", "llama2-13b", "llama3.1-8b", "llama3.1-70b", "llama3.2-1b"),
    *("llama3.2-3b", "qwen2-1.5b", "qwen2-7b"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_states_what_matters(name):
    """The same keys everywhere, so that no entry can be half filled in."""
    model = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    facts = {"parameters", "context", "licence", "gated"}
    assert set(model) - {"path"} == {"name", "revision", "dtype", "device_map"} | facts
    assert dtype_of(model.dtype).is_floating_point
    assert (CONF / "model" / f"{name}.yaml").read_text().startswith("# ")
    if name in ANY:
        return
    assert "/" in model.name or model.name in {"tiny", "smollm2-135m"}
    assert model.licence
    assert isinstance(model.context, int)
    number, unit = model.parameters.split()
    assert 1 <= float(number) * {"thousand": 1, "million": 1e3, "billion": 1e6}[unit] < 1e9
    assert model.gated in (True, False, None)


def test_the_papers_models_have_entries():
    """And no two entries are one model."""
    assert set(MODELS) >= PAPERS
    names = [OmegaConf.load(CONF / "model" / f"{name}.yaml").name for name in MODELS if name not in ANY]
    assert len(names) == len({own.lower() for own in names})


def test_sources_rules_and_targets_are_the_librarys(tmp_path):
    assert instantiate(composed("analyze", ["source.layer=2"], tmp_path).source) == Tokens(layer=2)
    meant = {
        "tokens": Tokens(),
        "spans": Spans("word"),
        "turns": Spans("turn"),
        "documents": Spans("sentence"),
        "heads": Heads(),
        "modules": Module("attention"),
        "neurons": Neurons(-2),
    }
    assert {path.stem for path in (CONF / "source").glob("*.yaml")} == {*meant, "subspace"}
    for name, source in meant.items():
        assert instantiate(composed("analyze", [f"source={name}"], tmp_path).source) == source
    np.save(tmp_path / "gender.npy", np.eye(3)[:2])
    of_file = ["source=subspace", f"source.path={tmp_path / 'gender.npy'}", "source.layer=1"]
    subspace = instantiate(composed("analyze", of_file, tmp_path).source)
    assert isinstance(subspace, Subspace)
    assert (subspace.layer, subspace.names) == (1, ["gender"])
    for path in sorted((CONF / "rule").glob("*.yaml")):
        chosen = [f"rule={path.stem}", *REQUIRED.get(("rule", path.stem), [])]
        rule = composed("analyze", chosen, tmp_path).rule
        assert rule.name == path.stem
        if "path" not in rule and rule.name != AUTO:
            rule_named(rule.name, rule.get("temperature", 0.1))
    targets = {
        path.stem: Explained(**composed("analyze", [f"target={path.stem}"], tmp_path).target)
        for path in (CONF / "target").glob("*.yaml")
    }
    whole = {"continuation": "logprob", "preference": "contrast"}
    assert {name: target.kind for name, target in targets.items()} == {name: name for name in TARGETS} | whole
    two = Example("1", "A", " B C", " D E")
    tokenizer = DePass.from_pretrained("tiny").tokenizer
    assert targets["continuation"].target(two, tokenizer) == Continuation(" B C", "logprob")
    assert targets["preference"].target(two, tokenizer) == Preference(" B C", " D E", "logprob")
