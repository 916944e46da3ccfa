"""Defects of the published code that must not come back: one test each.

Each looks for the defect where a user would see it: in a training, a generation, a checkpoint, a
command. The parts behind them have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.features import taxonomy
from helpers.training import method_module, train
from torch import Tensor, nn

from steerlora.cli import compose
from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.methods.base import Task
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import (
    CONTEXTS,
    HealthConfig,
    MemoryConfig,
    RoutedLoRAConfig,
)
from steerlora.methods.routed_lora.memory import MemoryPolicy
from steerlora.methods.routed_lora.watch import RoutingWatch
from steerlora.methods.saving import save_adapter
from steerlora.stages.method_training import check_intervention
from steerlora.training.checkpoints import Files, newest

E, R, SITE, LAYERS, LATENTS, VOCABULARY = 4, 3, 1, 3, 64, 61
LOSSES = ("preservation", "steering", "gate_sparsity", "rank_budget", "load_balance", "diversity")


def chats(step: int, words: range = range(1, VOCABULARY)) -> ChatBatch:
    """Four texts of unequal lengths in two domains, of the given words."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for length in (9, 4, 7, 5):
        drawn = torch.randint(len(words), (length,), generator=generator)
        rows.append(EncodedChat([words[i] for i in drawn], 2))
    return collate(rows, [0, 1, 0, 1], pad_token_id=0)


@pytest.fixture
def make_module(make_model, make_adapter, make_sae) -> Callable[..., MethodModule]:
    """``make_module(shape={}, **losses)``: with a monitor, and no loss but the task's."""

    def make(shape: dict | None = None, **losses: float) -> MethodModule:
        model = make_model()
        adapter = make_adapter(model, sites=(SITE,), **(shape or {}))
        return method_module(
            model,
            adapter,
            trainer=TrainerConfig(learning_rate=1e-2, checkpoint_seconds=1e-9),
            steps=100,
            monitor=Monitor(model, adapter, make_sae(seed=7), LAYERS, taxonomy()),
            **losses,
        )

    return make


@torch.no_grad()
def logits(model: nn.Module, batch: ChatBatch) -> Tensor:
    """Of real tokens, [T, V]."""
    found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return found.logits[batch.attention_mask.bool()]


@pytest.mark.parametrize("name", LOSSES)
def test_auxiliary_losses_computed_on_detached_gates(make_module, name):
    """A training step with the loss has other gradients than one without, where it is to act."""

    def gradients(**weights: float) -> dict[str, Tensor]:
        module = make_module(**weights)
        module.log = module.log_dict = lambda *_, **__: None
        module.training_step(chats(0), 0).backward()
        return {n: p.grad for n, p in module.method.named_parameters() if p.requires_grad}

    without, changed = gradients(), gradients(**{name: 1.0})
    moved = {n for n, found in changed.items() if (found - without[n]).abs().max() > 1e-7}
    router = {f"routers.{SITE}.weight", f"routers.{SITE}.bias"}
    specialists = set(without) - router
    if name in ("gate_sparsity", "rank_budget", "load_balance"):
        assert moved == router
    else:
        assert moved == (specialists if name == "diversity" else specialists | router)


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_one_dimensional_prototypes_silently_skipping_the_reweighting(
    make_model, make_adapter, router
):
    model = make_model()
    adapter = make_adapter(model, sites=(SITE,), router=router, prototypes=True)
    unweighted = logits(model, chats(0))
    rows = torch.rand(E, LATENTS, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"prototypes must be \[domains, 64\]; got \[64\]"):
        adapter.routers[str(SITE)].set_prototypes(rows[0])
    adapter.routers[str(SITE)].set_prototypes(rows)
    assert (logits(model, chats(0)) - unweighted).abs().max() > 1e-3


def test_one_dimensional_signals_are_no_prototypes_of_domains_either(make_model, make_adapter):
    adapter = make_adapter(make_model(), sites=(SITE,), router="prototype")
    with pytest.raises(ValueError, match=r"signals must be \[texts, 64\]; got \[64\]"):
        adapter.routers[str(SITE)].fit(0, torch.rand(LATENTS))


def test_a_budget_controller_whose_output_nothing_uses(make_module, make_model, tmp_path):
    """Trained to spend no rank, the adapter changes its model the less."""
    module = make_module(task=0.0, rank_budget=1.0)
    module.settings = replace(module.settings, learning_rate=0.1)
    base = logits(make_model(), chats(0))

    def spent() -> tuple[float, float]:
        change = (logits(module.model, chats(0)) - base).square().mean().item()
        return module.method.routing()[SITE].mask.sum(-1).mean().item(), change

    rank, change = spent()
    train(module, chats, tmp_path, 40)
    rank_after, change_after = spent()
    assert rank_after < 0.2 * rank
    assert change_after < 0.2 * change


