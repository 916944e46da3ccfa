"""One training loop for every stage that trains: Lightning, our checkpoints, our progress."""

from __future__ import annotations

import logging
import math
import random
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.nn.utils import clip_grad_norm_

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch
from steerlora.distributed import ranks, strategies
from steerlora.distributed.devices import peak_flops
from steerlora.distributed.reductions import mean_over_ranks, world
from steerlora.distributed.zero import ZeroStrategy
from steerlora.engine import preemption
from steerlora.engine.progress import Progress
from steerlora.errors import UserError
from steerlora.training.checkpoints import Files, agreed, finite, place
from steerlora.training.execution import LayerExecution

LOG_EVERY = 10  # steps

for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class StepBatches:
    """Batches as a function of the step alone: a resumed run sees what an unbroken one would.

    Parts are cut from the whole batch, so the order of the data has nothing to do with the number
    of ranks.

    Attributes:
        batch: the batch of a step, from 0; with several parts, ``batch.part(step, index, parts)``
            is one of them.
        total: steps.
        start: the step to begin at, asked for when iteration begins.
        accumulate: parts that a rank takes one after the other.
    """

    batch: Callable[[int], Any]
    total: int
    start: Callable[[], int]
    accumulate: int = 1

    def __iter__(self) -> Iterator[Any]:
        first, parts = ranks.current().rank * self.accumulate, world() * self.accumulate
        for step in range(self.start(), self.total):
            for index in range(first, first + self.accumulate):
                yield self.batch(step) if parts == 1 else self.batch.part(step, index, parts)


def rise_hold_fall(step: int, total: int, rise: int, fall: int) -> float:
    """Factor of the learning rate: up over ``rise`` steps, flat, to zero over ``fall``."""
    return max(0.0, min(1.0, (step + 1) / max(1, rise), (total - step) / max(1, fall)))


def begins_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a batch is the first part of its step: what happens once a step happens then."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer has stepped after this batch, the last part of its step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Watch(Callback):
    """Progress, throughput and memory of a training, and a stop where its loss is not finite.

    Tokens are counted over all ranks; a batch that is no text has one a row. The module may say by
    ``flops_per_token(batch)`` how many floating-point operations a token of a batch takes.
    """

    def __init__(self, progress: Progress, description: str, total: int, precision: str) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.precision = precision
        self.tokens, self.seconds, self.loss = 0, 0.0, 0.0
        self.seen = 0  # tokens of all attempts, of which ``tokens`` are this one's
        self._parts: list[torch.Tensor] = []
        self._flops: list[float] = []  # a token, of the steps looked at

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._context = self.progress.task(self.description, self.total, done=trainer.global_step)
        self._task = self._context.__enter__()
        self._began = time.monotonic()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = outputs["loss"].detach()
        if trainer.strategy.handles_gradient_accumulation:
            loss = loss / trainer.accumulate_grad_batches
        self._parts.append(loss)
        if not ends_step(trainer, batch_idx):
            return
        loss, self._parts = mean_over_ranks(torch.stack(self._parts).sum()), []
        at_a_log = trainer.global_step % LOG_EVERY == 0
        # On an accelerator, reading every loss would have every step wait for it.
        if module.device.type == "cpu" or at_a_log:
            self.loss = float(loss)
        if not math.isfinite(self.loss):
            raise UserError(
                f"{self.description}: the loss is {self.loss} at step {trainer.global_step}; the "
                "last good checkpoint is kept: lower the learning rate, then run again"
            )
        is_text = isinstance(batch, ChatBatch)
        tokens = (batch.whole_tokens or batch.tokens) if is_text else len(batch) * world()
        self.tokens += tokens
        self.seen += tokens
        self.seconds = time.monotonic() - self._began
        self._task.advance(tokens=tokens, note=f"loss {self.loss:.3f}")
        if at_a_log or not self._flops:
            self._flops.append(getattr(module, "flops_per_token", lambda batch: 0.0)(batch))
        if at_a_log:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            counts = {"train/learning_rate": rate, "train/tokens": float(self.seen)}
            module.log_dict({**counts, **self.figures(module.device)})

    def figures(self, device: torch.device) -> dict[str, float]:
        """Tokens a second so far over all ranks, this rank's peak memory in bytes, and, where the
        module's operations are known, their share of what the devices could do (MFU)."""
        peak = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        rate = self.tokens / max(self.seconds, 1e-9)
        figures = {"throughput/tokens_per_second": rate, "memory/peak_bytes": float(peak)}
        if any(self._flops):
            flops = sum(self._flops) / len(self._flops)
            possible = world() * peak_flops(device, self.precision)
            figures["throughput/mfu"] = rate * flops / possible
        return figures

    def on_train_end(self, trainer, module) -> None:
        self._context.__exit__(None, None, None)

    def on_exception(self, trainer, module, exception) -> None:
        if hasattr(self, "_context"):
            try:
                self._context.__exit__(type(exception), exception, None)
            except BaseException as raised:
                if raised is not exception:
                    raise


