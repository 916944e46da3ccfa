"""One training loop for every stage that trains: Lightning, our checkpoints, our progress."""

from __future__ import annotations

import logging
import math
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from steerlora.config import TrainerConfig
from steerlora.errors import UserError
from steerlora.progress import Progress

KEPT_CHECKPOINTS = 2

logger = logging.getLogger(__name__)
for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class StepBatches:
    """Batches as a function of the step alone: a resumed run sees what an unbroken one would.

    Attributes:
        batch: the batch of a step, from 0.
        total: steps.
        start: the step to begin at, asked for when iteration begins.
    """

    batch: Callable[[int], Any]
    total: int
    start: Callable[[], int]

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.start(), self.total):
            yield self.batch(step)


def rise_hold_fall(step: int, total: int, rise: int, fall: int) -> float:
    """Factor of the learning rate: up over ``rise`` steps, flat, to zero over ``fall``."""
    return max(0.0, min(1.0, (step + 1) / max(1, rise), (total - step) / max(1, fall)))


class Watch(Callback):
    """Progress, throughput and memory of a training, and a stop where its loss is not finite.

    A batch says how many tokens it holds by ``tokens``, or by its length.
    """

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.tokens, self.seconds, self.loss = 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._context = self.progress.task(self.description, self.total, done=trainer.global_step)
        self._task = self._context.__enter__()
        self._began = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        at_a_log = trainer.global_step % trainer.log_every_n_steps == 0
        # On an accelerator, reading every loss would have every step wait for it.
        loss = float(outputs["loss"]) if module.device.type == "cpu" or at_a_log else self.loss
        self.loss = loss
        if not math.isfinite(loss):
            raise UserError(
                f"{self.description}: the loss is {loss} at step {trainer.global_step}; the last "
                "good checkpoint is kept: lower the learning rate, then run again"
            )
        tokens = getattr(batch, "tokens", None) or len(batch)
        self.tokens += tokens
        self.seconds = time.monotonic() - self._began
        self._task.advance(tokens=tokens, note=f"loss {loss:.3f}")
        if at_a_log:
            module.log_dict(self.figures(module.device))

    def figures(self, device: torch.device) -> dict[str, float]:
        """Tokens a second so far, and peak memory in bytes."""
        peak = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return {
            "throughput/tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "memory/peak_bytes": float(peak),
        }

    def on_train_end(self, trainer, module) -> None:
        self._context.__exit__(None, None, None)

    def on_exception(self, trainer, module, exception) -> None:
        if hasattr(self, "_context"):
            try:
                self._context.__exit__(type(exception), exception, None)
            except BaseException as raised:
                if raised is not exception:
                    raise


class ClipUnscaled(Callback):
    """Let gradients be clipped under mixed precision, fused optimizers included.

    Such an optimizer offers to unscale gradients inside its step, and Lightning then refuses to
    clip them. Declining the offer has them unscaled before (bfloat16 has nothing to unscale).
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer._step_supports_amp_scaling = False


class Checkpoints(Callback):
    """A checkpoint every so many seconds, written aside and renamed; the newest two are kept.

    Weights that are not finite are not kept: a finite loss can have a gradient that is not.
    """

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory, self.seconds = directory, seconds
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if time.monotonic() - self._saved < self.seconds:
            return
        self._saved = time.monotonic()
        if not all(p.isfinite().all() for p in module.parameters() if p.requires_grad):
            return  # the next step's loss will say so
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        unfinished = final.with_suffix(".tmp")
        trainer.save_checkpoint(unfinished)
        unfinished.replace(final)
        for old in sorted(self.directory.glob("step-*.ckpt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that can be read; broken ones are passed over with a warning."""
    for path in sorted(directory.glob("step-*.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            logger.warning("checkpoint %s cannot be read (%s): passed over", path, error)
        else:
            return path
    return None


def fit(
    module: L.LightningModule,
    batch: Callable[[int], Any],
    steps: int,
    *,
    trainer: TrainerConfig,
    checkpoints: Path,
    progress: Progress,
    description: str,
    run_logger: Any = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Train ``module`` for ``steps`` steps, from the newest good checkpoint if there is one.

    Args:
        module: what trains.
        batch: the batch of a step; a pure function of the step.
        steps: optimizer steps in all.
        trainer: hardware, precision, clipping, time between checkpoints.
        checkpoints: folder of this training's own checkpoints.
        progress, description: where and under which name to report.
        run_logger: a Lightning logger, or None.
        callbacks: what else happens during the training; their state is in its checkpoints.

    Returns:
        tokens, seconds, tokens_per_second and peak memory of this attempt.

    Raises:
        UserError: the loss is not finite.
        KeyboardInterrupt: the user's; the training resumes from its last checkpoint.
    """
    watch = Watch(progress, description, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine = L.Trainer(
                max_steps=steps,
                accelerator=trainer.accelerator,
                devices=1,
                precision=trainer.precision,
                gradient_clip_val=trainer.gradient_clip,
                logger=run_logger or False,
                log_every_n_steps=10,
                callbacks=[
                    watch,
                    ClipUnscaled(),
                    *callbacks,
                    Checkpoints(checkpoints, trainer.checkpoint_seconds),
                ],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
        except MisconfigurationException as error:
            raise UserError(
                f"trainer.accelerator={trainer.accelerator}: {str(error).splitlines()[0]}; "
                "trainer=cpu runs anywhere"
            ) from error
        batches = StepBatches(batch, steps, lambda: engine.global_step)
        resume = newest_checkpoint(checkpoints)
        if resume is not None:
            progress.message(f"{description}: resuming from {resume.stem}")
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
    }
