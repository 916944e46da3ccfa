"""An architecture of one's own: a configuration and a module in one file, and nothing else.

What is defined here is all that another architecture needs, beside a YAML file that names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn

from steerlora.cli import compose
from steerlora.config import TrainerConfig
from steerlora.data.activations import ActivationBatches
from steerlora.engine.progress import SilentProgress
from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder, TrainingErrors
from steerlora.saes.config import SAES, SAEConfig, sae
from steerlora.saes.metrics import sae_metrics
from steerlora.saes.saelens import load_sae, sae_fingerprint, save_sae
from steerlora.saes.sparse import SparseFeatures, top_k
from steerlora.saes.training import SAEModule
from steerlora.training.loop import fit


@sae("toy_threshold")
@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(SAEConfig):
    """Latents above a threshold, each with a gain of its own."""

    architecture: str = "toy_threshold"
    threshold: float = 0.1
    """Pre-activation from which a latent is active."""
    sparsity: float = 1e-3
    """Weight of the L1 norm in training."""

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        return Threshold


class Threshold(SparseAutoencoder):
    """z = exp(gain) s 1[s > threshold], with s = (u - b_dec) W_enc + b_enc and a gain [N]."""

    architecture = "toy_threshold"
    own_settings = ("threshold",)

    def __init__(
        self, width: int, latents: int, *, threshold: float, sparsity: float = 0.0, **settings: Any
    ) -> None:
        super().__init__(width, latents, **settings)
        self.threshold, self.sparsity = threshold, sparsity
        self.gain = nn.Parameter(torch.zeros(latents))

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        scores = (x.reshape(-1, self.width) - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = top_k(scores, max(1, int((scores > self.threshold).sum(1).max())))
        values = values * (values > self.threshold) * self.gain[indices].exp()
        shape = (*x.shape[:-1], values.shape[1])
        return SparseFeatures(values.view(shape), indices.view(shape))

    def training_errors(self, x: Tensor, dead: Tensor) -> TrainingErrors:
        features = self.encode_normalized(x)
        residual = x - self.b_dec - self.directions(features, unit_rows=True)
        penalty = self.sparsity * features.values.sum() / len(x)
        return TrainingErrors(residual.square().sum(), penalty, self.times_fired(features))


ConfigStore.instance().store(
    group="sae",
    name="toy_threshold",
    node={
        "defaults": ["_schema", "_self_"],
        "architecture": "toy_threshold",
        "latents": "${model.sae_latents}",
        "threshold": 0.05,
        "sparsity": 0.001,
    },
)
"""What ``conf/sae/toy_threshold.yaml`` would say."""


def test_it_is_chosen_by_configuration():
    chosen = compose.load(["model=micro_s", "sae=toy_threshold", "sae.threshold=0.2"])
    assert type(chosen.sae) is ThresholdConfig
    assert (chosen.sae.threshold, chosen.sae.latents) == (0.2, chosen.model.sae_latents)
    with pytest.raises(UserError, match=r"no such key: sae\.treshold; .*'sae\.threshold'"):
        compose.load(["sae=toy_threshold", "sae.treshold=0.2"])


@pytest.fixture
def config() -> SAEConfig:
    return SAES["toy_threshold"](
        latents=64,
        threshold=0.05,
        normalize="layer_norm",
        learning_rate=5e-3,
        steps=None,
        epochs=8,
        batch_size=128,
        seed=3,
    )


@pytest.fixture
def trained(config, store, tmp_path) -> tuple[SparseAutoencoder, dict[str, float]]:
    batches = ActivationBatches(store, 1, config.batch_size, config.seed)
    made = config.build(store.width)
    made.center_on(batches(0))
    steps = config.steps_over(store.tokens(1))
    assert steps == 8 * 2000 // 128
    figures = fit(
        SAEModule(made, lr=config.learning_rate, total_steps=steps),
        batches,
        steps,
        trainer=TrainerConfig(),
        checkpoints=tmp_path / "checkpoints",
        progress=SilentProgress(),
        description="toy",
    )
    return made, figures


def test_it_trains(trained, config, store):
    made, figures = trained
    x = store.batch(1, 500, seed=0, step=0)
    before = config.build(store.width)
    before.center_on(x)
    assert sae_metrics(made, x)["fvu"] < 0.5 * sae_metrics(before, x)["fvu"]
    assert made.gain.abs().max() > 0
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(64))
    assert figures["tokens"] == 125 * 128
    assert "mfu" not in figures  # its operations are unknown, which is no obstacle


def test_it_is_saved_and_loaded_and_encodes_alike(trained, store, tmp_path):
    made, _ = trained
    save_sae(made, tmp_path / "sae", {"model_name": "micro_s"})
    written = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (written["architecture"], written["threshold"]) == ("toy_threshold", 0.05)
    assert "sparsity" not in written
    loaded = load_sae(tmp_path / "sae")
    assert type(loaded) is Threshold
    assert sae_fingerprint(loaded) == sae_fingerprint(made)
    x = store.batch(1, 20, seed=0, step=0)
    assert all(map(torch.equal, loaded.encode(x), made.encode(x)))
    assert torch.equal(loaded(x), made(x))
    other = Threshold(16, 64, threshold=0.06, normalize="layer_norm")
    other.load_state_dict(made.state_dict())
    assert sae_fingerprint(other) != sae_fingerprint(made)


def test_a_file_without_its_setting_is_refused(trained, tmp_path):
    save_sae(trained[0], tmp_path, {})
    written = json.loads((tmp_path / "cfg.json").read_text())
    del written["threshold"]
    (tmp_path / "cfg.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="architecture toy_threshold needs threshold"):
        load_sae(tmp_path)


def test_it_has_an_untrained_twin(trained, store):
    made, _ = trained
    twin = made.untrained_like(seed=1)
    assert (twin.threshold, twin.normalize) == (0.05, "layer_norm")
    assert torch.equal(twin.b_dec, made.b_dec)
    assert not torch.equal(twin.W_dec, made.W_dec)
    assert twin.encode(store.batch(1, 20, seed=0, step=0)).values.shape[0] == 20
