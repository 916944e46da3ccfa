"""Settings that ended in tracebacks, ran for ever or meant nothing: one line, and no work."""

from __future__ import annotations

import shlex
from functools import partial

import pytest
from omegaconf import DictConfig, OmegaConf

from steerlora.cli import compose
from steerlora.cli.command_line import CommandLine
from steerlora.cli.overrides import MOST_JOBS, jobs_of, read, spelt_out, with_folders
from steerlora.cli.places import refuse_unwritable
from steerlora.errors import UserError, nearest, shown


@pytest.fixture(scope="module")
def default_tree() -> DictConfig:
    return compose.tree([])


def said(call, *arguments) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.sites=[[1]]", "method.sites[0]=[1]: must be a whole number"),
        ("seed=-1", "seed=-1: must be a whole number from 0"),
        ("seed=99999999999999999999", "must be a whole number from 0 to 4294967295"),
        ("model.seed=-1", "model.seed=-1: must be"),
        ("domains.seed=-1", "domains.seed=-1: must be"),
        ("sae.seed=-1", "sae.seed=-1: must be"),
        ("trainer.weight_decay=-1", "trainer.weight_decay=-1: must be a number from 0"),
        ("trainer.adam_epsilon=-1", "trainer.adam_epsilon=-1: must be a number above 0"),
        ("trainer.learning_rate=.inf", "trainer.learning_rate=inf: must be a number above 0"),
        ("method.rank=1000000", "method.rank=1000000: must be a whole number from 1"),
        ("method.rank=129", "method.rank=129 is more than model.width=128"),
        ("model.head_width=15", "model.head_width=15: must be a whole number from 2"),
        ("method.replay.ratio=1", "method.replay.ratio=1: must be a number from 0 and below 1"),
        ("sae.path=''", "sae.path is empty"),
        ("model.path=''", "model.path is empty"),
        ("artifacts.root='~no_such_user_/x'", "there is no such home folder"),
        (f"artifacts.root={'x' * 5000}", "is too long"),
        ("model.layers=100000000", "model.layers=100000000: must be a whole number from 1"),
        ("method.sites=${every_layer:100000000}", "every_layer=100000000: must be"),
        ("logger.project=a/b c", "logger.project=a/b c: must be a name of W&B's"),
        ("sae.auxiliary=-1", "sae.auxiliary=-1: must be a number from 0"),
        ("sae.dead_fraction=5", "sae.dead_fraction=5: must be a number above 0 and up to 1"),
        ("method.margin=5", "method.margin=5: must be a number from 0 to 2"),
        ("evaluation.tasks=[]", "evaluation.tasks=[]: must be a list of"),
        ("evaluation.tasks=[a,a]", "evaluation.tasks=['a', 'a']: give each once"),
        ("evaluation.groups.x=[]", "evaluation.groups.x=[]: must be a list of"),
        ("evaluation.groups.x=[a,a]", "evaluation.groups.x=['a', 'a']: give each once"),
        ("study.seeds=[1,1]", "study.seeds=[1, 1]: give each once"),
        ("intervention.domains=[law,law]", "give each once"),
        ("method.losses=3", "method.losses=3: has keys of its own"),
        ("model.name=null", "model.name=null: must be a name"),
    ],
)
def test_a_wrong_value(default_tree, override, says):
    tree = OmegaConf.merge(default_tree, OmegaConf.from_dotlist([override]))
    assert says in said(compose.typed, tree)


def test_an_experiment_without_a_model(default_tree):
    assert "study.models=[]" in said(compose.load, ["experiment=micro", "study.models=[]"])


def test_a_group_may_be_given_by_its_keys():
    assert compose.load(["model={layers:2}"]).model.layers == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stage=base", "stage=evaluate"], "stage=base and stage=evaluate: give one stage"),
        (["stage=[base,evaluate]"], "a sweep runs all: -m stage=base,evaluate"),
        (["--config-name", "x"], "--config-name: there is one configuration"),
        (["--config-path", "x"], "--config-path: there is one configuration"),
        (["--experimental-rerun", "x"], "--experimental-rerun: give the same command again"),
        (["--config-dir", "no/such"], "--config-dir=no/such: there is no such folder"),
        (["hydra.searchpath=[no/such]"], "hydra.searchpath=no/such: there is no such folder"),
        (["hydra.searchpath=here"], "give a list, hydra.searchpath=[<folder>]"),
        (["-m", "seed=range(0)"], "seed=range(0): is no value at all"),
        (["-m", "seed=range(10000000000000)"], f"has {MOST_JOBS} jobs at most"),
        (["-m", "seed=shuffle(range(10000000000000))"], f"has {MOST_JOBS} jobs at most"),
        (["-m", "seed=range(200)", "sae.seed=range(200)"], f"has {MOST_JOBS} jobs at most"),
        (["-m", "seed=range(0,1,0)"], "seed=range(0,1,0)"),
        (["-m", "sae.l1=interval(0,1)"], "an interval has no single values"),
        (["-m", "method=glob(no_such*)"], "method=glob(no_such*): no option matches"),
        (["a/b c=d"], "cannot read a/b c=d"),
        (["foo"], "cannot read foo: give <key>=<value>"),
        (["seed=" + "1" * 5000], "cannot read seed=111"),
    ],
)
def test_a_wrong_command_line(arguments, says):
    assert says in said(CommandLine.parse, arguments)


