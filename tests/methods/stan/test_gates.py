"""Controls of a whole model with units: trained, resumed, configured, watched, switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.training import StopAt, Stopped, learner_of, train

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.lm.identity import model_fingerprint
from steerlora.methods.base import SiteSAE, Sources, Task
from steerlora.methods.module import MethodModule
from steerlora.methods.saving import load_adapter, save_adapter
from steerlora.methods.stan.adapter import Stan

SETTINGS = TrainerConfig(batch_size=4, learning_rate=1e-2, checkpoint_seconds=1e-9)
STEPS = 6


def batch(step: int) -> ChatBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedChat(torch.randint(1, 60, (5 + i % 3,), generator=generator).tolist(), 2)
        for i in range(24)
    ]
    return ChatBatches(rows, [0] * 24, batch_size=4, pad_token_id=0, seed=0)(step)


@pytest.fixture
def run(make_model, make_stan):
    """``run(folder, *callbacks, gate="random")``: trains there, or goes on; the method."""

    def run(folder: Path, *callbacks, checkpointing: bool = False, **changes) -> Stan:
        model = make_model()
        method = make_stan(model, **changes)
        learner = learner_of(model, method)
        module = MethodModule(learner, trainer=SETTINGS, total_steps=STEPS)
        callbacks = [*learner.callbacks(Task({"law": []})), *callbacks]
        train(module, batch, folder, STEPS, callbacks, activation_checkpointing=checkpointing)
        return method

    return run


@pytest.mark.parametrize("gate", ["random", "threshold"])
def test_a_resumed_training_is_the_unbroken_one(gate, run, tmp_path):
    unbroken = run(tmp_path / "a", gate=gate).state_dict()
    with pytest.raises(Stopped):
        run(tmp_path / "b", StopAt(3), gate=gate)
    resumed = run(tmp_path / "b", gate=gate).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())
    if gate == "threshold":
        assert all(unbroken[name] > 0 for name in unbroken if name.endswith("threshold"))


@pytest.mark.parametrize("gate", ["token", "random"])
def test_layers_that_are_computed_again_have_the_same_units(gate, run, tmp_path):
    kept, again = (
        run(tmp_path / str(way), gate=gate, checkpointing=way).state_dict() for way in (False, True)
    )
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_chosen_units_are_those_that_acted_most_until_then(run, tmp_path):
    method = run(tmp_path, gate="chosen", chosen_after=0.5)
    real = sum(int(batch(step).attention_mask.sum()) for step in range(STEPS // 2))
    for units in method.layers.values():
        assert units.kept.sum() == 4
        assert 0 < units.fired.sum() <= real * 4
        assert units.fired[units.kept].min() >= units.fired[~units.kept].max()


def test_evaluation_can_have_another_gate_than_training(make_model, make_stan, tokens):
    model = make_model()
    method = make_stan(model)
    ids, mask = tokens([7, 5])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).logits

    intact = logits()
    found = {}
    for gate in ("random", "shuffled"):
        method.configure(gate_in_evaluation=gate)
        found[gate] = logits()
        assert not torch.equal(logits(), found[gate])  # drawn anew in every forward
        method.configure(gate_in_evaluation=gate)
        assert torch.equal(logits(), found[gate])  # from the seed
        training = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(training, intact)  # a gradient is recorded
    assert not torch.equal(found["random"], found["shuffled"])
    method.configure()
    assert torch.equal(logits(), intact)


def test_draws_are_those_of_the_seed_that_it_was_made_with(make_model, make_stan, tmp_path):
    method = make_stan(make_model(), seed=7)
    save_adapter(method, tmp_path, base_fingerprint=model_fingerprint(make_model()))
    assert load_adapter(make_model(), tmp_path).facts() == {"seed": 7}


def test_watched_and_switched_off(make_model, make_stan, tokens):
    model = make_model()
    method = make_stan(model)
    ids, mask = tokens([7, 5])
    intact = model(input_ids=ids, attention_mask=mask).logits
    assert method.forward_state.active is None
    name = next(iter(method.layers))
    with method.watched():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, intact)
        active = method.forward_state.active
    assert set(active) == set(method.layers)
    assert active[name].shape == (2, 7, 12)
    assert 0 < active[name].sum(-1).max() <= 4
    everything = {layer: torch.arange(12) for layer in method.layers}
    with method.switched_off(everything), torch.no_grad():
        off = model(input_ids=ids, attention_mask=mask).logits
    with method.disabled():
        assert torch.equal(off, model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, intact)
    with (
        pytest.raises(ValueError, match="no adapted layer 9:q"),
        method.switched_off({"9:q": torch.tensor([0])}),
    ):
        pass


@pytest.fixture
def of_sae(make_model, make_stan, make_sae):
    model = make_model()
    sources = Sources(saes={1: SiteSAE(make_sae(), 2.5)})
    return model, make_stan(model, sources, encoder="sae", k=3)


def test_the_features_of_a_sae_are_the_units(of_sae, make_model, make_sae, tokens):
    """Against features that are written out, read by a decoder at every layer."""
    model, method = of_sae
    ids, mask = tokens([6, 6])
    plain = make_model()
    states = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    features = make_sae().encode(states[1]).dense(64) / 2.5
    kept = torch.zeros_like(features).scatter(-1, features.topk(3, -1).indices, 1.0)
    code = features * kept / 3
    handles = [
        plain.model.layers[int(name[0])]
        .get_submodule(name[2:].replace("/", "."))
        .register_forward_hook(lambda _, __, y, D=units.decoder: y + code @ D)
        for name, units in method.layers.items()
    ]
    assert len(handles) == 2 * 7
    expected = plain(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4
    )


def test_a_sae_as_encoder_learns_only_d_decodes_and_is_saved(of_sae, make_model, tokens, tmp_path):
    model, method = of_sae
    assert {name.rpartition(".")[2] for name, _ in method.named_parameters()} == {"decoder"}
    ids, mask = tokens([6])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = [
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **settings)
        for use in (True, False)
    ]
    assert torch.equal(*written)
    expected = model(input_ids=ids).logits
    save_adapter(method, tmp_path, base_fingerprint=model_fingerprint(make_model()))
    other = make_model()
    load_adapter(other, tmp_path, sae=method.saes)
    assert torch.equal(other(input_ids=ids).logits, expected)
