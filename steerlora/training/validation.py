"""The loss on conversations that are not trained on, in the course of a training: followed, and,
where that is asked for, the ground on which the best weights are kept and the training ends early.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from steerlora.config.trainer import ValidationConfig
from steerlora.data.batches import IGNORED, ChatBatch, evenly_spaced
from steerlora.data.chat import EncodedChat
from steerlora.distributed import ranks
from steerlora.distributed.reductions import sum_over_ranks, world
from steerlora.errors import UserError
from steerlora.training.loop import ends_step

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """The conversations of a domain."""

    training: list[EncodedChat]
    """That are trained on."""
    validation: list[EncodedChat]
    """That the loss is measured on; none of them is among the others."""


def split(name: str, rows: Sequence[EncodedChat], count: int) -> Split:
    """Set some of a domain's conversations aside, evenly spaced over those that differ.

    Args:
        name: of the domain.
        rows: its conversations.
        count: how many to set aside.

    Raises:
        UserError: that is more than half of them.
    """
    different = list({tuple(row.input_ids): row for row in rows}.values())
    if count > len(different) // 2:
        raise UserError(
            f"trainer.validation.rows={count} is more than half of {name}, which has "
            f"{len(different)} different conversations to train on: set aside at most "
            f"{len(different) // 2}"
        )
    chosen = list(evenly_spaced(different, count)) if count else []
    return Split(without(rows, chosen), chosen)


def without(rows: Iterable[EncodedChat], aside: Iterable[EncodedChat]) -> list[EncodedChat]:
    """The conversations that none of those set aside is the same as, word for word."""
    taken = {tuple(row.input_ids) for row in aside}
    return [row for row in rows if tuple(row.input_ids) not in taken]


class Validation(Callback):
    """Measures the loss before the first step, every so many steps and after the last.

    Losses are logged as ``validation/loss``, the mean over all tokens of answers, and
    ``validation/loss/<domain>``, in nats a token. Several ranks share the batches. Checkpoints hold
    what was measured and the best weights, so this callback must come before the one that writes
    them, and after those that open an intervention for the training.

    Args:
        batches: {domain: batches of its conversations that are set aside}. Of one, the module's
            ``validation_step`` gives the mean loss over its labelled tokens.
        settings: when to measure, and what to do with it.
        label: of the training, for messages.

    Attributes:
        history: one entry a measurement: ``step``, optimizer steps done, ``loss``, and ``domains``,
            {domain: loss}.
    """

    def __init__(
        self,
        batches: Mapping[str, Sequence[ChatBatch]],
        settings: ValidationConfig,
        label: str,
    ) -> None:
        self.batches, self.settings, self.label = batches, settings, label
        self.history: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}

    @property
    def lowest(self) -> int:
        """Place in ``history`` of the lowest loss, the first of equal ones."""
        return min(range(len(self.history)), key=lambda place: self.history[place]["loss"])

    def figures(self) -> dict[str, float]:
        """The loss before the training and with the weights that it ends with, in nats a token, the
        step that these are of, and how many steps there were."""
        kept = self.history[self.lowest if self.settings.keep_best else -1]
        return {
            "validation_loss_before": self.history[0]["loss"],
            "validation_loss": kept["loss"],
            "validation_step": kept["step"],
            "steps": self.history[-1]["step"],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self._best = list(state["history"]), dict(state["best"])

    # In the course of a training

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if not self.history:
            self._look(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        due = step % self.settings.every_steps == 0 or step == trainer.max_steps
        if not (due and ends_step(trainer, batch_idx)):
            return
        self._look(trainer, module)
        in_vain = len(self.history) - 1 - self.lowest
        if self.settings.patience and in_vain >= self.settings.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if ranks.is_main():
            before, now, step, last = self.figures().values()
            _log.info(
                "%s: validation loss %.4f before, %.4f with the weights of step %d; trained %d of "
                "%d steps",
                *(self.label, before, now, step, last, trainer.max_steps),
            )
        if self._best:
            kept = {name: tensor.to(module.device) for name, tensor in self._best.items()}
            trainer.strategy.load_model_state_dict({"state_dict": kept}, strict=False)

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        losses = self._measure(trainer, module)
        loss = losses.pop("")
        self.history.append({"step": trainer.global_step, "loss": loss, "domains": losses})
        if self.settings.keep_best and self.lowest == len(self.history) - 1:
            self._best = _trained_weights(trainer, module)
        if trainer.logger:  # of its own: the module's log shows every tenth step only
            logged = {f"validation/loss/{name}": value for name, value in losses.items()}
            trainer.logger.log_metrics({"validation/loss": loss, **logged}, trainer.global_step)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """{domain: nats a token}, and under "" that of all; the same on every rank."""
        sums, place = {}, module.device if world() > 1 else "cpu"
        device = [module.device] if module.device.type == "cuda" else []
        with _evaluating(module), torch.random.fork_rng(device):
            for name, batches in self.batches.items():
                nats = tokens = 0.0
                for batch, own in _shared(batches):
                    count = int((batch.labels[:, 1:] != IGNORED).sum()) * own
                    # By the strategy: before the first step, only it gathers sharded weights.
                    loss = trainer.strategy.validation_step(batch.to(module.device), 0)
                    nats += float(loss) * count
                    tokens += count
                sums[name] = torch.tensor([nats, tokens], dtype=torch.float64, device=place)
        whole = dict(zip(sums, sum_over_ranks(sums.values()), strict=True))
        whole[""] = torch.stack(list(whole.values())).sum(0)
        return {name: float(nats / tokens) for name, (nats, tokens) in whole.items()}


def _shared(batches: Sequence[ChatBatch]) -> Iterator[tuple[ChatBatch, bool]]:
    """This rank's batches and whether they count: a sharded model runs on all ranks or on none, so
    where batches run out, one is run again."""
    count, rank = world(), ranks.current().rank if world() > 1 else 0
    for first in range(0, len(batches), count):
        place = first + rank
        yield batches[min(place, len(batches) - 1)], place < len(batches)


def _trained_weights(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
    """What the module's checkpoints hold, whole and on the CPU."""
    checkpoint = {"state_dict": trainer.strategy.lightning_module_state_dict()}
    module.on_save_checkpoint(checkpoint)
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in checkpoint["state_dict"].items()
    }


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, inside."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