@pytest.mark.parametrize("value", ["~/data", "/x/ü", "/x/[a", "/x/a b c=d", 'a"b\\c(', "(", "a,b}"])
def test_a_value_that_the_grammar_cannot_read_gets_the_form_that_it_can(value):

    line = said(read, [f"artifacts.root={value}"])
    assert line.startswith("cannot read artifacts.root=")
    (quoted,) = shlex.split(line.rpartition("needs quotes, ")[2])
    (override,) = read([quoted])
    assert (override.key_or_group, override.value()) == ("artifacts.root", value)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of YAML files of the user's: a method and an experiment that compares it."""
    for name, text in {
        "method/my_lora.yaml": "defaults: [lora, _self_]\nname: my_lora\n",
        "experiment/my.yaml": "# @package _global_\ndefaults: [smoke, _self_]\n"
        "study: {name: my, methods: [lora, my_lora]}\n",
    }.items():
        path = tmp_path / "my conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return "my conf"


@pytest.mark.parametrize("given", ["--config-dir", "hydra.searchpath"])
def test_a_folder_of_yaml_files_counts_for_every_composition(mine, given):
    door = ["--config-dir", mine] if given == "--config-dir" else [f'{given}=["{mine}"]']
    command = CommandLine.parse(["experiment=my", *door])
    assert command.flags == []
    found = compose.load(command.overrides)
    assert found.study.methods == ["lora", "my_lora"]
    variant = compose.load([*command.overrides, "method=my_lora"])
    assert variant.method.name == "my_lora"
    swept = CommandLine.parse(["-m", "stage=status", "method=glob(my*)", *door])
    assert [compose.load(job).method.name for job in swept.jobs] == ["my_lora"]
    line = said(compose.load, [*command.overrides, "method=my_lra"])
    assert "did you mean 'my_lora'" in line


def test_a_folder_stays_beside_a_plugins(mine, tmp_path, monkeypatch):
    (tmp_path / "has_conf").mkdir()
    (tmp_path / "has_conf/__init__.py").touch()
    (tmp_path / "has_conf/conf").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (last,) = with_folders(["plugins=[has_conf]", f'hydra.searchpath=["{mine}"]'])[1:]
    assert "my conf" in last
    assert "has_conf/conf" in last


def test_the_jobs_of_a_sweep_are_spelt_out_once(monkeypatch):
    given = ["seed=shuffle(range(5))", "order=glob(broad*)", "sae.k=choice(1,2)", "stage=status"]
    spelt = spelt_out(given)
    assert spelt[1:] == ["order=broad_first,broad_last", "sae.k=1,2", "stage=status"]
    jobs = jobs_of(spelt)
    assert jobs == jobs_of(spelt)
    assert len(jobs) == 5 * 2 * 2
    assert jobs[0][1:] == ["order=broad_first", "sae.k=1", "stage=status"]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = compose.load(['artifacts.root="~/a"', 'results.dir="~"', 'sae.path="~/sae"'])
    assert found.artifacts.root == f"{tmp_path}/a"
    assert found.results.dir == str(tmp_path)
    assert found.sae.path == f"{tmp_path}/sae"


@pytest.mark.parametrize("key", ["artifacts.root", "results.dir", "logger.dir"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(key, tmp_path):
    (tmp_path / "file").touch()
    place = f"{tmp_path}/file/folder"
    given = [f"{one}={tmp_path}/new" for one in ("artifacts.root", "results.dir", "logger.dir")]
    config = compose.load([*given, f"{key}={place}"])
    line = said(partial(refuse_unwritable, reports=True), config)
    assert line.startswith(f"{key}={place[:50]}")
    refuse_unwritable(compose.load(given), reports=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_suggestions_are_at_most_five_names():
    assert nearest("zzz", map(str, range(9))) == "choose from 0, 1, 2, 3, 4 and 4 more"
    assert nearest("", []) == "there is nothing to choose from"


def test_a_value_is_shown_on_one_short_line():
    assert shown(None) == "null"
    assert shown(True) == "true"
    assert shown("a\n\x1b[2J") == r"'a\n\x1b[2J'"
    assert shown("x" * 500) == "x" * 100 + "..."
    assert shown(10**5000).endswith("bits")
