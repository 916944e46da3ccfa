"""A model with a method is copied, pickled, saved and run in threads as any other."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from steerlora.methods.base import Method
from steerlora.methods.config import MethodConfig

ADAPTERS = {
    "none": {"signal": "none"},
    "sae": {"context": "causal_mean"},
    "dense": {"signal": "dense", "per_module": True},
    "base": {"sites": (1, 2), "source": "base", "context": "ema"},
}


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(MethodConfig):
    """One number, added to the stream at the sites."""

    kind: str = "shift"

    def build(self, model, sources, seed):
        return Shift(self, model).attach(model)


class Shift(Method):
    """Its edits are functions that know it, of which no copy can be made."""

    def __init__(self, config, model) -> None:
        super().__init__(config, model)
        self.amount = torch.nn.Parameter(torch.tensor(0.5))

    def edits(self):
        return {site: lambda stream: stream + self.amount for site in self.config.sites}


@pytest.fixture(params=[*ADAPTERS, "shift"])
def made(request, make_model, make_adapter):
    model = make_model()
    if request.param == "shift":
        return model, ShiftConfig().build(model, None, 0)
    return model, make_adapter(model, **ADAPTERS[request.param])


@pytest.fixture
def run(tokens):
    ids, mask = tokens([6, 4])

    def logits(model) -> Tensor:
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits

    return logits


def by_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": by_torch}
COPIES["pickle"] = lambda pair: pickle.loads(pickle.dumps(pair))


def test_a_copy_is_whole_and_independent(made, run, make_model):
    model, method = made
    base, expected = run(make_model()), run(model)
    (other, own) = copy.deepcopy((model, method))
    assert own.model is other
    assert torch.equal(run(other), expected)
    ours = {id(tensor) for tensor in (*model.parameters(), *method.parameters())}
    assert not ours & {id(tensor) for tensor in (*other.parameters(), *own.parameters())}
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    assert not torch.equal(run(other), expected)
    assert torch.equal(run(model), expected)
    with own.disabled():
        assert torch.equal(run(other), base)
        assert torch.equal(run(model), expected)
    own.remove()
    assert torch.equal(run(other), base)
    assert torch.equal(run(model), expected)
    method.remove()
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("by", ["pickle", "torch.save"])
def test_it_comes_back_from_bytes(by, made, run, make_model):
    model, method = made
    expected = run(model)
    other, own = COPIES[by]((model, method))
    assert torch.equal(run(other), expected)
    own.remove()
    assert torch.equal(run(other), run(make_model()))
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("by", COPIES)
def test_a_copy_made_in_the_middle_of_things_begins_anew(by, make_model, make_adapter, run):
    """What a thread does to a method, and the last forward's graph, are no part of a copy."""
    model = make_model()
    adapter = make_adapter(model)
    expected = run(model)
    model(torch.ones(1, 3, dtype=torch.long)).logits.sum()
    with adapter.disabled():
        other, own = COPIES[by]((model, adapter))
        assert torch.equal(run(other), expected)
    with adapter.intervention("shuffle"):
        run(model)
        other, own = COPIES[by]((model, adapter))
        assert own.running.intervention is None
        assert torch.equal(run(other), expected)


def test_another_thread_is_neither_disabled_nor_intervened_with(make_model, make_adapter, run):
    model = make_model()
    adapter = make_adapter(model)
    expected, found = run(model), []

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: found.append(run(model)))
        thread.start()
        thread.join()

    with adapter.disabled():
        elsewhere()
    with adapter.intervention("invert"):
        assert not torch.equal(run(model), expected)
        elsewhere()
    assert len(found) == 2
    assert all(torch.equal(logits, expected) for logits in found)


def test_save_pretrained_writes_the_base(made, run, make_model, tmp_path, caplog):
    model, method = made
    expected = run(model)
    model.save_pretrained(tmp_path)
    assert "save_adapter writes the adapter" in caplog.text
    loaded, fresh = AutoModelForCausalLM.from_pretrained(tmp_path), make_model()
    assert list(loaded.state_dict()) == list(fresh.state_dict())
    assert torch.equal(run(loaded.eval()), run(fresh))
    assert torch.equal(run(model), expected)  # and the model has its method still
    with pytest.raises(ValueError, match=r"leave state_dict out, or call the adapter's remove\(\)"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    method.remove()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "again")


def test_a_save_that_fails_leaves_the_method_where_it_was(made, run, tmp_path, monkeypatch):
    model, _ = made
    expected = run(model)

    def fail(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert torch.equal(run(model), expected)
