"""A hundred wrong command lines, each refused before anything is loaded, by a line that says why."""

import functools

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import open_dict

from depass_lightning.commands import analyze as analysis
from depass_lightning.commands import train as training
from tests.conftest import ROOT

BIG = "9" * 20
CONF = ROOT / "conf"
# What is typed, and what the line has to say; of what Hydra refuses by itself, what Hydra says.
ANALYZE = f"""
batch_size=big                       | batch_size='big': it should be a valid integer
batch_size=1.5                       | batch_size=1.5
batch_size=null                      | batch_size=None
batch_size=true                      | batch_size=True
batch_size=0                         | greater than or equal to 1
batch_size=-3                        | batch_size=-3
batch_size={BIG}                     | less than or equal to
batch_size=[1]                       | batch_size=[1]
batch_size="16"                      | batch_size='16'
parallel=tokens                      | parallel='tokens': it should be 'prompts' or 'components'
parallel=1                           | parallel=1
resume=maybe                         | resume='maybe'
resume=null                          | resume=None
log_every=often                      | log_every='often'
log_every=-1                         | log_every=-1
log_every=inf                        | log_every=inf
compute_dtype=float3                 | float3
compute_dtype=32                     | compute_dtype=32
compute_dtype=int8                   | int8
bias=keep                            | bias='keep': it should be 'component' or 'drop'
bias=null                            | bias=None
attention_path=sideways              | attention_path='sideways': it should be 'content' or 'control'
compat=old                           | compat='old'
states=last                          | states='last': it should be a valid integer; or it should be 'end'
states=1.5                           | states=1.5
states=[1,2]                         | states=[1, 2]
compare=one                          | compare='one'
compare=[1,2]                        | compare.0=1
timeline=3                               | timeline=3
checkpoint=7                         | checkpoint=7
report.prompts=x                     | report.prompts='x'
report.prompts=0                     | greater than or equal to 1
report.prompts=-1                    | report.prompts=-1
report.prompts=null                  | report.prompts=None
report.shown=2.5                     | report.shown=2.5
report.figures=many                  | report.figures='many'
+report.pages=3                      | there is no setting report.pages
report=7                             | report=7
sweep_report=7                       | sweep_report=7
seed=a                               | seed='a'
seed=-1                              | seed=-1
seed={BIG}                           | seed=
tags=a                               | tags='a'
print_config=2                       | print_config=2
task_name=null                       | task_name=None
task.size=x                          | task.size='x'
task.size=0                          | task.size=0
task.size=-5                         | task.size=-5
task.size=1.5                        | task.size=1.5
task.size={BIG}                      | task.size=99999999999999999999
task.name=io                         | there is no 'io'; did you mean ioi?
task.name=null                       | task.name=None
task.split=3                         | task.split=3
task.seed=one                        | task.seed='one'
task.path=5 task=jsonl               | task.path=5
task.path='' task=jsonl              | task.path=''
+task.limit=5                        | there is no setting task.limit
task=io                              | Could not find 'task/io'
model=tinny                          | Could not find 'model/tinny'
model.name=null                      | model.name=None
model.name=''                        | model.name=''
model=hf                             | model.name has to be given
model.revision=1                     | model.revision=1
model.dtype=float3                   | float3
model.dtype=null model.name=3        | model.name=3
model.device_map=1.5                 | model.device_map=1.5
rule=sofmax                          | Could not find 'rule/sofmax'
rule.name=sofmax                     | did you mean softmax?
rule=softmax rule.temperature=hot    | rule.temperature='hot'
rule=softmax rule.temperature=0      | greater than zero
rule=softmax rule.temperature=-1     | greater than zero
rule=softmax rule.temperature=1e-45  | at least 1e-30
rule=softmax rule.temperature=nan    | greater than zero
rule=softmax rule.temperature=inf    | finite
rule=softmax rule.temperature=null   | rule.temperature=None
rule=calibrated                      | rule.path has to be given
rule=calibrated rule.path=lost.json  | there is no rule file lost.json
rule=half +rule.path=rule.json       | rule.path is the file of a calibrated rule
rule.name=calibrated                 | give both, rule=calibrated rule.path=rule.json
rule=max +rule.heat=3                | there is no setting rule.heat
target.kind=foil                     | there is no 'foil'
target=generation target.max_new_tokens=many | target.max_new_tokens='many'
target=generation target.max_new_tokens={BIG} | target.max_new_tokens=
source.layer=last                    | source.layer='last'
source.layer=1.5                     | source.layer=1.5
source.layer=null                    | source.layer=None
source.exclude_first=perhaps         | source.exclude_first='perhaps'
+source.layers=3                     | there is no setting source.layers; did you mean layer?
source._target_=depass_lightning.sources.Token | cannot be imported
source._target_=nowhere.Tokens       | cannot be imported
source=heads source.layer=[1]        | source.layer=[1]
source=neurons source.top=few        | source.top='few'
source=neurons source.indices=3      | source.indices=3
source=modules source.module=mpl     | source.module='mpl'
source=subspace                      | source.path has to be given
source=spans source.unit=word        | source.unit='word'
method=occlusion method.how=drop     | drop
method=occlusion method.rows=x       | method.rows='x'
method=occlusion +method.row=3       | there is no setting method.row; did you mean rows?
method.name=depas                    | did you mean depass?
method=integrated_gradients method.steps=1.5 | method.steps=1.5
faithfulness.draws=many              | faithfulness.draws='many'
faithfulness.percents=all            | faithfulness.percents='all'
faithfulness.percents=[0,a]          | faithfulness.percents.1='a'
faithfulness.zeroed=2                | faithfulness.zeroed=2
faithfulness.batch_size=null         | faithfulness.batch_size=None
+faithfulness.draw=1                 | there is no setting faithfulness.draw; did you mean draws?
trainer.devices=0                    | trainer.devices=0
trainer.devices=two                  | trainer.devices='two'
trainer.devices=-2                   | trainer.devices=-2
trainer.devices=1.5                  | trainer.devices=1.5
trainer.devices=null                 | trainer.devices=None
trainer.devices=[]                   | trainer.devices=[]
trainer.devices=[a]                  | trainer.devices
trainer.strategy=dpp                 | there is no 'dpp'; did you mean ddp?
trainer.strategy=3                   | trainer.strategy=3
trainer.accelerator=abacus           | trainer.accelerator='abacus'
trainer.num_nodes=0                  | trainer.num_nodes=0
+trainer.precission=16               | there is no setting trainer.precission; did you mean precision?
trainer=gpu                          | there is no GPU here; take trainer=cpu
trainer=big                          | Could not find 'trainer/big'
experiment=paper_heads study.size=x  | study.size='x'
experiment=paper_heads study.batch_size=1.5 | study.batch_size=1.5
experiment=paper_heads +study.sizes=3 | there is no setting study.sizes; did you mean size?
logger=csv logger.csv.name=[1]       | logger.csv.name=[1]
paths.output_dir=${{nowhere}}        | nowhere
batchsize=3                          | batchsize
=                                    | =
"""
TRAIN = """
seed=a                               | seed='a'
dtype=float3                         | float3
ckpt_path=3                          | ckpt_path=3
ckpt_path=nowhere.ckpt               | no checkpoint nowhere.ckpt
export_dtype=half                    | half
export_dir=7                         | export_dir=7
module.learning_rate=fast            | module.learning_rate='fast'
module.learning_rate=null            | module.learning_rate=None
module.betas=[0.9]                   | module.betas
module.warmup_steps=1.5              | module.warmup_steps=1.5
+module.lr=1                         | there is no setting module.lr
module._target_=nowhere.Module       | cannot be imported
data.batch_size=x                    | data.batch_size='x'
data.max_length=long                 | data.max_length='long'
data.append_eos=sure                 | data.append_eos='sure'
trainer.max_epochs=few               | trainer.max_epochs='few'
trainer.max_steps=1.5                | trainer.max_steps=1.5
trainer.devices=two                  | trainer.devices='two'
trainer.gradient_clip_val=x          | trainer.gradient_clip_val='x'
callbacks.depass.size=x              | callbacks.depass.size='x'
callbacks.depass.every_n_steps=often | callbacks.depass.every_n_steps='often'
callbacks.depass.rule=sofmax         | callbacks.depass.rule='sofmax'
callbacks.depass.on_error=stop       | callbacks.depass.on_error='stop'
callbacks.depass.temperature=hot     | callbacks.depass.temperature='hot'
+callbacks.depass.tempreature=1      | callbacks.depass.tempreature; did you mean temperature?
callbacks.model_checkpoint.save_top_k=x | callbacks.model_checkpoint.save_top_k='x'
"""