def test_thresholds_under_which_spawn_merge_and_prune_can_never_fire(make_module, tmp_path):
    """At the default thresholds, in a training whose topic changes once.

    The first two specialists share the first topic, and are one; the other two have nothing to do,
    and one goes, since top-2 needs two; then the second topic is new to all of them.
    """
    module = make_module(shape={"memory": MemoryConfig(enabled=True, every=3)})
    router = module.method.routers[str(SITE)]
    with torch.no_grad():
        router.weight.zero_()
        router.bias[:E] = torch.tensor([0.0, 0.0, -0.5, -0.5])

    def topics(step: int) -> ChatBatch:
        return chats(step, range(1, 3) if step < 3 else range(40, 42))

    task = Task({"law": [EncodedChat([1, 2, 1], 2)]}, 0)
    train(module, topics, tmp_path, 7, module.learner.callbacks(task))
    found = module.learner.history()["events"]
    events = [(event["step"], event["event"], event["specialists"]) for event in found]
    assert events == [(3, "merge", [0, 1]), (3, "prune", [2]), (6, "spawn", [1])]


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_effective_rank_about_1_of_16_at_initialisation(make_model, make_sae, router, per_module):
    model = make_model()
    config = RoutedLoRAConfig(sites=[SITE], router=router, per_module=per_module)
    assert config.rank == 16
    adapter = Adapter(model, config, {SITE: make_sae()}).attach(model)
    batch = chats(0)
    logits(model, batch)
    real = batch.attention_mask.bool()
    assert adapter.routing()[SITE].mask[real].sum(-1).min() >= 8


def test_kaiming_initialisation_of_a_stack_using_the_wrong_fan_in(make_model, make_sae):
    """LoRA's bound of A is 1 / sqrt(D_in), however many specialists and components are stacked."""
    model = make_model()
    adapter = Adapter(model, RoutedLoRAConfig(sites=[SITE]), {SITE: make_sae()})
    for name, layer in adapter.layers.items():
        bound = layer.A.shape[1] ** -0.5
        assert layer.A.abs().max() <= bound, name
        # Uniform: a deviation of bound / sqrt(3).
        assert layer.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("router", ["linear", "mlp", "prototype"])
def test_decoding_with_a_kv_cache_silently_mean_pooling_z_when_lengths_differ(
    make_model, make_adapter, router, context
):
    """Prompts of unequal lengths, padded left, decode as each would alone and without a cache."""
    model = make_model(torch.float64)
    adapter = make_adapter(
        model,
        sites=(SITE,),
        router=router,
        context=context,
        margin=0.01,
    )
    for sae in adapter.saes.values():
        sae.double()
    if router == "prototype":
        generator = torch.Generator().manual_seed(0)
        for specialist in (*range(E), None):
            signals = torch.rand(3, LATENTS, generator=generator)
            adapter.routers[str(SITE)].fit(specialist, signals)
    batch = chats(0)
    prompts = [row[row > 0] for row in batch.input_ids]
    longest = max(map(len, prompts))
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    written = model.generate(
        ids,
        attention_mask=(ids > 0).long(),
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    together = torch.stack(written.logits, 1).double()  # [B, 5, V]
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, written.sequences[row, longest:-1]])
        with torch.no_grad():
            alone = model(whole[None], use_cache=False).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


def test_gate_statistics_that_count_padding(make_module, tmp_path):
    """Trained on the same texts with more padding, all losses on, everything measured is equal."""

    def measured(padding: int) -> tuple[list, dict[str, Tensor], dict[str, Tensor]]:
        def padded(step: int) -> ChatBatch:
            batch = chats(step)
            return replace(
                batch,
                input_ids=F.pad(batch.input_ids, (0, padding), value=33),
                attention_mask=F.pad(batch.attention_mask, (0, padding)),
                labels=F.pad(batch.labels, (0, padding), value=-100),
            )

        module = make_module(**dict.fromkeys(LOSSES, 1.0))
        each = HealthConfig(log_every=1, collapse="ignore")
        watch = RoutingWatch(module.method, ["law", "math"], padded(0), each)
        never = {"spawn_confidence": 0.0, "spawn_similarity": 0.0}
        never |= {"merge_similarity": 1.0, "prune_usage": 0.0}
        policy = MemoryPolicy(module.method, MemoryConfig(every=100, **never), domain="law")
        train(module, padded, tmp_path / str(padding), 3, [watch, policy])
        return watch.history, policy.state_dict()["tensors"], module.method.state_dict()

    (history, seen, weights), (more_history, more_seen, more_weights) = measured(0), measured(9)
    assert len(history) == 3
    for few, many in zip(history, more_history, strict=True):
        assert many == pytest.approx(few, abs=1e-5)
    assert float(seen["window.tokens"]) == 3 * (9 + 4 + 7 + 5)
    for few, many in ((seen, more_seen), (weights, more_weights)):
        for name, value in few.items():
            torch.testing.assert_close(many[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["sc_lora", "sc_lora_reference"])
def test_a_feature_permutation_fixed_before_training(method):
    """It would relabel the latents, which is no control; after training it is one."""
    config = compose.load(["intervention=permute_latents", f"method={method}"])
    check_intervention(config)
    retrained = replace(config, intervention=replace(config.intervention, phase="training"))
    with pytest.raises(UserError, match="no control; use phase evaluation, or randomize"):
        check_intervention(retrained)


def test_whole_backbone_checkpoints_for_an_adapter(make_module, make_model, tmp_path):
    """Neither a training's checkpoints nor the saved adapter hold the base or an SAE."""
    module = make_module(**dict.fromkeys(LOSSES, 1.0))
    train(module, chats, tmp_path / "checkpoints", 2)
    folder = newest(tmp_path / "checkpoints")
    held = Files().load_checkpoint(folder)["state_dict"]
    own = module.method.state_dict()
    assert set(held) == {f"method.{name}" for name in own}
    # Weights, Adam's two moments in float32, and the file's own bookkeeping.
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < 3 * 4 * module.method.parameter_count() + 100_000
    save_adapter(module.method, tmp_path / "adapter", base_fingerprint="")
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < 4 * module.method.parameter_count() + 20_000
