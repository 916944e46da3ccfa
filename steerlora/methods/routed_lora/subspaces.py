"""InfLoRA: a domain's LoRA acts in a subspace of its inputs that earlier domains leave free.

D_in and D_out widths of an adapted layer, R rank, T domains, B batch, S sequence.

Liang & Li 2024, InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning (CVPR 2024,
arXiv 2404.00228). The LoRAs of all domains are summed, y = W x + (alpha / r) sum_t B_t A_t x. Of
domain t, A_t is fixed before training and only B_t is trained:

1. H_t = mean x x^T over the domain's training text, of every adapted layer's inputs (with what
   earlier domains have added to the model);
2. with M the memory's orthonormal columns, H_t <- (I - M M^T) H_t;
3. A_t = the leading R left singular vectors of that, as rows, divided by sqrt(3), which gives them
   the length that LoRA's own initialisation has;
4. after training, directions of the inputs join M, the strongest first, until M holds a share of
   their variance that rises from ``kept_first`` to ``kept_last`` over the domains
   (Saha et al. 2021, Gradient Projection Memory, arXiv 2103.09762).

A change of B_t A_t thus leaves outputs on earlier domains' inputs next to alone. The authors keep
either M or its complement, whichever is smaller; here it is M. Their script takes singular values
of H, so shares of squared variance; here a share is one of variance, as in both papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerlora.data.batches import batches_by_length, evenly_spaced
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import decoder_of
from steerlora.methods.base import Task
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import SubspaceLoRAConfig
from steerlora.methods.routed_lora.learning import RoutedLoRALearner

INPUT_ROWS = 256
"""Training rows of a domain whose inputs are seen."""
BATCH_SIZE = 32


@torch.no_grad()
def input_moments(
    model: nn.Module, adapter: Adapter, rows: Sequence[EncodedChat], pad_token_id: int
) -> dict[str, Tensor]:
    """{name of an adapted layer: mean of x x^T over its inputs x, [D_in, D_in], float64}.

    Args:
        model: with ``adapter`` attached.
        rows: text; every token that is no padding counts.
        pad_token_id: fills batches.
    """
    sums: dict[str, Tensor] = {}
    real = torch.ones(0, dtype=torch.bool)

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])[real.to(inputs[0].device)].double()
        sums[name] = sums.get(name, 0) + x.t() @ x

    hooks = [
        layer.register_forward_pre_hook(partial(add, name))
        for name, layer in adapter.adapted().items()
    ]
    tokens = 0
    try:
        for batch in batches_by_length(rows, BATCH_SIZE, pad_token_id):
            batch = batch.to(model.device)
            real = batch.attention_mask.flatten().bool()
            tokens += int(real.sum())
            decoder_of(model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / tokens for name, total in sums.items()}


def free_directions(moment: Tensor, memory: Tensor, rank: int) -> Tensor:
    """A [R, D_in] of a domain: step 3 of the module's text.

    Args:
        moment: H [D_in, D_in].
        memory: M [D_in, directions], orthonormal columns, none at first.
        rank: R, at most D_in.
    """
    left = moment - memory @ (memory.t() @ moment)
    return torch.linalg.svd(left).U[:, :rank].t() / math.sqrt(3)


def remember(moment: Tensor, memory: Tensor, share: float) -> Tensor:
    """M with as many more columns as hold ``share`` of the inputs' variance, [D_in, directions].

    Variance along the columns of M is tr(M^T H M); a new one is a leading eigenvector of what H has
    outside M.

    Args:
        moment: H [D_in, D_in].
        memory: M so far [D_in, directions].
        share: from 0 to 1.
    """
    whole = moment.trace()
    outside = moment - memory @ (memory.t() @ moment)
    outside = outside - (outside @ memory) @ memory.t()
    variances, directions = torch.linalg.eigh(outside)
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    held = 1 - variances.sum() / whole
    after = held + (variances / whole).cumsum(0)
    wanted = 0 if held >= share else int((after < share).sum()) + 1
    room = len(moment) - memory.shape[1]
    return torch.cat([memory, directions[:, : min(wanted, room)]], 1)


@dataclass(kw_only=True)
class SubspaceLearner(RoutedLoRALearner):
    """Trains an `Adapter` whose specialists are summed, as InfLoRA does."""

    directions: dict[str, Tensor] = field(default_factory=dict)
    """{name of an adapted layer: M [D_in, directions]}, float64, on the CPU."""

    @property
    def config(self) -> SubspaceLoRAConfig:
        return self.method.config

    def begin(self, task: Task) -> None:
        """Fix A of the arriving domain; trained together, domains have LoRA's own."""
        super().begin(task)
        if task.position is None:
            return
        own = self.method.config.rows_of(task.position)
        for name, moment in self._moments(task).items():
            memory = self._memory(name, moment)
            A = self.method.layers[name].A
            with torch.no_grad():
                A[own] = free_directions(moment, memory, self.config.rank).to(A)

    @contextmanager
    def _in_training(self, task: Task) -> Iterator[None]:
        """While open, in a sequence, no A changes."""
        layers = self.method.layers.values() if task.position is not None else ()
        with super()._in_training(task):
            hooks = [layer.A.register_hook(torch.zeros_like) for layer in layers]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def end(self, task: Task) -> None:
        """Add to the memory what the domain's inputs vary along."""
        super().end(task)
        if task.position is None:
            return
        config = self.config
        part = task.position / max(len(self.domains), 1)
        share = config.kept_first + (config.kept_last - config.kept_first) * part
        for name, moment in self._moments(task).items():
            memory = self._memory(name, moment)
            self.directions[name] = remember(moment, memory, share).cpu().contiguous()

    def _moments(self, task: Task) -> dict[str, Tensor]:
        self.model.eval()
        (rows,) = task.rows.values()
        chosen = evenly_spaced(rows, INPUT_ROWS)
        return input_moments(self.model, self.method, chosen, self.pad_token_id)

    def _memory(self, name: str, moment: Tensor) -> Tensor:
        return self.directions.get(name, moment[:, :0]).to(moment.device)

    def state(self) -> dict[str, Any]:
        return super().state() | {"directions": dict(self.directions)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.directions = dict(state.get("directions", {}))
