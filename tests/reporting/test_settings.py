"""Flat settings: the same keys and types whatever the stage."""

from __future__ import annotations

import pytest
from helpers.artifacts import store_evaluation
from helpers.world import World

from steerlora.engine.lineage import Library
from steerlora.reporting.settings import NAMES, differing, matches, settings_of


@pytest.fixture
def library(tmp_path):
    for rank in (2, 8):
        store_evaluation(tmp_path, World().evaluation("micro_m", "sc_lora", 1), rank=rank)
    return Library(tmp_path)


@pytest.fixture
def every(library):
    return [settings_of(library.ancestry(artifact)) for artifact in library.all()]


def test_an_evaluation_knows_the_rank_of_the_adapter_that_it_scores(every):
    scored = [one for one in every if one["stage"] == "evaluate"]
    assert differing(scored) == {"method.rank": [one["method.rank"] for one in scored]}
    assert {one["method.rank"] for one in scored} == {2, 8}
    for one in scored:
        assert one["seed"] == 1
        assert one["trainer.max_steps"] == 400
        assert one["sae.k"] == 16
        assert one["model.layers"] == 4
        assert one["domains.names"] == "[instruction,math,code,medicine,law]"
        assert one["upstream.adapter_training"] != one["fingerprint"]


def test_what_has_no_bearing_on_an_artifact_is_none_or_absent(every):
    (base,) = (one for one in every if one["stage"] == "base")
    assert base["method.name"] == base["sae.architecture"] == base["intervention.name"] == "none"
    assert not {"method.rank", "trainer.max_steps", "seed", "upstream.base"} & set(base)


def test_a_key_has_one_type_in_every_stage(every):
    types = {}
    for one in every:
        assert set(NAMES) <= set(one)
        for key, value in one.items():
            assert isinstance(value, bool | int | float | str), key
            assert types.setdefault(key, type(value)) is type(value), key


def test_settings_are_filtered_by_value(every):
    def count(**wanted):
        return sum(
            matches(one, {k.replace("__", "."): v for k, v in wanted.items()}) for one in every
        )

    assert count(method__rank=8) == 2
    assert count(method__rank=8, stage="evaluate") == 1
    assert count(method__sites=[1]) == 4
    assert count(model__path=None) == len(every)
