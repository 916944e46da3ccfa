"""Peak memory of one device, part by part, of each training that a configuration asks for.

A step has a few moments at which memory can be highest; the plan is of the highest one, and says
which it is. Bytes throughout.

T tokens of a part of the batch, D model width, N latents, K active latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from steerlora.config import Config
from steerlora.lm.shapes import DecoderShape
from steerlora.planning import activations
from steerlora.planning.activations import FLOAT, INDEX, Part
from steerlora.planning.parameters import (
    adapter_parameters,
    adapter_sizes,
    base_parameters,
    base_sizes,
    sae_parameters,
)
from steerlora.planning.sharding import Held, held, precision

SCORES_ON_ACCELERATOR, SCORES_ON_CPU = 2**27, 2**21
"""Entries of an SAE's pre-activations that are held at once (``saes/sparse.py``)."""
BASE = "weights of the base"
HARVESTED_ROWS, PROBED_ROWS = 64, 16
"""Rows of a harvest's batch (stage ``activations``), and rows a domain on which the health of
routing is measured at once (``stages/adapting.py``)."""


@dataclass(frozen=True)
class Memory:
    """Attributes: parts: {what it is for: bytes} at the peak; moment: when that is; host: bytes
    that are offloaded to the CPU's memory."""

    parts: Mapping[str, float]
    moment: str
    host: float = 0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())


def adapter_training(
    config: Config, shape: DecoderShape, part: Part, ranks: int = 1, *, scores: int
) -> Memory:
    """Of a step of adapter training on one rank.

    Args:
        part: what goes through the model at once.
        ranks: over which the strategy shares.
        scores: entries of pre-activations held at once, on this kind of device.
    """
    adapter, control, k = config.adapter, config.control, config.sae.k
    latents, layers = config.sae.latents, shape.layers - min(control.sites)
    on_rank = held(
        config.trainer, ranks, base_sizes(shape), adapter_sizes(shape, adapter, control, latents)
    )
    saes = len(control.sites) * (adapter.routing == "sae") + adapter.monitored
    watching = FLOAT * saes * sae_parameters(shape.width, latents)
    watching += activations.prototype_buffer_bytes(shape, adapter, control, latents)
    fixed = _fixed(on_rank) | {"SAEs and prototypes": watching}

    kept = _kept(config, shape, part)
    # What the layers between the first site and the last have kept by then.
    before = kept * (max(control.sites) - min(control.sites)) / layers
    logits, forward = activations.loss_bytes(shape, part), activations.forward_bytes(shape, part)
    backward = activations.backward_bytes(shape, part)
    if config.trainer.activation_checkpointing:  # one layer's activations are there again
        backward += part.tokens * activations.layer_bytes(shape, adapter, part)
    extra = {
        "at a control site": {
            "activations": before,
            "working space": _reading(config, shape, part, scores),
        },
        "in a layer's forward": {"working space": forward},
        "at the loss": {"activations": kept, "logits": logits},
        "in the backward": {"activations": kept, "working space": backward},
        "in the optimizer's step": {"working space": on_rank.stepping},
    }
    if adapter.routing != "none":
        probe = part._replace(rows=PROBED_ROWS * len(config.domains.names))
        routed = activations.site_bytes(shape, adapter, control, k, probe)
        extra["in the probe of routing"] = {
            "activations": probe.tokens * routed,
            "working space": max(
                activations.forward_bytes(shape, probe), _reading(config, shape, probe, scores)
            ),
        }
    if adapter.monitored:
        extra["at the monitor site"] = {
            "activations": kept,
            "logits": logits / 3,
            "working space": max(
                forward, encoder_bytes(shape.width, latents, k, part.tokens, scores)
            ),
        }
    return _highest(fixed, extra, on_rank.host)


def _kept(config: Config, shape: DecoderShape, part: Part) -> float:
    """What a whole forward keeps for its backward."""
    adapter, control, latents = config.adapter, config.control, config.sae.latents
    layers = shape.layers - min(control.sites)
    each = activations.site_bytes(shape, adapter, control, config.sae.k, part)
    each += activations.monitor_bytes(shape, adapter, config.sae.k, part)
    if config.trainer.activation_checkpointing:
        each += layers * part.element * shape.width + FLOAT * shape.width  # and the final norm
        copies = 1 / layers
    else:
        # The final norm keeps what the first adapted one, over frozen layers, does not.
        each += layers * activations.layer_bytes(shape, adapter, part)
        copies = 1.0
    parameters = adapter_parameters(shape, adapter, control, latents)
    weights = activations.weight_bytes(adapter, parameters, part, copies)
    return part.tokens * each + weights


