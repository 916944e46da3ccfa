"""The interface of a method by two small ones: what they need not write themselves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.training import learner_of, train
from torch import Tensor, nn

import steerlora
from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.lm.decoder import residual_streams
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.targets import ReplacedLinear
from steerlora.methods import saving
from steerlora.methods.base import Learner, Method, Task
from steerlora.methods.config import MethodConfig
from steerlora.methods.module import MethodModule
from steerlora.methods.saving import load_adapter, save_adapter
from steerlora.registry import Registry
from steerlora.training.language import next_token_loss


@dataclass(frozen=True, kw_only=True)
class BiasConfig(MethodConfig):
    """A vector for each site and a factor for each linear layer."""

    kind: str = "bias"
    scale: float = 1.0

    def build(self, model, sources, seed):
        return Bias(self, model).attach(model)


class Scaled(ReplacedLinear):
    def __init__(self, base, factor, state) -> None:
        super().__init__(base)
        self.factor, self.state = factor, state

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.state.disabled else self.base(x) * self.factor


class Bias(Method):
    def __init__(self, config: BiasConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.observed = 0
        self.vectors = nn.ParameterList(torch.full((32,), 0.5) for _ in config.sites)
        self.factors = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(0.5)) for name in self.targets(model)}
        )
        self.register_buffer("fixed", torch.ones(3))

    def edits(self):
        return {
            site: lambda stream, vector=vector: stream + self.config.scale * vector
            for site, vector in zip(self.config.sites, self.vectors, strict=True)
        }

    def replacements(self, model):
        return {
            name: Scaled(target.linear, self.factors[name], self.running)
            for name, target in self.targets(model).items()
        }

    def observe(self, model, given):
        super().observe(model, given)
        self.observed += 1


@pytest.fixture
def made(make_model):
    """A model and an attached method."""
    model = make_model()
    config = BiasConfig(sites=[1, 2], target_modules=["up_proj"])
    return model, config.build(model, None, 0)


def batch(step: int = 0) -> ChatBatch:
    generator = torch.Generator().manual_seed(step)
    rows = [
        EncodedChat(torch.randint(1, 60, (length,), generator=generator).tolist(), 2)
        for length in (9, 4, 7, 5)
    ]
    return collate(rows, [0, 1, 0, 1], pad_token_id=0)


def test_it_is_attached_disabled_and_removed_exactly(make_model, tokens):
    model = make_model()
    ids, mask = tokens([6, 4])
    modules, base = list(model.modules()), model(ids, attention_mask=mask).logits
    streams = residual_streams(model, ids, mask, [1, 2])
    method = BiasConfig(sites=[1, 2], target_modules=["up_proj"]).build(model, None, 0)
    assert sorted(method.factors) == ["1:mlp/up_proj", "2:mlp/up_proj"]
    assert method.first_layer == 1
    changed = model(ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(changed.hidden_states[1], streams[1])  # nothing below the first site
    assert not torch.allclose(changed.logits, base)
    assert method.observed == 1
    assert torch.equal(method.forward_state.attention_mask, mask)
    with method.disabled():
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
        with method.disabled():
            pass
        assert torch.equal(model(ids, attention_mask=mask).logits, base)
    assert method.observed == 1  # and the state is the last active forward's
    assert torch.equal(method.forward_state.attention_mask, mask)
    assert torch.equal(model(ids, attention_mask=mask).logits, changed.logits)
    method.remove()
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert "forward" not in vars(model.model)
    assert torch.equal(model(ids, attention_mask=mask).logits, base)
    with pytest.raises(ValueError, match="not attached"):
        method.remove()
    method.attach(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, changed.logits)


def test_an_error_inside_leaves_it_enabled(made, tokens):
    model, method = made
    ids, _ = tokens([6])
    before = model(ids).logits
    with pytest.raises(KeyError, match="mine"), method.disabled():
        raise KeyError("mine")
    assert torch.equal(model(ids).logits, before)


def test_a_second_method_is_refused(made):
    model, method = made
    for again in (lambda: method.attach(model), lambda: Bias(method.config, model)):
        with pytest.raises(ValueError, match="already carries an adapter"):
            again()


def test_the_base_is_frozen_and_the_rest_counted(made):
    model, method = made
    own = {id(parameter) for parameter in method.parameters()}
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in own)
    assert method.parameter_count() == 2 * 32 + 2
    assert sum(p.numel() for p in method.products()) == 2 * 32 + 2


def test_what_a_method_does_not_say_is_nothing(made):
    _, method = made
    config = method.config
    assert method.health(["law"], 0) is None
    assert method.facts() == {}
    method.load_facts({})
    assert not method.saes
    flags = ("reads_features", "reads_taxonomy", "compares_with_base", "has_control_signal")
    assert not any(getattr(config, flag) for flag in (*flags, "exports_to_peft"))
    assert config.at_evaluation == {}


def test_without_a_control_signal_there_is_no_intervention(made):
    _, method = made
    for name in ("shuffle", "no_such_name"):
        with pytest.raises(ValueError, match=f"intervention {name} acts on a control") as caught:
            method.intervention(name, seed=3, domain="law")
        assert str(caught.value).endswith("features, and bias has none")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="PEFT has no format for bias"):
        steerlora.export_peft(method, "nowhere", base_path="base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": []}, r"method\.sites=\[\]: must be a list of whole numbers"),
        ({"sites": [2, 1]}, r"method\.sites=\[2, 1\]: give layers in rising order"),
        ({"sites": [1, 1]}, "give each once"),
        ({"sites": [-1]}, "must be a whole number from 0"),
        ({"sites": [1, 2], "monitor": 1}, r"method\.monitor=1: must be above .* site, 1"),
    ],
)
def test_every_configuration_has_sites_in_order_and_a_monitor_above(changes, message):
    with pytest.raises(UserError, match=message):
        BiasConfig(**changes)


# Training and keeping


@pytest.fixture
def learner(made) -> Learner:
    return learner_of(*made)


def test_a_learner_trains_by_the_next_token_alone(learner, tmp_path):
    task = Task({"law": [], "math": []})
    assert (task.name, Task({"math": []}, 1).name) == ("all", "math")
    assert learner.callbacks(task) == []
    assert (learner.state(), learner.history(), learner.general_text(3)) == ({}, {}, [])
    learner.begin(task)
    ((name, (weight, loss)),) = learner.losses(batch()).items()
    assert (name, weight) == ("task", 1.0)
    assert torch.equal(loss, next_token_loss(learner.model, batch()))
    frozen = {n: p.clone() for n, p in learner.model.named_parameters() if "factor" not in n}
    before = {name: value.clone() for name, value in learner.method.state_dict().items()}
    module = MethodModule(learner, trainer=TrainerConfig(learning_rate=3e-2), total_steps=20)
    with learner.training(task):
        train(module, lambda step: batch(), tmp_path, 20)
    assert next_token_loss(learner.model, batch()) < 0.9 * loss
    after = dict(learner.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    for name, value in learner.method.state_dict().items():
        assert torch.equal(value, before[name]) == (name == "fixed"), name


def test_any_registered_method_comes_back_from_disk(
    made, make_model, tokens, tmp_path, monkeypatch
):
    model, method = made
    registry = Registry("method.kind")
    registry.register("bias")(BiasConfig)
    monkeypatch.setattr(saving, "METHODS", registry)
    ids, mask = tokens([6, 4])
    with torch.no_grad():
        method.vectors[0].normal_(generator=torch.Generator().manual_seed(0))
    expected = model(ids, attention_mask=mask).logits
    fresh = make_model()
    save_adapter(method, tmp_path / "a", base_fingerprint=model_fingerprint(fresh))
    loaded = load_adapter(fresh, tmp_path / "a")
    assert loaded.config == method.config
    assert torch.equal(fresh(ids, attention_mask=mask).logits, expected)
    loaded.remove()
    assert torch.equal(fresh(ids).logits, make_model()(ids).logits)
