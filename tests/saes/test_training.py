"""SAE training: a dense reference step by step, exact resume, schedules and logged names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from steerlora.data.activations import ActivationBatches, ActivationStore
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.batch_topk import BatchTopK
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.relu import ReLU
from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule
from steerlora.training.loop import StepBatches

WIDTH, LATENTS, K = 16, 64, 3


def fit(
    module: SAEModule,
    store: ActivationStore,
    directory: Path,
    *,
    checkpoint: Path | None = None,
    callbacks: tuple = (),
    stop_after: int | None = None,
    batch_size: int = 128,
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=stop_after or module.total_steps,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=directory,
    )
    loader = StepBatches(
        ActivationBatches([store], batch_size, 0),
        module.total_steps,
        lambda: trainer.global_step,
    )
    if checkpoint is None:
        module.sae.center_on(loader.batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


class Recorder(lightning.Callback):
    """What was logged at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.mark.parametrize("dead_after", [10_000, 60], ids=["all alive", "some dead"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_steps_equal_a_dense_reference(dead_after, normalize, store, tmp_path):
    steps, size = 6, 40
    sae = TopK(WIDTH, LATENTS, k=K, auxiliary=0.5, normalize=normalize).double()
    module = SAEModule(sae, total_steps=steps, lr=1e-2, dead_after_tokens=dead_after)
    twin = TopK(WIDTH, LATENTS, k=K, normalize=normalize).double()
    losses, dead_seen = [], 0
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2, betas=(0.9, 0.95))
    idle = torch.zeros(LATENTS)
    for step in range(steps):
        x = twin.normalized(ActivationBatches([store], size, 0)(step)).x
        if step == 0:
            twin.center_on(ActivationBatches([store], size, 0)(0))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * module.lr_factor(step)
        rows = F.normalize(twin.W_dec, dim=1)
        scores = (x - twin.b_dec) @ twin.W_enc + twin.b_enc
        kept = torch.where(scores >= scores.topk(K).values[:, -1:], scores, 0).relu()
        residual = x - twin.b_dec - kept @ rows
        loss = residual.square().sum() / (x - x.mean(0)).square().sum()
        dead = idle >= dead_after
        dead_seen = max(dead_seen, int(dead.sum()))
        if dead.any():
            count = min(WIDTH // 2, int(dead.sum()))
            masked = scores.masked_fill(~dead, -torch.inf)
            threshold = masked.topk(count).values[:, -1:]
            extra = torch.where(masked >= threshold, scores, 0).relu()
            target = residual.detach()
            unexplained = (target - extra @ rows).square().sum()
            unexplained = unexplained / (target - target.mean(0)).square().sum()
            loss = loss + 0.5 * min(1.0, int(dead.sum()) / (WIDTH // 2)) * unexplained
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        twin.normalize_decoder()
        idle = torch.where((kept > 0).any(0), 0, idle + size)
        losses.append(loss.item())
    assert (dead_seen > 0) == (dead_after == 60)

    recorder = Recorder()
    fit(module, store, tmp_path, callbacks=(recorder,), batch_size=size)
    assert [step["sae/loss"] for step in recorder.steps] == pytest.approx(losses, rel=1e-5)
    for (name, ours), theirs in zip(sae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, msg=name)
    assert torch.equal(module.tokens_since_fired, idle.long())


def test_topk_training_explains_the_data_and_logs_the_contract_s_names(store, tmp_path):
    module = SAEModule(
        TopK(WIDTH, LATENTS, k=K),
        total_steps=150,
        lr=5e-3,
        warmup_steps=10,
        dead_after_tokens=2000,
    )
    recorder = Recorder()
    fit(module, store, tmp_path, callbacks=(recorder,))
    assert set(recorder.steps[-1]) == {
        "sae/loss",
        "sae/fvu",
        "sae/l0",
        "sae/dead_fraction",
        "sae/lr",
    }
    assert recorder.steps[-1]["sae/fvu"] < 0.1 < recorder.steps[0]["sae/fvu"]
    assert recorder.steps[-1]["sae/l0"] <= K
    torch.testing.assert_close(module.sae.W_dec.norm(dim=1), torch.ones(LATENTS))


def test_relu_training_explains_the_data_and_l1_shrinks_its_features(store, tmp_path):
    norm = {}
    for l1 in (0.0, 0.1):
        module = SAEModule(
            ReLU(WIDTH, LATENTS, l1=l1),
            total_steps=150,
            lr=5e-3,
        )
        recorder = Recorder()
        fit(module, store, tmp_path / str(l1), callbacks=(recorder,))
        assert recorder.steps[-1]["sae/fvu"] < 0.3 * recorder.steps[0]["sae/fvu"]
        torch.testing.assert_close(module.sae.W_dec.norm(dim=1), torch.ones(LATENTS))
        values = module.sae.encode(ActivationBatches([store], 128, 0)(149)).values
        l0 = (values > 0).sum(1).float().mean().item()
        assert l0 == pytest.approx(recorder.steps[-1]["sae/l0"], rel=0.1)
        norm[l1] = values.sum(1).mean().item()
    assert norm[0.1] < 0.7 * norm[0.0]


MAKE: dict[str, Callable[[], SparseAutoencoder]] = {
    "topk": lambda: TopK(WIDTH, LATENTS, k=K),
    "relu": lambda: ReLU(WIDTH, LATENTS),
    "batch_topk": lambda: BatchTopK(WIDTH, LATENTS, k=K, initial_k=20, anneal_fraction=0.9),
    "jumprelu": lambda: JumpReLU(WIDTH, LATENTS),
}


@pytest.mark.parametrize("architecture", MAKE)
def test_a_resumed_run_has_the_losses_and_weights_of_a_whole_one(architecture, store, tmp_path):
    def module() -> SAEModule:
        sae = MAKE[architecture]()
        return SAEModule(sae, total_steps=12, lr=1e-2, warmup_steps=2, dead_after_tokens=300)

    whole, expected = module(), Recorder()
    fit(whole, store, tmp_path / "whole", callbacks=(expected,))

    saver = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{step}", every_n_train_steps=5)
    fit(module(), store, tmp_path / "cut", callbacks=(saver,), stop_after=7)
    resumed, recorder = module(), Recorder()
    fit(
        resumed,
        store,
        tmp_path / "resumed",
        checkpoint=tmp_path / "saved" / "step=5.ckpt",
        callbacks=(recorder,),
    )
    assert len(recorder.steps) == 7
    for ours, theirs in zip(recorder.steps, expected.steps[5:], strict=True):
        assert ours == theirs
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_learning_rate_rises_holds_and_falls():
    module = SAEModule(
        TopK(WIDTH, LATENTS, k=K), total_steps=20, warmup_steps=4, decay_fraction=0.25
    )
    factors = [module.lr_factor(step) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:15] == [1.0] * 10
    assert factors[15:20] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert factors[20] == 0
    assert module.lr == pytest.approx(8e-4 / (LATENTS / 2**14) ** 0.5)


def test_steps_do_not_shrink_with_the_gradient():
    """Adam that remembers large first gradients makes small steps for long."""
    module = SAEModule(TopK(WIDTH, LATENTS, k=K), total_steps=200, lr=1e-3)
    bias, optimizer = module.sae.b_enc, module.configure_optimizers()["optimizer"]
    moved = []
    for step in range(200):
        bias.grad = torch.full_like(bias, 50.0 if step < 20 else 1.0)
        before = bias.detach().clone()
        optimizer.step()
        moved.append((before - bias).mean().item())
    assert moved[-1] == pytest.approx(moved[0], rel=0.1)


def test_without_decay_the_rate_stays():
    module = SAEModule(TopK(WIDTH, LATENTS, k=K), total_steps=20, decay_fraction=0)
    assert [module.lr_factor(step) for step in range(20)] == [1.0] * 20


@pytest.mark.parametrize("unit_norm", [True, False])
def test_k_and_the_norms_of_rows_are_what_the_options_say(unit_norm, store, tmp_path):
    sae = TopK(WIDTH, LATENTS, k=2, initial_k=12, anneal_fraction=0.5, unit_norm=unit_norm)
    recorder = Recorder()
    fit(SAEModule(sae, total_steps=10, lr=1e-2), store, tmp_path, callbacks=(recorder,))
    assert [round(step["sae/l0"]) for step in recorder.steps] == [12, 10, 8, 6, 4, *[2] * 5]
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(LATENTS), atol=1e-6) == unit_norm


def test_dead_latents_are_those_idle_for_long_enough(store):
    module = SAEModule(TopK(WIDTH, LATENTS, k=K), total_steps=1, dead_after_tokens=20)
    fired = torch.zeros(LATENTS)
    fired[:40] = 1
    module.count_idle_tokens(fired, 10)
    assert not module.dead().any()
    fired[:] = 0
    fired[50] = 1
    module.count_idle_tokens(fired, 10)
    assert module.dead().nonzero()[:, 0].tolist() == [*range(40, 50), *range(51, 64)]


def test_a_penalised_sae_learns_activations_of_any_size(store, tmp_path):
    x = torch.cat([ActivationBatches([store], 128, 0)(step) for step in range(4)])
    unexplained = {}
    for size, scale in {1.0: 1.0, 1e4: 1e4, 1e-3: 1e-3}.items():
        sae = ReLU(WIDTH, LATENTS, l1=1e-3)
        module = SAEModule(sae, total_steps=30, lr=1e-2, scale=scale)
        sae.center_on(x)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(30):
            loss = module.losses(size * x)[0].total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sae.rescale(scale)
        unexplained[size] = ((sae(size * x) - size * x).square().sum() / size**2).item()
    assert unexplained[1e4] == pytest.approx(unexplained[1.0], rel=1e-3)
    assert unexplained[1e-3] == pytest.approx(unexplained[1.0], rel=1e-3)
