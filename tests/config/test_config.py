"""The configuration: every shipped file builds, every mistake is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import transformers
import yaml
from omegaconf import DictConfig, OmegaConf

from steerlora import config
from steerlora.cli import compose, sections
from steerlora.cli.sections import GROUPS
from steerlora.config import SECTIONS, Config
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.lm.pretrained import shape_of
from steerlora.lm.weight_files import on_meta
from steerlora.methods import config as method_config
from steerlora.methods.config import METHODS, QWEN3_LINEAR
from steerlora.saes import config as sae_config
from steerlora.saes.config import SAES

OPTIONS = {
    "domains": 4,
    "evaluation": 4,
    "experiment": 18,
    "intervention": 10,
    "logger": 2,
    "method": 38,
    "model": 17,
    "order": 6,
    "sae": 8,
    "stage": 26,
    "trainer": 6,
}
"""How many options each group ships."""

NEEDED = {
    "model=own": [
        "model.path=.",
        *("model.layers=4", "model.width=128", "model.heads=4", "model.kv_heads=2"),
        *("model.head_width=32", "model.ffn_width=384", "model.vocabulary=99", "model.tied=true"),
        *("model.control_sites=[1]", "model.context_length=128"),
    ],
    "domains=text": ["domains.dir=."],
    "domains=continual": ["domains.dir=."],
    **{
        f"experiment={name}": ["domains.dir=."]
        for name in ("text", "smollm2", "smollm2_full", "qwen3", "cl", "cl_full", "cl_qwen3")
    },
    "order=given": ["order.sequence=[law,math,code,medicine,instruction]"],
}
"""What an option cannot do without."""


@pytest.fixture(scope="module")
def default_tree() -> DictConfig:
    return compose.tree([])


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=lora", "method.rank=3", "seed=4"),
        ("experiment=smoke", "model.layers=3", "method.sites=[0,1]"),
        ("evaluation.files.gsm8k=a", "evaluation.groups={gsm8k:[gsm8k]}"),
        ("experiment=cl", "method=lora", "order=random", "order.seed=1", "method.rank=3"),
        ("sae=relu", "++method.rank=3", "sae.latents=${model.width}"),
        ("stage=base", "hydra.job.chdir=true", "~method.rank"),
    ],
)
def test_trees_of_the_same_options_are_composed_once_and_each_has_its_own_keys(overrides):
    before = compose.tree(["method=lora"])
    found = compose.tree(overrides)
    with compose.hydra_ready():
        assert found == compose._compose(overrides)
    assert compose.tree(["method=lora"]) == before


@pytest.mark.parametrize("group", compose.APART)
def test_options_that_are_composed_apart_set_keys_of_their_own_group_alone(group):
    for file in (sections.config_directory() / group).glob("*.yaml"):
        content = file.read_text(encoding="utf-8")
        assert "@package" not in content, file
        for entry in yaml.safe_load(content).get("defaults", ()):
            assert "/" not in str(entry), file


def shipped() -> list[str]:
    """``group=option`` of every YAML file in ``conf/``, found by walking it."""
    root = sections.config_directory()
    files = [path.relative_to(root) for path in root.rglob("*.yaml") if path.name != "config.yaml"]
    return sorted(f"{path.parent.as_posix()}={path.stem}" for path in files)


def test_every_group_ships_what_is_counted_here():
    assert {name: len(options) for name, options in sections.groups().items()} == OPTIONS
    assert len(shipped()) == sum(OPTIONS.values())


@pytest.mark.parametrize("option", shipped())
def test_every_shipped_option_builds_a_typed_configuration(option):
    built = compose.load([option, *NEEDED.get(option, [])])
    assert isinstance(built, Config)
    group, _, name = option.partition("=")
    section = built.study if group == "experiment" else getattr(built, group)
    if group in ("domains", "experiment", "intervention", "logger", "method", "model", "stage"):
        assert section.name == name
    if group == "order":
        assert section.kind == name


def test_an_experiment_says_where_its_results_go():
    found = compose.load(["experiment=micro_full", "study.main_model=micro_s"])
    assert found.results.dir == "results/micro_full/micro_s"
    assert compose.load(["experiment=micro"]).results.dir == "results/micro"


def test_every_stage_has_an_option():
    def ours(stage) -> bool:  # other tests register stages of their own
        return stage.build.__module__.startswith("steerlora.")

    stages = [name for name, stage in STAGES.items() if ours(stage)]
    assert sections.groups()["stage"] == sorted(
        [*stages, "plan", "report", "status", "runs", "compare"]
    )


def test_the_whole_configuration_is_plain_values():
    def assert_plain(value, name: str) -> None:
        if dataclasses.is_dataclass(value):
            package, _, rest = type(value).__module__.partition(".")
            assert package == "steerlora"
            assert "config" in rest.split(".")
            for field, inner in vars(value).items():
                assert_plain(inner, f"{name}.{field}")
        else:
            assert type(value) in (str, int, float, bool, list, tuple, dict, type(None)), name

    assert_plain(compose.load(["stage=base"]), "config")


SCHEMAS = [*SECTIONS.values(), *dict(METHODS.items()).values(), *dict(SAES.items()).values()]
"""The type of every section, of each of its kinds where it has several."""


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_sections_are_frozen_and_by_keyword(schema):
    assert schema.__dataclass_params__.frozen
    with pytest.raises(TypeError):
        schema("positional")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("method.rank=x", r"method\.rank=x: must be a whole number from 1 to 16384"),
        ("trainer.learning_rate=fast", r"trainer\.learning_rate=fast: must be a number above 0"),
        ("method.dynamic_rank=maybe", r"method\.dynamic_rank=maybe: must be true or false"),
        ("method.sites=1", r"method\.sites=1: must be a list of whole numbers"),
        ("method.sites=[a]", r"method\.sites\[0\]=a: must be a whole number"),
        ("trainer.precision=null", r"trainer\.precision=null: must be one of 32-true"),
        ("seed=x", r"seed=x: must be a whole number"),
        ("seed=1.5", r"seed=1\.5: must be a whole number"),
        ("seed=null", r"seed=null: must be a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(overrides, says):
    with pytest.raises(UserError, match=f"^{says}") as caught:
        compose.load([overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("method.rank=-4", "method.rank=-4: must be a whole number from 1"),
        ("method.specialists=0", "method.specialists=0: must be a whole number from 1"),
        ("method.top_k=9", "method.top_k=9 is more than method.specialists=4"),
        ("method.initial_rank=2", "below 1"),
        ("method.losses.load_balance=-1", "method.losses.load_balance=-1: must be a number from 0"),
        ("method.signal=saee", "did you mean 'sae'"),
        ("method=lora method.dynamic_rank=true", "set method.signal=sae"),
        ("method.target_modules=[q_poj]", "did you mean 'q_proj'"),
        ("method=stan method.k=65", "method.k=65 is more than method.units=64"),
        ("method=stan_sae method.k=17", "method.k=17 is more than the 16 latents of the SAE"),
        ("method=stan_threshold method.select=absolute", "set method.select=value"),
        ("method=stan_sae method.gate=static", "set method.gate=token"),
        ("method=stan_sae method.gate_in_evaluation=random", "set method.encoder=learnt or frozen"),
        ("method=stan method.gate=statc", "did you mean 'static'"),
        ("method=stan method.target_modules=[q_poj]", "did you mean 'q_proj'"),
        ("sae.k=600", "sae.k=600 is more than sae.latents=512"),
        ("sae.steps=0", "sae.steps=0: must be a whole number from 1"),
        ("method.sites=[4]", "micro_m has layers 0 to 3"),
        ("model=qwen3_0.6b method.sites=[28]", "qwen3_0.6b has layers 0 to 27"),
        ("model=qwen3_0.6b method.monitor=29", "28 is the stream that leaves them"),
        ("model.thinking=true", "models pretrained here do not think: set model.thinking=null"),
        ("method.sites=[-1]", "method.sites[0]=-1: must be a whole number from 0"),
        ("method.sites=[2,1]", "give layers in rising order, each once"),
        ("method.sites=[]", "method.sites=[]: must be a list of whole numbers"),
        ("model.heads=3", "model.heads=3 is not a multiple of model.kv_heads=2"),
        ("model.layers=null", "model.layers=null: follows from the files of a model that is given"),
        ("model=own", "set model.path=<folder, hub id or GGUF file>, or model.layers"),
        ("model.chat_template=a.jinja", "models pretrained here have their own: set model.chat"),
        ("model.steps=0", "model.steps=0: must be a whole number from 1"),
        ("trainer.max_steps=0", "trainer.max_steps=0: must be a whole number from 1"),
        ("trainer.learning_rate=nan", "trainer.learning_rate=nan: must be a number above 0"),
        ("trainer.warmup_fraction=2", "trainer.warmup_fraction=2: must be a number from 0 to 1"),
        ("trainer.accelerator=cpuu", "did you mean 'cpu'"),
        ("trainer.precision=bf16-mix", "did you mean 'bf16-mixed'"),
        ("evaluation.limit=0", "evaluation.limit=0: must be a whole number from 1"),
        ("evaluation.groups.target=[mmlu]", "the domains' own tasks have that name"),
        ("evaluation.metrics.mmlu=acc", "evaluation.metrics.mmlu=acc: must be metric,filter"),
        ("evaluation.shots.mmlu=-1", "evaluation.shots.mmlu=-1: must be a whole number from 0"),
        ("domains.names=[math,math]", "give each once"),
        ("domains.broad=maths", "did you mean 'math'"),
        ("domains.kind=micr", "did you mean 'micro'"),
        ("plan.gpus=0", "plan.gpus=0: must be a whole number from 1"),
        ("plan.mfu=1.5", "plan.mfu=1.5: must be a number above 0 and up to 1"),
        ("plan.labelled=0", "plan.labelled=0: must be a number above 0"),
        ("plan.tokens_per_row=0", "plan.tokens_per_row=0: must be a number above 0"),
        ("domains=text", "domains.dir=<folder"),
        ("domains=continual", "domains.dir=<folder"),
        ("method.router=mahalanobis method.dynamic_rank=false", "set method.null_specialist=false"),
        ("method=epi method.signal=none", "method.router=mahalanobis needs a signal"),
        ("method=epi method.specialists=4", "needs a specialist a domain: set method.specialists"),
        ("method=epi method.router=least_squares", "has settings of its own: method=any_ssr"),
        ("method=any_ssr method.router=linear", "set method.router=least_squares"),
        ("method=any_ssr method.ridge=0", "method.ridge=0: must be a number above 0"),
        (
            "method=inf_lora method.isolation=free",
            "set method.signal=none and method.isolation=own",
        ),
        ("method=inf_lora method.kept_last=0.5", "is less than method.kept_first=0.95"),
        ("method=inf_lora trainer.strategy=zero2", "set trainer.strategy=single or ddp"),
        ("domains=paper domains.broad=null", "kind hub takes its general text from one of names"),
        ("domains.kind=hub", "domains.sources.instruction is not set, and domains.names has"),
        ("domains=paper domains.sources.law.revision=null", "legal-qa is not pinned: set domains"),
        ("domains=paper domains.sources.law.prompt=null", "name the columns, domains.sources.law"),
        ("domains=paper domains.sources.law.messages=m", "give messages, or prompt and response"),
        ("domains=paper domains.sources.law.pth=m", "sources.law.pth; did you mean 'path'"),
        ("domains=paper domains.sources.law.path=[m]", "sources.law.path=['m']: must be text"),
        ("domains=paper domains.sources.law=m", "sources.law=m: give domains.sources.law.path="),
        ("domains=paper domains.sources.lwa.path=m", "(and domains.names has no lwa)"),
        ("domains=paper domains.sources.lwa.prompt=m", "domains.sources.lwa.path is not set"),
        ("order=given", "name some of instruction, math, code, medicine, law, each once"),
        ("order.kind=broad", "did you mean 'broad_last' or 'broad_first'"),
        ("logger.mode=of", "choose from offline, online"),
        ("study.seeds=[]", "study.seeds=[]: must be a list of whole numbers"),
        ("artifacts.root=''", "artifacts.root=<path>"),
        ("results.dir=''", "results.dir=<path>"),
        ("logger.dir=''", "logger.dir=<path>"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(default_tree, overrides, says):
    changes = overrides.split()
    if any(change.partition("=")[0] in GROUPS for change in changes):
        tree = compose.tree(changes)
    else:  # ten times as fast as composing
        tree = OmegaConf.merge(default_tree, OmegaConf.from_dotlist(changes))
    with pytest.raises(UserError) as caught:
        compose.typed(tree)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.rnk=4", "no such key: method.rnk; did you mean 'method.rank'"),
        ("trainr.max_steps=4", "did you mean 'trainer.max_steps'"),
        ("metod=lora", "did you mean 'method'"),
        ("sead=1", "did you mean 'seed'"),
        ("foo=1", "no such key: foo; choose from artifacts, domains, evaluation"),
        ("+foo=1", "no such key: foo; choose from artifacts, domains, evaluation"),
        ("+trainer.max_step=1", "no such key: trainer.max_step; did you mean 'trainer.max_steps'"),
        ("hydra.rn.dir=x", "no such key: hydra.rn.dir; steerlora --cfg hydra"),
        ("method=sc_lor", "method=sc_lor: did you mean 'sc_lora'"),
        ("stage=adapter_trainig", "stage=adapter_trainig: did you mean 'adapter_training'"),
        ("experiment=smok", "experiment=smok: did you mean 'smoke'"),
        ("model=gpt", "model=gpt: choose from gemma2_2b, gemma2_9b"),
        ("trainer=null", "it cannot be null"),
        ("~trainer", "trainer=<option> of cpu, ddp, gpu"),
        ("model=[a", "cannot read"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(override, says):
    with pytest.raises(UserError) as caught:
        compose.load([override])
    assert says in str(caught.value)
    assert "_schema" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("adapter=sc_lora", "adapter; the group is method now: method=<option>"),
        ("+adapter.rank=4", "adapter; the group is method now: method=<option>"),
        ("adapter.rank=4", "adapter.rank; the group is method now: did you mean 'method.rank'"),
        ("control.sites=[1]", "or 'method.sites'?"),
        ("continual.replay_ratio=0.2", "did you mean 'method.replay.ratio'"),
        ("study.adapters=[lora]", "study.adapters; did you mean 'study."),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_what_it_is_now(old, new):
    with pytest.raises(UserError) as caught:
        compose.load([old])
    assert str(caught.value).startswith("no such key: ")
    assert new in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[no_such_plugin]", "plugins: no_such_plugin cannot be imported (No module named 'no_suc"),
        ("[no_such.plugin]", "plugins: no_such.plugin cannot be imported (No module named 'no_suc"),
        ("[needs_more]", "plugins: needs_more cannot be imported (No module named 'no_such_lib'"),
        ("[misspelt]", "plugins: misspelt cannot be imported (expected ':' (misspelt.py, line 1))"),
        ("needs_more", "plugins=needs_more: give a list of modules, plugins=[my_package.mine]"),
        ("[a", "cannot read plugins=[a"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(given, says, tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_lib\n")
    (tmp_path / "misspelt.py").write_text("class Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        compose.load([f"plugins={given}"])
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_plugins_kind_of_method_is_one_of_the_configurations(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_a_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from steerlora.methods.config import MethodConfig, method\n"
        "@method('toy')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class ToyConfig(MethodConfig):\n"
        "    kind: str = 'toy'\n"
        "    size: int = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(METHODS, "_found", dict(METHODS.items()))
    chosen = ("plugins=[plugin_of_a_test]", "method=_toy")
    found = compose.load([*chosen, "method.size=5"])
    assert found.plugins == ("plugin_of_a_test",)
    assert (type(found.method).__name__, found.method.size) == ("ToyConfig", 5)
    assert found.method.sites == found.model.control_sites
    with pytest.raises(UserError, match=r"key: method\.sice; did you mean 'method\.size'"):
        compose.load([*chosen, "method.sice=5"])


def test_the_contract_command_composes():
    found = compose.load(
        [
            *("stage=adapter_training", "model=micro_s", "domains=micro", "method=sc_lora"),
            *("trainer.max_steps=50", "artifacts.root=DIR", "logger=none"),
        ]
    )
    assert (found.stage.name, found.model.name, found.domains.name, found.method.name) == (
        *("adapter_training", "micro_s", "micro", "sc_lora"),
    )
    assert (found.trainer.max_steps, found.artifacts.root, found.logger.name) == (50, "DIR", "none")


def test_defaults_follow_the_model_and_yield_to_the_command_line():
    large = compose.load(["model=micro_l"])
    assert (large.method.sites, large.sae.latents) == ([2], 640)
    told = compose.load(["model=micro_l", "method.sites=[1,3]", "sae.latents=128"])
    assert (told.method.sites, told.sae.latents) == ([1, 3], 128)


def test_a_mappings_keys_are_the_users():
    found = compose.load(["evaluation=paper", "evaluation.files.gsm8k=a.jsonl"]).evaluation
    assert found.files == {"gsm8k": "a.jsonl"}
    assert found.groups["gsm8k"] == ["gsm8k"]
    assert compose.load(["evaluation=paper"]).evaluation.files == {}
    with pytest.raises(UserError, match=r"evaluation\.shots"):
        compose.load(["evaluation.shots.gsm8k=many"])


def test_the_sae_of_a_model_yields_to_the_command_line():
    scope = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    assert compose.load(["model=qwen3_8b"]).sae.path == scope
    for size in ("2b", "9b"):
        own = compose.load([f"model=gemma2_{size}"]).sae.path
        assert own == f"google/gemma-scope-{size}-pt-res"
    assert compose.load(["model=qwen3_8b", "model.sae_path=null"]).sae.path is None
    assert compose.load(["model=qwen3_4b", "sae.path=mine"]).sae.path == "mine"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # As their model cards say.
        ("qwen3_0.6b", 0.6),
        ("qwen3_1.7b", 1.7),
        ("qwen3_4b", 4.0),
        ("qwen3_8b", 8.2),
        ("qwen3_14b", 14.8),
        ("qwen3_32b", 32.8),
        ("gemma2_2b", 2.6),
        ("gemma2_9b", 9.2),
        ("llama3.2_1b", 1.2),
        ("smollm2_135m", 0.1),
        ("smollm2_135m_q4", 0.1),
    ],
)
def test_true_shapes_have_the_published_number_of_parameters(name, billions):
    model = compose.load([f"model={name}"]).model
    family = {"q": "qwen3", "g": "gemma2", "l": "llama", "s": "llama"}[name[0]]
    config = transformers.AutoConfig.for_model(
        family,
        num_hidden_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_width,
        intermediate_size=model.ffn_width,
        vocab_size=model.vocabulary,
        tie_word_embeddings=model.tied,
    )
    built = on_meta(transformers.AutoModelForCausalLM, config)
    assert round(sum(weight.numel() for weight in built.parameters()) / 1e9, 1) == billions
    assert shape_of(config).items() <= dataclasses.asdict(model).items()
    assert model.control_sites == [model.layers * 3 // 8]


def test_the_seed_reaches_the_intervention_and_nothing_upstream():
    seeded = compose.load(["seed=7"])
    assert (seeded.seed, seeded.intervention.seed) == (7, 7)
    assert (seeded.model.seed, seeded.sae.seed, seeded.domains.seed) == (0, 0, 0)


def test_an_installed_package_finds_its_own_conf(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "steerlora"
    (package / "conf").mkdir(parents=True)
    (package / "conf" / "config.yaml").touch()
    monkeypatch.setattr(sections, "__file__", str(package / "cli" / "sections.py"))
    assert sections.config_directory() == package / "conf"
    (package / "conf" / "config.yaml").unlink()
    with pytest.raises(UserError, match="install the package again"):
        sections.config_directory()


def test_the_linear_layers_named_are_those_of_a_qwen3_layer():
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    qwen3 = transformers.Qwen3Config(
        **shape, intermediate_size=8, num_hidden_layers=1, vocab_size=4
    )
    layer = transformers.Qwen3ForCausalLM(qwen3).model.layers[0]
    linear = {
        name.rpartition(".")[2]
        for name, module in layer.named_modules()
        if type(module).__name__ == "Linear"
    }
    assert linear == set(QWEN3_LINEAR)


def test_the_schema_never_reaches_beyond_plain_python():
    files = [
        *Path(config.__file__).parent.glob("*.py"),
        method_config.__file__,
        sae_config.__file__,
    ]
    for text in (Path(file).read_text() for file in files):
        assert "omegaconf" not in text
        assert "import hydra" not in text


def test_a_kind_in_a_module_of_its_own_is_found_when_its_yaml_asks_for_it(tmp_path, monkeypatch):
    """As a file would be that somebody adds to the package's methods."""
    (tmp_path / "late_kind.py").write_text(
        "from dataclasses import dataclass\n"
        "from steerlora.methods.config import MethodConfig, method\n\n"
        '@method("late_kind")\n'
        "@dataclass(frozen=True, kw_only=True)\n"
        "class LateConfig(MethodConfig):\n"
        '    kind: str = "late_kind"\n'
        "    gain: float = 1.5\n"
    )
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "late.yaml").write_text("defaults: [_late_kind, _self_]\nname: late\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(METHODS, "sources", (*METHODS.sources, "late_kind"))
    found = compose.load([f"hydra.searchpath=[file://{tmp_path}]", "method=late"]).method
    assert (found.kind, found.gain) == ("late_kind", 1.5)
