"""What a plan counts as adapted is what an adapter takes hold of."""

from __future__ import annotations

import pytest
from steerlora.methods.routed_lora.shape import find_targets, size_of

from steerlora.config import AdapterConfig
from steerlora.lm.shapes import DecoderShape
from steerlora.methods.routed_lora.adapter import RoutedLoRAConfig
from steerlora.planning.parameters import adapted


@pytest.mark.parametrize("modules", [None, ["q_proj"], ["mlp.*", "*_attn.o_proj"], ["[kv]_proj"]])
def test_names_paths_and_patterns_mean_the_same(make_model, modules):
    model = make_model()
    wanted = None if modules is None else tuple(modules)
    targets = find_targets(model, RoutedLoRAConfig(sites=(2,), target_modules=wanted))
    expected = {name.rsplit("/", 1)[-1]: size_of(t.linear) for name, t in targets.items()}
    found = adapted(DecoderShape.of(model.config), AdapterConfig(target_modules=modules))
    assert found == expected
