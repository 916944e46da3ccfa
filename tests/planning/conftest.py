"""What trainings at small shapes really take: the storages that are alive, operation by operation.

Allocations inside one kernel are not seen. All of it is on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from steerlora.stages.adapting import PROBE_ROWS, shape_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3ForCausalLM

from steerlora.config import Config
from steerlora.data.activations import harvest
from steerlora.data.chat import ChatBatch
from steerlora.engine.progress import SilentProgress
from steerlora.lm.pretrained import qwen3_config
from steerlora.lm.shapes import model_shape
from steerlora.methods.module import AdapterModule
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.watch import RoutingWatch
from steerlora.saes.taxonomy import Taxonomy
from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule
from steerlora.training.loop import fit

STEPS = 2  # the second has the optimizer's moments from its beginning


class LiveMemory(TorchDispatchMode):
    """Bytes of every storage that was there before (``known``) or is made inside this context.

    Attributes: now: bytes alive; peak: the most there have been.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._note(known)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self._note(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def _note(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size


class Measured(NamedTuple):
    """Bytes of a training.

    Attributes:
        peak: the most.
        weights: before the first step: of the base, what trains, SAEs and prototypes.
        kept: what the last step's backward found, besides the weights and the optimizer.
        optimizer: its moments.
    """

    peak: int
    weights: int
    kept: int
    optimizer: int


class AtBackward(Callback):
    """How much there is when a backward begins: the last step's."""

    def __init__(self, live: LiveMemory) -> None:
        self.live, self.found = live, 0

    def on_before_backward(self, trainer, module, loss) -> None:
        self.found = self.live.now


@pytest.fixture
def measured_adapter_training(tmp_path: Path) -> Callable[[Config], Measured]:
    """Two steps of the configured training, every tensor followed."""

    def measure(config: Config) -> Measured:
        module = built(config)
        sources = [*module.adapter.saes.values(), *filter(None, [module.monitor])]
        known = [*module.parameters(), *module.buffers()]
        known += [p for source in sources for p in getattr(source, "sae", source).parameters()]
        with LiveMemory(known) as live:
            weights, at_backward = live.now, AtBackward(live)
            train(module, config, tmp_path, at_backward)
        moments = 2 * sum(p.nbytes for p in module.adapter.parameters() if p.requires_grad)
        return Measured(live.peak, weights, at_backward.found - weights - moments, moments)

    return measure


def train(module: AdapterModule, config: Config, directory: Path, *callbacks: Callback) -> None:
    """Two steps on random text, and the probe of routing after each."""
    batch = _batch(config, config.trainer.batch_size, config.plan.labelled)
    probe = _batch(config, PROBE_ROWS * len(config.domains.names), 1.0)
    watch = RoutingWatch(module.adapter, config.domains.names, probe, 1, "ignore", 0.0)
    fit(
        module,
        _Same(batch),
        STEPS,
        trainer=config.trainer,
        checkpoints=directory / "checkpoints",
        progress=SilentProgress(),
        description="",
        callbacks=[watch, *callbacks],
    )


class _Same:
    """One batch for every step, in parts where there are several."""

    def __init__(self, batch: ChatBatch) -> None:
        self.batch = batch

    def __call__(self, step: int) -> ChatBatch:
        return self.batch

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        return self.batch.part(index, parts)


def built(config: Config) -> AdapterModule:
    """A random model in the type it computes in, with the configured adapter attached."""
    shape, latents, k = model_shape(config.model), config.sae.latents, config.sae.k
    model = Qwen3ForCausalLM(qwen3_config(shape, max_position_embeddings=4096))
    model.train().to(torch.bfloat16 if "bf16" in config.trainer.precision else torch.float32)
    saes = {site: TopK(shape.width, latents, k=k) for site in config.method.sites}
    adapter = Adapter(model, shape_of(config.adapter, config.control), saes).attach(model)
    if config.adapter.router == "prototype":
        for router in adapter.routers.values():
            for specialist in range(config.adapter.specialists):
                router.meet(specialist, torch.rand(8, router.prototypes.shape[1]))
    monitor = None
    if config.adapter.monitored:
        own = torch.rand(1, latents)
        taxonomy = Taxonomy(own[0] < 0.5, own > 0.5, own, own, own[0])
        sae = TopK(shape.width, latents, k=k)
        monitor = Monitor(model, adapter, sae, config.method.monitor, taxonomy)
    return AdapterModule(
        model,
        adapter,
        config=config.adapter,
        trainer=config.trainer,
        total_steps=STEPS,
        monitor=monitor,
    )


def _batch(config: Config, rows: int, labelled: float) -> ChatBatch:
    """Rows of nearly equal length: one has a padded end."""
    length = config.trainer.max_length
    ids = torch.randint(1, config.model.vocabulary, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels = ids.clone()
    labels[:, : round(length * (1 - labelled))] = -100
    return ChatBatch(ids, mask, labels, torch.zeros(rows, dtype=torch.long), int(mask.sum()))


@pytest.fixture
def measured_sae_training(tmp_path: Path) -> Callable[[Config], Measured]:
    """Two steps of an SAE's training on random activations."""

    def measure(config: Config) -> Measured:
        sae = TopK(config.model.width, config.sae.latents, k=config.sae.k)
        module = SAEModule(sae, total_steps=STEPS)
        batch = torch.randn(config.sae.batch_size, config.model.width)
        with LiveMemory([*module.parameters(), batch]) as live:
            fit(
                module,
                lambda step: batch,
                STEPS,
                trainer=config.trainer,
                checkpoints=tmp_path / "checkpoints",
                progress=SilentProgress(),
                description="",
            )
        weights = sum(p.nbytes for p in module.parameters())
        return Measured(live.peak, weights, 0, 2 * weights)

    return measure


@pytest.fixture
def measured_harvest(tmp_path: Path) -> Callable[..., int]:
    """``measured_harvest(config, sites, rows)``: the peak of two batches, in bytes."""

    def measure(config: Config, sites: tuple[int, ...], rows: int) -> int:
        module = built(config)
        module.adapter.remove()
        model = module.model
        batch = _batch(config, rows, 1.0)
        with LiveMemory(model.parameters()) as live:
            harvest(model, [(batch.input_ids, batch.attention_mask)] * 2, sites, tmp_path)
        return live.peak

    return measure
