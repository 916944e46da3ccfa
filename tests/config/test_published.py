"""docs/published.md names options that exist, and the experiment takes them all."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from steerlora.cli import compose
from steerlora.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/published.md").read_text(encoding="utf-8")


def reached(config, key: str) -> bool:
    for part in key.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def test_every_option_that_the_page_names_exists():
    config = compose.load(["method=sc_lora_reference"])
    keys = set(re.findall(r"`((?:method|features)(?:\.[a-z_]+)+)`", PAGE))
    assert len(keys) > 15
    assert [key for key in sorted(keys) if not reached(config, key)] == []


def test_the_page_s_command_is_one():
    command = next(line.strip() for line in PAGE.splitlines() if line.startswith("    steerlora"))
    config = compose.load(shlex.split(command)[1:])
    assert config.method == compose.load(["method=sc_lora_reference"]).method
    published = compose.load(["experiment=published"])
    assert (config.sae, config.features) == (published.sae, published.features)


def test_the_experiment_is_of_the_published_configuration():
    config = compose.load(["experiment=published"])
    assert (config.sae.architecture, config.sae.normalize) == ("relu", "layer_norm_input")
    assert (config.features.frequency, config.features.drift) == ("general_text", "token")
    study, micro = config.study, compose.load(["experiment=micro"]).study
    for name in ("paper_method", "ablation_method"):
        assert getattr(study, name) == "sc_lora_reference"
    assert study.seeds == micro.seeds
    assert study.interventions == micro.interventions
    assert config.results.dir == "results/published"


def test_the_reference_has_every_published_choice():
    method = compose.load(["method=sc_lora_reference"]).method
    assert method.streams == [site + 1 for site in method.sites]
    assert (method.router_hidden, method.rank_hidden, method.published_losses) == (256, 256, True)
    assert (method.replay.ratio, method.replay.how) == (0.2, "rows")
    assert (method.optimizer.constant_rate, method.optimizer.over_domains) == (True, True)
    assert (method.memory.per_module, method.memory.warmup) == (True, 400)
    assert 0 < method.dropout < 1
    ours = compose.load(["method=sc_lora"]).method
    assert (ours.reads, ours.published_losses, ours.replay.ratio) == ("input", False, 0)
    assert (ours.optimizer.constant_rate, ours.optimizer.over_domains) == (False, False)
    assert ours.dropout == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("trainer=zero2", "under trainer.strategy=zero2 no rank has the whole optimizer"),
        ("method.isolation=frozen", "set method.optimizer.over_domains=false"),
        ("method.per_module=false", "set method.per_module=true"),
        ("method.source=inline", "set method.source=base"),
        ("method.reads=input", "set method.signal=sae and method.reads=output"),
        ("method.replay.how=batches", "method.replay.how=batches: choose from rows, steps"),
        ("method.dropout=1", "method.dropout=1: must be a number from 0 and below 1"),
        ("method.memory.warmup=-1", "method.memory.warmup=-1: must be a whole number from 0"),
        ("method.rank_hidden=0", "method.rank_hidden=0: must be a whole number from 1"),
        ("features.frequency=text", "features.frequency=text: choose from domains, general_text"),
        ("features.control=shuffled", "features.control=shuffled: choose from dense, none, random"),
        ("features.drift=tokens", "features.drift=tokens: did you mean 'token'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_would(changes, message):
    with pytest.raises(UserError, match=message):
        compose.load(["method=sc_lora_reference", *changes.split()])
