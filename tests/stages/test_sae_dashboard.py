"""Stage ``sae_dashboard``: a page of the domains' own latents, or of those asked for."""

from __future__ import annotations

import shutil

import pytest

from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.stages import sae_dashboard


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    """The experiment's artifacts, and room for more: others count the original's."""
    return ArtifactStore(shutil.copytree(smoke.root, tmp_path_factory.mktemp("more") / "artifacts"))


def built(smoke, store, *changes: str):
    (step,) = sae_dashboard.requested(smoke.config("stage=sae_dashboard", *changes))
    return run([step], store)[step]


def test_latents_by_number_are_shown_in_the_order_given(smoke, store):
    artifact = built(smoke, store, "stage.settings.latents=[7,3,7]", "stage.settings.contexts=2")
    listed = artifact.json("dashboard.json")
    assert [one["latent"] for one in listed] == [7, 3]
    assert artifact.manifest["summary"]["latents"] == 2
    page = (artifact / "dashboard.html").read_text(encoding="utf-8")
    assert page.index('id="latent-7"') < page.index('id="latent-3"')
    for one in listed:
        assert len(one["contexts"]) <= 2
        assert set(one["density_by_domain"]) == set(smoke.config().domains.names)
        assert (one["density"] > 0) == (len(one["contexts"]) > 0)


def test_without_numbers_each_domain_s_strongest_are_shown(smoke, store):
    listed = built(smoke, store, "features.shown=2", "features.least=4").json("dashboard.json")
    domains = {one["domain"] for one in listed}
    assert domains <= set(smoke.config().domains.names)
    assert 0 < len(listed) <= 2 * len(smoke.config().domains.names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("+stage.settings.words=1", "stage.settings.words: stage=sae_dashboard has latents, rows"),
        ("stage.settings.rows=0", "stage.settings.rows=0: a number from 1"),
        ("stage.settings.contexts=few", "stage.settings.contexts=few: a number from 1"),
        ("stage.settings.latents=3", "stage.settings.latents=3: numbers of up to"),
        ("stage.settings.latents=[a]", "numbers of up to"),
        ("stage.settings.latents=[-1]", "numbers of up to"),
        ("stage.settings.latents=[]", "numbers of up to"),
    ],
)
def test_options_that_make_no_sense(change, message, smoke):
    with pytest.raises(UserError, match=message):
        sae_dashboard.requested(smoke.config("stage=sae_dashboard", change))


def test_a_number_that_no_latent_has_is_refused(smoke, store):
    with pytest.raises(UserError, match="there is no latent 100000"):
        built(smoke, store, "stage.settings.latents=[100000]")
