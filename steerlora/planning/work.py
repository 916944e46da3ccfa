"""The trainings that a configuration asks for: tokens, arithmetic, time, and what they store."""

from __future__ import annotations

from typing import NamedTuple

from steerlora.config import Config
from steerlora.data.orders import sequence_of
from steerlora.distributed.devices import Gpu, rate
from steerlora.lm import flops
from steerlora.lm.shapes import DecoderShape
from steerlora.planning.trials import Trials, rows_at_once

HARVEST, SAE, ADAPTER = "activation harvest", "SAE training", "adapter training"
END_TO_END = "SAE training end to end"
"""Names of work whose memory is planned."""


ROWS_COUNTED = 2
"""Rows whose arithmetic is counted where a token's is the same however many there are."""


class Work(NamedTuple):
    """One training, or the harvest of its activations.

    Attributes:
        name: what it is.
        tokens: that go through it, all in all.
        model: model FLOPs a token, in the precision of the trainer.
        again: FLOPs a token that are recomputed.
        single: FLOPs a token in float32 whatever the trainer's precision: of SAEs.
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


def trained_sites(config: Config) -> tuple[int, ...]:
    """Streams whose SAEs are trained here to reconstruct: those of the control sites, where the
    method reads features and none are given, and the one at which it is compared with the base.
    None where they are trained end to end from the start."""
    method, end_to_end = config.method, config.sae.end_to_end
    if end_to_end.steps and end_to_end.start == "new":
        return ()
    own = method.streams if method.reads_features and config.sae.path is None else ()
    return tuple(dict.fromkeys([*own, *([method.monitor] if method.compares_with_base else [])]))


def end_to_end_sites(config: Config) -> tuple[int, ...]:
    """Streams whose SAEs are trained, or trained further, in the place of the stream."""
    if not config.sae.end_to_end.steps:
        return ()
    method = config.method
    own = [*method.streams] * method.reads_features
    return tuple(dict.fromkeys([*own, *[method.monitor] * method.compares_with_base]))


def harvested_sites(config: Config) -> tuple[int, ...]:
    """Sites whose activations are stored, or streamed: none where no SAE is to be trained on
    them."""
    if not trained_sites(config):
        return ()
    method = config.method
    sites = [*method.streams, *([] if method.monitor is None else [method.monitor])]
    return tuple(sorted({stream for site in sites for stream in config.sae.streams(site)}))


def works(config: Config, shape: DecoderShape, trials: Trials) -> tuple[Work, ...]:
    """Everything that trains under this configuration, in the order in which it is done."""
    trainer, sae, row = config.trainer, config.sae, row_tokens(config)
    found = []
    if config.model.path is None:
        found.append(
            Work(
                "base pretraining",
                config.model.steps * config.model.batch_size * row,
                flops.pretraining_flops_per_token(shape, row),
            )
        )
    if sites := harvested_sites(config):
        each = flops.harvesting_flops_per_token(shape, max(sites), row)
        streamed = sae.steps_over(0) * sae.batch_size  # once for all sites
        found.append(Work(HARVEST, streamed if sae.stream else sae.tokens_to_harvest, each))
    if sites := trained_sites(config):
        step = trials.sae_step(sae.batch_size)
        # Where it is not known how many latents are active: as if all were.
        each = trials.new_sae().training_flops_per_token() or step.single / sae.batch_size
        tokens = len(sites) * sae.steps_over(sae.tokens_to_harvest) * sae.batch_size
        found.append(Work(SAE, tokens, 0, 0, each))
    if sites := end_to_end_sites(config):
        own, steps = sae.end_to_end, [trials.end_to_end_step(s, ROWS_COUNTED) for s in sites]
        counted = len(sites) * ROWS_COUNTED * config.trainer.max_length
        half = sum(step.half for step in steps) / counted
        single = sum(step.single for step in steps) / counted
        tokens = len(sites) * own.steps * own.batch_size * row
        found.append(Work(END_TO_END, tokens, half, 0, single))
    one = method_work(config, trials)
    domains = sequence_of(config.order, config.domains)
    sequence = len(domains) * config.order.steps_per_domain
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


def method_work(config: Config, trials: Trials) -> Work:
    """The method's training on one token, of rows of the greatest length."""
    found, tokens = trials.step(config), rows_at_once(config) * config.trainer.max_length
    half, single, again = (count / tokens for count in (found.half, found.single, found.again))
    return Work(ADAPTER, 1, half - again, again, single)
