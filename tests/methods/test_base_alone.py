"""``method=base``: the base's own scores by the command line, and no training."""

from __future__ import annotations

import pytest

from steerlora.cli.compose import load
from steerlora.errors import UserError
from steerlora.methods.base import Sources
from steerlora.stages import (
    adapter_training,
    causal_ablation,
    evaluate,
    sequential_forgetting,
)


def test_its_evaluation_is_the_base_s_own():
    """The artifact that experiments compare with, whatever the seed of an adapter would be."""
    asked = evaluate.step(load(["method=base", "seed=3"]))
    assert asked.fingerprint == evaluate.step(load([]), adapted=False).fingerprint
    assert set(asked.inputs) == {"domains", "base"}
    assert asked.label == "evaluate micro_m base"


@pytest.mark.parametrize("stage", [adapter_training, causal_ablation, sequential_forgetting])
def test_what_trains_or_compares_adapters_refuses_it(stage):
    with pytest.raises(
        UserError, match=r"^method=base has nothing to train: stage=evaluate"
    ) as said:
        stage.step(load(["method=base"]))
    assert "\n" not in str(said.value)


def test_it_has_no_signal_to_change():
    with pytest.raises(UserError, match="method=base has none"):
        evaluate.step(load(["method=base", "intervention=shuffle"]))


def test_it_cannot_be_attached(make_model):
    method = load(["method=base"]).method
    with pytest.raises(UserError, match="has nothing to train"):
        method.build(make_model(), Sources(saes={}, taxonomies={}), 0)
