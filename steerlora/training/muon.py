"""Muon: momentum whose matrices are made orthogonal; AdamW for what is no hidden matrix.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. ``torch.optim.Muon`` computes
in bfloat16, which a processor without bfloat16 products does several times more slowly than
float32, takes one matrix at a time, and leaves the other parameters to a second optimizer. Here
matrices of one shape are taken together, in their own type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration x <- a x + (b (x x^T) + c (x x^T)^2) x, as published."""
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same with every singular value brought near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW without decay for the others.

    A matrix W of [rows, columns] takes ``W <- W - lr sqrt(max(1, rows / columns)) O``, with O the
    orthogonalised Nesterov momentum of its gradient.

    Args:
        matrices: two-dimensional, of hidden layers; not embeddings.
        others: embeddings, norms, biases.
        matrix_lr: of the matrices.
        lr: AdamW's, of the others.
        momentum: of the matrices.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        matrix_lr: float,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ) -> None:
        groups = [
            {"params": list(matrices), "lr": matrix_lr, "momentum": momentum},
            {"params": list(others), "lr": lr, "betas": betas, "eps": eps, "steps": 0},
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, others = self.param_groups
        self._step_matrices(matrices)
        self._step_others(others)
        return loss

    def _step_matrices(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            updates = orthogonalised(
                torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
            )
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)

    def _step_others(self, group: dict) -> None:
        group["steps"] += 1
        first, second = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["mean"].lerp_(parameter.grad, 1 - first)
            state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
            spread = (state["square"] / (1 - second ** group["steps"])).sqrt_().add_(group["eps"])
            rate = group["lr"] / (1 - first ** group["steps"])
            parameter.addcdiv_(state["mean"], spread, value=-rate)
