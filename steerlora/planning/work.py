"""The trainings that a configuration asks for: tokens, arithmetic, time, and what they store."""

from __future__ import annotations

from typing import NamedTuple

import torch

from steerlora.config import Config
from steerlora.distributed.devices import Gpu, rate
from steerlora.lm import flops
from steerlora.lm.shapes import DecoderShape
from steerlora.planning.activations import FLOAT
from steerlora.planning.parameters import adapter_parameters

HARVEST, SAE, ADAPTER = "activation harvest", "SAE training", "adapter training"
"""Names of work whose memory is planned."""


class Work(NamedTuple):
    """One training, or the harvest of its activations.

    Attributes:
        name: what it is.
        tokens: that go through it, all in all.
        model: model FLOPs a token, in the precision of the trainer.
        again: FLOPs a token that are recomputed.
        single: FLOPs a token of SAEs: float32 whatever the trainer's precision.
    """

    name: str
    tokens: float
    model: float
    again: float = 0
    single: float = 0

    def seconds(self, on: Gpu, gpus: int, precision: str, utilisation: float) -> float:
        """Time on so many GPUs that reach that share of their peak rates; communication, loading
        and evaluation are left out."""
        half = (self.model + self.again) / rate(on, precision)
        return self.tokens * (half + self.single / rate(on, "32-true")) / (gpus * utilisation)


def harvested_sites(config: Config) -> int:
    """Sites whose activations are stored: none where no SAE is to be trained on them."""
    control, monitored = config.control, config.adapter.monitored
    trains = config.adapter.routing == "sae" and config.sae.path is None
    if not trains and not monitored:
        return 0
    return len({*control.sites, *([control.monitor] if control.monitor is not None else [])})


def trained_saes(config: Config) -> int:
    """SAEs that are trained here: one a control site, and the monitor's."""
    control = config.control
    own = config.adapter.routing == "sae" and config.sae.path is None
    apart = config.adapter.monitored and not (own and control.monitor in control.sites)
    return own * len(control.sites) + apart


def activation_bytes(config: Config, shape: DecoderShape) -> float:
    """Disk for stored activations: float32, one vector a token and site."""
    return FLOAT * shape.width * config.sae.max_tokens * harvested_sites(config)


def works(config: Config, shape: DecoderShape) -> tuple[Work, ...]:
    """Everything that trains under this configuration, in the order in which it is done."""
    trainer, sae, control = config.trainer, config.sae, config.control
    row = row_tokens(config)
    found = []
    if config.model.path is None:
        found.append(
            Work(
                "base pretraining",
                config.model.steps * config.model.batch_size * row,
                flops.pretraining_flops_per_token(shape, row),
            )
        )
    if harvested_sites(config):
        highest = max([*control.sites, control.monitor or 0])
        each = flops.harvesting_flops_per_token(shape, highest, row)
        found.append(Work(HARVEST, sae.max_tokens, each))
    if trained_saes(config):
        with torch.device("meta"):
            each = sae.build(shape.width).training_flops_per_token()
        tokens = trained_saes(config) * sae.steps_over(sae.max_tokens) * sae.batch_size
        found.append(Work(SAE, tokens, 0, 0, each))
    one = adapter_work(config, shape, row)
    sequence = len(config.domains.names) * config.order.steps_per_domain
    return (
        *found,
        one._replace(tokens=trainer.max_steps * trainer.batch_size * row),
        one._replace(name="a sequence of domains", tokens=sequence * trainer.batch_size * row),
    )


def row_tokens(config: Config) -> float:
    """Mean of real tokens in a row; packed rows are full."""
    if config.trainer.packing or config.plan.tokens_per_row is None:
        return config.trainer.max_length
    return config.plan.tokens_per_row


def adapter_work(config: Config, shape: DecoderShape, row: float) -> Work:
    """Adapter training on one token of rows of so many."""
    adapter, control, latents = config.adapter, config.control, config.sae.latents
    first = min(control.sites)
    low_rank = adapter_parameters(shape, adapter, control, latents).low_rank

    def per_token(checkpointing: bool) -> float:
        return flops.training_flops_per_token(
            shape,
            adapter_parameters=low_rank,
            first_adapted_layer=first,
            sequence=row,
            labelled=config.plan.labelled,
            checkpointing=checkpointing,
        )

    model = per_token(False)
    again = per_token(config.trainer.activation_checkpointing) - model
    encoders = len(control.sites) * (adapter.routing == "sae") + 2 * adapter.monitored
    if adapter.monitored:  # the base's stream from the first site to the monitor's
        model += flops.harvesting_flops_per_token(shape, control.monitor - first, row)
    if adapter.routing != "none":
        model += flops.harvesting_flops_per_token(shape, _second_forward(config, shape), row)
    return Work(ADAPTER, 1, model, again, 2 * encoders * shape.width * latents)


def _second_forward(config: Config, shape: DecoderShape) -> int:
    """Layers of the separate forward of the frozen base from which sites read, where there is
    one (``control.source``)."""
    control = config.control
    if control.source == "base_last":
        return shape.layers
    return max(control.sites) if control.source == "base" and len(control.sites) > 1 else 0
