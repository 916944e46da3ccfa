"""An architecture of one's own: a configuration and a module in one file, and nothing else.

tests/extension/threshold.py is all that another architecture needs, beside a YAML file.
"""

from __future__ import annotations

import json

import pytest
import torch
from threshold import Threshold, ThresholdConfig

from steerlora.cli import compose
from steerlora.config import TrainerConfig
from steerlora.data.activations import ActivationBatches
from steerlora.engine.progress import SilentProgress
from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import SAES, SAEConfig
from steerlora.saes.metrics import sae_metrics
from steerlora.saes.saelens import load_sae, sae_fingerprint, save_sae
from steerlora.saes.training import SAEModule
from steerlora.training.loop import fit


def test_it_is_chosen_by_configuration():
    chosen = compose.load(
        ["plugins=[threshold]", "model=micro_s", "sae=threshold", "sae.threshold=0.2"]
    )
    assert type(chosen.sae) is ThresholdConfig
    assert (chosen.sae.threshold, chosen.sae.latents) == (0.2, chosen.model.sae_latents)
    with pytest.raises(UserError, match=r"no such key: sae\.treshold; .*'sae\.threshold'"):
        compose.load(["plugins=[threshold]", "sae=threshold", "sae.treshold=0.2"])


@pytest.fixture
def config() -> SAEConfig:
    return SAES["threshold"](
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
    batches = ActivationBatches([store], config.batch_size, config.seed)
    made = config.build(store.width)
    made.center_on(batches(0))
    steps = config.steps_over(batches.tokens)
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
    x = ActivationBatches([store], 500, 0)(0)
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
    assert (written["architecture"], written["threshold"]) == ("threshold", 0.05)
    assert "sparsity" not in written
    loaded = load_sae(tmp_path / "sae")
    assert type(loaded) is Threshold
    assert sae_fingerprint(loaded) == sae_fingerprint(made)
    x = ActivationBatches([store], 20, 0)(0)
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
    with pytest.raises(UserError, match="architecture threshold needs threshold"):
        load_sae(tmp_path)


def test_it_has_an_untrained_twin(trained, store):
    made, _ = trained
    twin = made.untrained_like(seed=1)
    assert (twin.threshold, twin.normalize) == (0.05, "layer_norm")
    assert torch.equal(twin.b_dec, made.b_dec)
    assert not torch.equal(twin.W_dec, made.W_dec)
    assert twin.encode(ActivationBatches([store], 20, 0)(0)).values.shape[0] == 20
