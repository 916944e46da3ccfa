"""SAE configurations: what each shipped one builds, and that every key has a say."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

from steerlora.cli import compose, sections
from steerlora.errors import UserError
from steerlora.saes import config as sae_config
from steerlora.saes.config import SAES, TopKConfig
from steerlora.saes.relu import ReLU
from steerlora.saes.topk import TopK


def test_every_architecture_ships_a_file_and_knows_its_name():
    shipped = sections.groups()["sae"]
    assert shipped == [
        "batch_topk",
        "gated",
        "jumprelu",
        "matryoshka_batch_topk",
        "matryoshka_topk",
        "relu",
        "skip_transcoder",
        "topk",
    ]
    for name in shipped:
        config = compose.load([f"sae={name}"]).sae
        assert config.architecture == name
        assert SAES[name].module().architecture == name
        assert type(config.build(8)) is SAES[name].module()


def test_the_published_recipe_can_be_chosen():
    config = compose.load(["model=micro_s", "sae=relu"])
    sae = config.sae
    assert (sae.normalize, sae.l1, sae.latents) == (
        "layer_norm_input",
        1e-3,
        4 * config.model.width,
    )
    assert (sae.batch_size, sae.learning_rate, sae.epochs, sae.steps) == (1024, 1e-3, 5, None)
    assert sae.adam_beta2 == 0.999
    assert sae.path is None
    assert compose.load(["sae=relu", "sae.latents=100"]).sae.latents == 100


def test_epochs_are_passes_over_what_was_harvested():
    assert TopKConfig(steps=7).steps_over(10_000) == 7
    epochs = TopKConfig(steps=None, epochs=3, batch_size=1000)
    assert epochs.steps_over(10_000) == 30
    assert epochs.steps_over(10_999) == 32
    assert epochs.steps_over(10) == 1


def test_a_configuration_builds_what_it_says():
    topk = compose.load(["sae=topk", "sae.k=3", "sae.auxiliary=0.5", "sae.normalize=layer_norm"])
    built = topk.sae.build(8)
    assert type(built) is TopK
    assert (built.width, built.latents, built.k, built.auxiliary) == (8, 512, 3, 0.5)
    assert built.normalize == "layer_norm"
    relu = compose.load(["sae=relu", "sae.l1=0.5", "sae.normalize=none", "sae.seed=3"]).sae.build(8)
    assert type(relu) is ReLU
    assert (relu.l1, relu.normalize) == (0.5, "none")
    assert relu.W_dec.equal(ReLU(8, relu.latents, seed=3).W_dec)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("sae=relu sae.steps=10", "sae.steps=10 and sae.epochs=5: give one of them, and null"),
        ("sae=relu sae.epochs=0", "sae.epochs=0: must be a whole number from 1"),
        ("sae=relu sae.ll=1", "no such key: sae.ll; did you mean 'sae.l1'"),
        ("sae=relu sae.l1=-1", "sae.l1=-1: must be a number from 0"),
        ("sae=relu sae.k=3", "no such key: sae.k; it is a key of sae.architecture=topk"),
        ("sae=relu sae.unit_norm=false", "sae.unit_norm=false: the L1 penalty of sae.architecture"),
        (
            "sae=gated sae.unit_norm=false",
            "sae.unit_norm=false: the L1 penalty of sae.architecture",
        ),
        (
            "sae=jumprelu sae.penalty=tanh sae.unit_norm=false",
            "sae.unit_norm=false: the tanh penalty of sae.architecture=jumprelu would be escaped",
        ),
        ("sae=jumprelu sae.penalty=l1", "sae.penalty=l1: choose from l0, tanh"),
        ("sae=jumprelu sae.bandwidth=0", "sae.bandwidth=0: must be a number above 0"),
        ("sae=jumprelu sae.initial_l0=513", "sae.initial_l0=513 is more than sae.latents=512"),
        ("sae=gated sae.initial_l0=513", "sae.initial_l0=513 is more than sae.latents=512"),
        ("sae=matryoshka_topk sae.levels=11", "too often: at most 10 levels"),
        ("sae=matryoshka_topk sae.levels=0", "sae.levels=0: must be a whole number from 1"),
        ("sae=skip_transcoder sae.span=0", "sae.span=0: must be a whole number from 1"),
        (
            "sae=skip_transcoder sae.normalize=layer_norm",
            "sae.normalize=layer_norm: a skip-transcoder writes another stream than it reads",
        ),
        (
            "model=micro_s method.sites=[1] sae=skip_transcoder sae.span=9",
            "sae.architecture=skip_transcoder of site 1 is trained on the stream entering layer 10",
        ),
        ("sae=batch_topk sae.k=600", "sae.k=600 is more than sae.latents=512"),
        ("sae.initial_k=600", "sae.initial_k=600 is more than sae.latents=512"),
        ("sae.anneal_fraction=0", "sae.anneal_fraction=0: must be a number above 0"),
        ("sae.warmup_fraction=2", "sae.warmup_fraction=2: must be a number from 0 to 1"),
        ("sae.decay_fraction=-1", "sae.decay_fraction=-1: must be a number from 0 to 1"),
        ("sae.l1=3", "no such key: sae.l1; it is a key of sae.architecture=relu"),
        ("sae.auxiliary=-1", "sae.auxiliary=-1: must be a number from 0"),
        ("sae.dead_fraction=2", "sae.dead_fraction=2: must be a number above 0 and up to 1"),
        ("sae.normalize=layernorm", "sae.normalize=layernorm: did you mean 'layer_norm'"),
        ("sae.k=600", "sae.k=600 is more than sae.latents=512"),
        ("sae.architecture=tokp", "sae.architecture=tokp: did you mean 'topk'"),
        ("sae=rleu", "sae=rleu: did you mean 'relu'"),
    ],
)
def test_a_mistake_is_named_with_its_fix(overrides, says):
    with pytest.raises(UserError) as caught:
        compose.load(overrides.split())
    assert says in str(caught.value)


def test_every_field_is_documented_under_itself():
    for node in ast.parse(inspect.getsource(sae_config)).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and field.target.id != "architecture":
                    assert isinstance(getattr(after, "value", None), ast.Constant), field.target.id


def test_composing_needs_no_torch():
    code = (
        "import sys; from steerlora.cli import compose; compose.load(['sae=relu']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_budgets_follow_the_latents_unless_they_are_given():
    small, large = (TopKConfig(latents=latents) for latents in (512, 8192))
    assert (small.tokens_to_harvest, small.steps_over(10)) == (200_000, 1000)
    assert (large.tokens_to_harvest, large.steps_over(10)) == (300 * 8192, 1600 * 8192 // 1024)
    given = TopKConfig(latents=8192, max_tokens=5, steps=7)
    assert (given.tokens_to_harvest, given.steps_over(10)) == (5, 7)
    assert compose.load(["sae.steps=null"]).sae.steps_over(10) == 1000