class Gradients(Callback):
    """Clips the norm of the gradients, and logs what it was before.

    Of a module with ``clips_groups``, the groups of its optimizer are clipped one by one. DeepSpeed
    clips by itself: there the norm is only asked for.

    Args:
        largest: norm that gradients are scaled down to.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self.norm: torch.Tensor | float = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # A fused optimizer offers to unscale float16 gradients in its step, after any clipping.
        for optimizer in trainer.optimizers:
            optimizer._step_supports_amp_scaling = False

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if not isinstance(trainer.strategy, ZeroStrategy):
            groups = [group["params"] for group in optimizer.param_groups]
            if not getattr(module, "clips_groups", False):
                groups = [list(chain.from_iterable(groups))]
            norms = [clip_grad_norm_(group, self.largest) for group in groups]
            self.norm = torch.stack(norms).norm()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if ends_step(trainer, batch_idx) and trainer.global_step % LOG_EVERY == 0:
            if isinstance(trainer.strategy, ZeroStrategy):
                self.norm = trainer.strategy.gradient_norm
            module.log("train/gradient_norm", float(self.norm))


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators.

    ``torch.manual_seed`` does the same on a machine without a GPU, and there keeps a stack trace of
    every call for a CUDA that never starts: milliseconds of a small model's step.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Randomness(Callback):
    """Seeds every step's random numbers by the step and the rank, so that a resumed run draws what
    an unbroken one would."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if begins_step(trainer, batch_idx):
            step, rank = trainer.global_step, ranks.current().rank
            seed_all(step * 1_000_003 % 2**31 + rank)


class Checkpoints(Callback):
    """A checkpoint every so many seconds, and where a signal asks this process, or another rank's,
    to make room.

    Weights that are not finite are not kept: a finite loss can have a gradient that is not. Nor is
    the last step, nor the one at which it stops early: what follows a training happens inside it,
    and a resumed one has to get there.

    Args:
        directory: where they lie.
        seconds: between two of them.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory, self.seconds = directory, seconds
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        last = trainer.global_step >= trainer.max_steps or trainer.should_stop
        if last or not ends_step(trainer, batch_idx):
            return
        due = time.monotonic() - self._saved >= self.seconds
        number, due = _largest(preemption.requested(), due)
        if not (number or due) or not _everywhere(finite(module)):
            return
        trainer.save_checkpoint(place(self.directory, trainer.global_step))
        self._saved = time.monotonic()
        if number:
            where = f"saved at step {trainer.global_step} of {trainer.max_steps}"
            preemption.stop(number, where)


def _largest(*values: int) -> tuple[int, ...]:
    """Each value (below 256), as the rank has it where it is largest."""
    if world() == 1:
        return values
    asked = torch.tensor(values, dtype=torch.uint8)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return tuple(asked.tolist())


def _everywhere(flag: bool) -> bool:
    return not _largest(not flag)[0]


def fit(
    module: L.LightningModule,
    batch: Callable[[int], Any],
    steps: int,
    *,
    trainer: TrainerConfig,
    checkpoints: Path,
    progress: Progress,
    description: str,
    identity: str = "",
    run_logger: Any = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Train ``module`` for ``steps`` steps, from the newest good checkpoint if there is one.

    With several ranks every one of them calls this; at the end each has the whole trained weights.

    Args:
        module: what trains.
        batch: the batch of a step; a pure function of the step.
        steps: optimizer steps in all.
        trainer: hardware, precision, clipping, time between checkpoints.
        checkpoints: folder of this training's own checkpoints.
        progress, description: where and under which name to report.
        identity: of what trains; checkpoints of another are refused.
        run_logger: a Lightning logger, or None.
        callbacks: what else happens during the training; their state is in its checkpoints.

    Returns:
        tokens, seconds, tokens_per_second, peak memory and, where it is known, model FLOPs
        utilisation of this attempt.

    Raises:
        UserError: the loss is not finite, the ranks cannot share the batch, or the checkpoint is
            another training's.
        KeyboardInterrupt: the user's, who wanted to stop at once; the training resumes from its
            last checkpoint.
        Preempted: a signal asked for room, or Ctrl-C came, and the training has saved.
    """
    strategies.check_hardware(trainer)
    watch = Watch(progress, description, steps, trainer.precision)
    zero = trainer.strategy.startswith("zero")
    with warnings.catch_warnings(), preemption.training(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        engine = strategies.engine(
            trainer,
            max_steps=steps,
            accumulate_grad_batches=trainer.accumulate,
            gradient_clip_val=trainer.gradient_clip if zero else None,
            logger=run_logger or False,
            log_every_n_steps=LOG_EVERY,
            callbacks=[
                Randomness(),
                watch,
                Gradients(trainer.gradient_clip),
                LayerExecution(recompute=trainer.activation_checkpointing, compile=trainer.compile),
                *callbacks,
                Checkpoints(checkpoints, trainer.checkpoint_seconds),
            ],
            plugins=[Files(identity)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        batches = StepBatches(batch, steps, lambda: engine.global_step, trainer.accumulate)
        resume = agreed(checkpoints, identity)
        if resume is not None:
            progress.message(f"{description}: resuming from {resume.name}")
        try:
            engine.fit(module, batches, ckpt_path=resume, weights_only=True)
        except SystemExit as error:
            # Lightning turns the user's interrupt into an exit of its own.
            raise KeyboardInterrupt from error
    figures = watch.figures(module.device)
    return {
        "tokens": watch.tokens,
        "seconds": watch.seconds,
        "tokens_per_second": figures["throughput/tokens_per_second"],
        "peak_memory_bytes": figures["memory/peak_bytes"],
        **({"mfu": figures["throughput/mfu"]} if "throughput/mfu" in figures else {}),
    }