def _reading(config: Config, shape: DecoderShape, part: Part, scores: int) -> float:
    """Working space of a control site: the stream, encoded, or a dense signal pooled."""
    adapter, latents = config.adapter, config.sae.latents
    stream = part.tokens * shape.width
    reading = stream * (part.element + FLOAT * (part.element < FLOAT))
    if adapter.routing == "sae":
        reading += encoder_bytes(shape.width, latents, config.sae.k, part.tokens, scores)
    pooled = activations.pooled_bytes(shape, adapter, latents, part)
    return max(reading, activations.POOLED_COPIES * pooled)


def sae_training(config: Config, width: int, ranks: int = 1, *, scores: int) -> Memory:
    """Of a step of one SAE's training on one rank; all of it is float32.

    Args:
        width: D.
        ranks, scores: as for :func:`adapter_training`.
    """
    sae = config.sae
    tokens = math.ceil(sae.batch_size / ranks)
    table = width * sae.latents
    trainer = replace(config.trainer, precision="32-true")
    on_rank = held(trainer, ranks, {}, {table: 2, sae.latents: 1, width: 1})
    rows = FLOAT * tokens * width
    # Active entries sorted by latent: two numbers that sort, and four that index and weigh.
    sorted_entries = tokens * sae.k * (2 * FLOAT + 4 * INDEX)
    extra = {
        "at the encoder": {
            "activations": rows,
            "working space": encoder_bytes(width, sae.latents, sae.k, tokens, scores),
        },
        "in the backward": {
            "activations": 2 * rows + _features(tokens, sae.k),
            "working space": max(3 * rows, rows + sorted_entries),
        },
        "in the optimizer's step": {"working space": on_rank.stepping},
    }
    return _highest(_fixed(on_rank), extra, on_rank.host)


def harvesting(config: Config, shape: DecoderShape, sites: int, gpus: int = 1) -> Memory:
    """Of a forward of the frozen base that stores the streams of so many sites, in one process; its
    layers lie on all GPUs with ``evaluation.spread``, else on one."""
    element = precision(config.trainer).compute
    part = Part(HARVESTED_ROWS, config.trainer.max_length, element=element)
    # A batch's streams, and those of the batch before it as they came and without padding.
    streams = 3 * part.tokens * shape.width * element * sites
    forward = activations.forward_bytes(shape, part)
    extra = {"in a layer's forward": {"activations": streams, "working space": forward}}
    weights = element * base_parameters(shape).total
    return _highest({BASE: weights / (gpus if config.evaluation.spread else 1)}, extra)


def encoder_bytes(width: int, latents: int, k: int, tokens: int, scores: int) -> float:
    """Working space of ``SparseAutoencoder.encode`` besides its input: a block's pre-activations,
    and the tokens that they come from or the candidates for the k largest; the features."""
    block = min(tokens, max(128, scores // latents))
    group = 2 ** round(math.log2(max(1.0, latents / k)) / 2)
    candidates = latents / group + group * k
    return FLOAT * block * (latents + max(width, candidates)) + _features(tokens, k)


def _features(tokens: int, k: int) -> int:
    """Values and indices of active latents."""
    return tokens * k * (FLOAT + INDEX)


def _fixed(on_rank: Held) -> dict[str, float]:
    """What a rank holds whatever the batch, by the names of the report."""
    return {
        BASE: on_rank.weights,
        "weights of what trains": on_rank.adapter,
        "gradients": on_rank.gradients,
        "optimizer": on_rank.optimizer,
        "buckets and gathered weights": on_rank.buffers,
    }


def _highest(
    fixed: Mapping[str, float], extra: Mapping[str, Mapping[str, float]], host: float = 0
) -> Memory:
    """The moment of most memory."""
    moment = max(extra, key=lambda name: sum(extra[name].values()))
    return Memory({**fixed, **extra[moment]}, moment, host)