def lines(table):
    for line in table.strip().splitlines():
        typed, _, said = line.partition("|")
        yield pytest.param(typed.split(), said.strip(), id=typed.strip())


@functools.cache
def composed(command, groups):
    """Return a configuration with these groups; composing takes a quarter of a second."""
    with initialize_config_module("depass_lightning.conf", version_base="1.3"):
        return compose(command, overrides=["print_config=false", *groups])


def refused(command, work, overrides, folder, capsys):
    """Compose and run a command, and return what it says when it is refused; "" where it is not."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        groups = [own.input_line for own in parsed if (CONF / own.key_or_group).is_dir()]
        config = composed(command, tuple(groups)).copy()
        keys = [own for own in parsed if own.input_line not in groups]
        ConfigLoaderImpl._apply_overrides_to_config(keys, config)  # as composing does
    except HydraException as error:  # Hydra itself prints no traceback of these
        return f"{error} {error.__cause__}"
    with open_dict(config):
        config.paths.work_dir = str(folder)
        if not any(own.startswith("paths.output_dir=") for own in overrides):
            config.paths.output_dir = str(folder / "run")
    with pytest.raises(SystemExit) as stop:
        work(config)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model is loaded before the mistake is told")

    monkeypatch.setattr(analysis, "load", load)
    monkeypatch.setattr(training, "make_model", load)


@pytest.mark.parametrize(("overrides", "said"), [*lines(ANALYZE)])
def test_wrong_settings_of_an_analysis(tmp_path, capsys, overrides, said):
    assert said in refused("analyze", analysis.analyze, overrides, tmp_path, capsys)


@pytest.mark.parametrize(("overrides", "said"), [*lines(TRAIN)])
def test_wrong_settings_of_a_training(tmp_path, capsys, overrides, said):
    assert said in refused("train", training.train, overrides, tmp_path, capsys)


@pytest.mark.parametrize("command", ["analyze", "train"])
def test_a_run_folder_that_is_a_file(tmp_path, capsys, command):
    work = {"analyze": analysis.analyze, "train": training.train}[command]
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        (tmp_path / "file").write_text("")
        said = refused(command, work, [f"paths.output_dir={place}"], tmp_path, capsys)
        assert str(tmp_path / "file") in said
