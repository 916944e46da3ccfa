"""What a configuration trains, built from its own classes, and batches of the planned size.

Inside a dry run nothing here has storage.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steerlora.config import Config, InterventionConfig
from steerlora.data.batches import IGNORED, ChatBatch
from steerlora.data.chat import EncodedChat
from steerlora.lm.pretrained import qwen3_config, read_config
from steerlora.lm.shapes import model_shape
from steerlora.methods.base import Learner, SiteSAE, Sources, Task
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.taxonomy import Taxonomy

ROWS = 64
"""Training rows of every domain: as many as go through the model at once beside the steps."""


class Built(NamedTuple):
    """A method on its base, and its training.

    Attributes:
        module: what trains.
        learner: how.
        task: on all domains together.
    """

    module: L.LightningModule
    learner: Learner
    task: Task


def base_model(config: Config, dtype: torch.dtype) -> nn.Module:
    """The base, in the type in which it computes."""
    model = AutoModelForCausalLM.from_config(_decoder(config), dtype=dtype)
    model.tie_weights()  # which is left out where weights are not initialised
    return model.train()


def _decoder(config: Config) -> PretrainedConfig:
    """transformers' configuration: of a folder its own; of a hub id the sizes that are declared, in
    the family that its name has."""
    path = config.model.path or ""
    if path and Path(path).is_dir():
        return read_config(path)
    sizes = qwen3_config(model_shape(config.model)).to_diff_dict()
    sizes.pop("model_type")
    named = path.lower().replace("-", "")
    families = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in named]
    return AutoConfig.for_model(max(families, key=len, default="qwen3"), **sizes)


def build_for_planning(config: Config, model: nn.Module) -> Built:
    """The configured method, attached to its base, and its learner.

    Raises:
        ValueError: the method does not fit the model.
    """
    method, sae = config.method, config.sae
    domains, length = config.domains.names, config.trainer.max_length

    def new_sae() -> SparseAutoencoder:
        return sae.build(model.config.hidden_size)

    def taxonomy() -> Taxonomy:
        of_domains, of_latents = torch.rand(len(domains), sae.latents), torch.rand(sae.latents)
        return Taxonomy(of_latents < 0.5, of_domains > 0.5, of_domains, of_domains, of_latents)

    sources = Sources(
        saes={site: SiteSAE(new_sae()) for site in method.sites if method.reads_features},
        taxonomies={site: taxonomy() for site in method.sites if method.reads_taxonomy},
    )
    attached = method.build(model, sources, config.seed)
    monitor = None
    if method.compares_with_base:
        monitor = Monitor(model, attached, new_sae(), method.monitor, taxonomy())
    rows = [EncodedChat([0] * length, length - 1)] * ROWS
    learner = method.learner(
        attached,
        model=model,
        domains=domains,
        pad_token_id=0,
        seed=config.seed,
        intervention=InterventionConfig(),
        monitor=monitor,
        general_text=lambda most: rows,
    )
    trainer = config.trainer
    module = MethodModule(learner, trainer=trainer, total_steps=trainer.max_steps)
    return Built(module, learner, Task(dict.fromkeys(domains, rows)))


def batch_of(config: Config, rows: int) -> ChatBatch:
    """Rows of the greatest length, all labelled, one of them with a padded end."""
    ids = torch.zeros(rows, config.trainer.max_length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    owners = torch.zeros(rows, dtype=torch.long)
    return ChatBatch(ids, mask, ids.clone(), owners, int(mask.sum()))


def training_batch(config: Config, rows: int) -> ChatBatch:
    """Such rows with the planned share of labels; where they are packed, of two conversations."""
    batch, length = batch_of(config, rows), config.trainer.max_length
    batch.labels[:, : round(length * (1 - config.plan.labelled))] = IGNORED
    if not config.trainer.packing:
        return batch
    positions = torch.arange(length) % max(1, length // 2)
    positions = positions.expand(rows, -1).masked_fill(batch.attention_mask == 0, -1)
    return replace(batch, position_ids=positions)
