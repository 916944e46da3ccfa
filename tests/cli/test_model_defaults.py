"""A model of which a configuration says nothing but where it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.gguf_files import FFN, HEADS, KV_HEADS, LAYERS, TEMPLATE, TOKENS, WIDTH, write_gguf

from steerlora.cli import compose, model_defaults
from steerlora.cli.command_line import CommandLine
from steerlora.cli.overrides import with_own_model
from steerlora.config import Config
from steerlora.data.chat import encode_chats
from steerlora.data.jsonl import read_rows
from steerlora.distributed import ranks
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.lm import suited
from steerlora.stages import base, domains
from steerlora.stages.common import load_base, place_of

WORLD = ("domains.train_items=6", "domains.pretrain_items=10", "domains.evaluation_items=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("own")
    write_gguf(made / "tiny.gguf")
    write_gguf(made / "bare.gguf", template=None)
    (made / "chat.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture
def own(folder):
    """Gives the configuration of the tiny model, or of another file, with some options."""

    def config(*options: str, file: str = "tiny.gguf") -> Config:
        given = (f"model.path={folder / file}", f"artifacts.root={folder / 'artifacts'}")
        return compose.load([*WORLD, *given, "logger=none", *options])

    return config


def test_a_path_alone_brings_sizes_and_what_suits_them(own, folder, capsys):
    config = own()
    model = config.model
    sizes = (model.layers, model.width, model.heads, model.kv_heads, model.head_width)
    assert sizes == (LAYERS, WIDTH, HEADS, KV_HEADS, WIDTH // HEADS)
    assert (model.ffn_width, model.vocabulary, model.tied) == (FFN, len(TOKENS), True)
    assert config.method.sites == model.control_sites == [1]
    assert config.sae.latents == suited.latents(WIDTH)
    assert config.sae.k == suited.active_latents(WIDTH)
    assert config.trainer.learning_rate == suited.adapter_learning_rate(WIDTH)
    # All rows of the micro world fit into what its longest needs; here a token is a byte.
    store = ArtifactStore(config.artifacts.root)
    built = run([base.step(config), domains.step(config)], store)
    tokenizer = load_base(built[base.step(config)])[1]
    lengths = [
        [len(row.input_ids) for row in encode_chats(tokenizer, read_rows(path), 10**6)]
        for path in sorted((built[domains.step(config)] / "train").glob("*.jsonl"))
    ]
    longest = max(suited.quantile(rows, 0.95) for rows in lengths)
    assert longest > 64
    assert config.trainer.max_length == min(128, 64 * -(-longest // 64))  # 128 positions
    said = capsys.readouterr().out
    assert said.count("measuring") == 1
    assert f"control site 1 of 2 layers, context length {config.trainer.max_length}" in said
    # It is stored: another process measures nothing, and says it again.
    model_defaults._measured.clear()
    compose._load.cache_clear()
    assert own() == config
    said = capsys.readouterr().out
    assert "measuring" not in said
    (facts,) = (folder / "artifacts/model_defaults").glob("*/facts.json")
    assert str(facts.parent) in said
    found = json.loads(facts.read_text())
    assert len(found["sink_ratios"]) == LAYERS
    assert set(found["row_tokens"]) == set(config.domains.names)


def test_what_the_user_sets_stays_and_is_not_measured(own, monkeypatch):
    monkeypatch.setattr(model_defaults, "_facts", None)
    told = own("method.sites=[0]", "trainer.max_length=50", "sae.k=3", "model.sae_latents=40")
    assert (told.method.sites, told.trainer.max_length) == ([0], 50)
    assert (told.sae.k, told.sae.latents) == (3, 40)
    told = own("model.control_sites=[0]", "model.context_length=60", "trainer.learning_rate=0.5")
    assert (told.method.sites, told.trainer.max_length) == ([0], 60)
    assert told.trainer.learning_rate == 0.5
    assert own("trainer.max_length=50", "method=sc_lora_reference").method.sites == [0, 1]


def test_one_of_several_ranks_does_not_measure_alone(own, monkeypatch):
    monkeypatch.setattr(ranks, "current", lambda: ranks.Ranks(rank=1, world=2))
    with pytest.raises(UserError, match="run stage=model_defaults once without torchrun or srun"):
        own("domains.seed=5")


@pytest.mark.parametrize(
    ("given", "alone"),
    [
        (["model.path=a"], True),
        (["model.path=a,b", "seed=1"], True),
        (["model.path=null"], False),
        (["model.path=''"], False),
        (["model=micro_m", "model.path=a"], False),
        (["model.layers=3"], False),
    ],
)
def test_the_option_for_an_own_model_is_chosen_by_its_path_alone(given, alone):
    assert with_own_model(given) == (["model=own", *given] if alone else given)


def test_a_run_and_every_job_of_a_sweep_choose_it(folder):
    file = folder / "tiny.gguf"
    assert CommandLine.parse([f"model.path={file}"]).overrides[0] == "model=own"
    jobs = CommandLine.parse(["-m", "seed=1,2", f"model.path={file}"]).jobs
    assert [job[0] for job in jobs] == ["model=own", "model=own"]


def test_a_base_without_a_chat_template_is_given_one(own, folder, tmp_path):
    with pytest.raises(UserError, match=r"no chat template: .* model\.chat_template=<Jinja file>"):
        own(file="bare.gguf")
    config = own(f"model.chat_template={folder / 'chat.jinja'}", file="bare.gguf")
    step = base.step(config)
    artifact = run([step], ArtifactStore(config.artifacts.root))[step]
    assert place_of(artifact).chat_template == TEMPLATE
    assert load_base(artifact)[1].chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for message in messages %}", "model.chat_template: the file is no chat template"),
        (None, "absent.jinja cannot be read: give a file with a chat template"),
    ],
)
def test_a_template_that_is_none_is_one_line(own, tmp_path, text, says):
    file = tmp_path / "absent.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        own(f"model.chat_template={file}", file="bare.gguf")
    assert "\n" not in str(error.value)
