"""Linear layers to replace: how they are named, chosen, found again and put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steerlora.lm.decoder import attach_edits
from steerlora.lm.targets import (
    ReplacedLinear,
    find_targets,
    put_back,
    refuse_changed,
    size_of,
)


class Bottleneck(ReplacedLinear):
    """With linear parts of its own, as a method may have them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def replace(model: nn.Module, *arguments) -> dict:
    targets = find_targets(model, *arguments)
    for parent, child, linear in targets.values():
        setattr(parent, child, Bottleneck(linear))
    return targets


def test_they_are_named_by_layer_and_path_lowest_first(make_model):
    names = list(find_targets(make_model(), 1, ["q_proj", "mlp.*"]))
    inside = ["self_attn/q_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"]
    assert names == [f"{layer}:{path}" for layer in (1, 2) for path in inside]
    parent, child, linear = find_targets(make_model(), 2, None)["2:mlp/up_proj"]
    assert getattr(parent, child) is linear
    assert size_of(linear) == (32, 48)
    assert size_of(Conv1D(nf=7, nx=5)) == (5, 7)


def test_names_paths_and_patterns_choose_them(make_model):
    model = make_model()

    def chosen(*patterns: str) -> set[str]:
        return {name.split(":")[1].replace("/", ".") for name in find_targets(model, 2, patterns)}

    assert chosen("q_proj") == chosen("self_attn.q_proj") == {"self_attn.q_proj"}
    assert chosen("mlp.*", "o_proj") == {
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "self_attn.o_proj",
    }
    assert chosen("*_proj") == chosen("*")
    assert len(chosen("*")) == len(find_targets(model, 2, None)) == 7
    with pytest.raises(ValueError, match=r"no linear module named mpl\.\*; .* mlp\.up_proj \(Lin"):
        chosen("q_proj", "mpl.*")
    with pytest.raises(ValueError, match=r"no linear module named at all; .* mlp\.up_proj \(Lin"):
        chosen()


@pytest.mark.parametrize("first", [-1, 3])
def test_a_layer_that_the_model_does_not_have_is_refused(make_model, first):
    with pytest.raises(ValueError, match=f"control site {first}: the model has layers 0 to 2"):
        find_targets(make_model(), first, None)


def test_replaced_layers_are_found_again_without_their_own_parts_and_put_back(make_model, tokens):
    model = make_model()
    ids, _ = tokens([5])
    modules, before = list(model.modules()), model(ids).logits
    targets = replace(model, 1, ["*_proj"])
    assert not torch.allclose(model(ids).logits, before)
    for patterns in (None, ["*"], ["*_proj"]):  # neither "base", "down" nor "up"
        again = find_targets(model, 1, patterns)
        assert list(again) == list(targets)
        for found, target in zip(again.values(), targets.values(), strict=True):
            assert found[:2] == target[:2]
            assert isinstance(found.linear, Bottleneck)
            assert found.linear.base is target.linear
    for part in ("base", "down", "up", "mlp.up_proj.down"):
        with pytest.raises(ValueError, match=r"mlp\.up_proj \(Bottleneck\)"):
            find_targets(model, 1, [part])
    put_back(again)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(ids).logits, before)


def test_they_are_found_behind_edits(make_model):
    model = make_model()
    expected = find_targets(model, 0, None)
    for _ in range(2):
        attach_edits(model, {0: lambda stream: stream, 2: lambda stream: stream})
    assert find_targets(model, 0, None) == expected


def test_a_model_that_has_replaced_or_edited_layers_is_refused(make_model):
    for change in (
        lambda model: replace(model, 2, ["up_proj"]),
        lambda model: attach_edits(model, {2: lambda stream: stream}),
    ):
        model = make_model()
        refuse_changed(model)
        change(model)
        with pytest.raises(ValueError, match=r"already carries an adapter: call its remove\(\)"):
            refuse_changed(model)


def test_a_replaced_layer_answers_for_its_base(make_model):
    base = nn.Linear(5, 7)
    layer = ReplacedLinear(base)
    assert layer.weight is base.weight
    assert (layer.in_features, layer.out_features) == (5, 7)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
