"""SC-LoRA in the published arrangement: slow, obvious, and sharing no code with the fused adapter.

B batch, S sequence, D model width, N latents, K active latents, E specialists, R rank components,
H hidden width of the gate's perceptron, H' of the rank's.

Every adapted linear layer of every decoder layer runs two perceptrons of its own on dense features
[B, S, N], and keeps every specialist's output apart, [B, S, E, D_out]; the features come from a
copy of the base model. ``scripts/bench_adapter.py`` races against it, and in float64
``tests/methods/routed_lora/test_reference.py`` holds ``sc_lora_reference`` to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerlora.saes.base import SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all linear layers share; the published values are the defaults.

    Attributes:
        specialists, rank, alpha, top_k: E, R, alpha, specialists kept a token.
        hidden, rank_hidden: H and H'.
        outputs: a layer is steered by the features of what it gives out, as published; otherwise by
            those of what it is given.
        active: [E] bool, the specialists in use; None: all.
        target_modules: last names of the linear layers that are adapted.
    """

    specialists: int = 4
    rank: int = 16
    alpha: float = 16.0
    top_k: int = 2
    hidden: int = 256
    rank_hidden: int = 256
    outputs: bool = True
    active: Tensor | None = None
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class Signal:
    """Where the linear layers of one decoder layer find the features z [B, S, N] of its stream."""

    z: Tensor


class Controlled(nn.Module):
    """y = W x + (alpha / R) sum_e g_e B_e diag(m) A_e x, with (g, m) from controllers of its own.

    Attributes:
        A: [E, R, D_in].
        B: [E, D_out, R]; zero at first.
        gate, rank: perceptrons N -> H -> GELU -> E and N -> H' -> GELU -> R. (The published code
            has a third, N -> H -> GELU -> 1, a budget that nothing reads. It is left out.)
    """

    def __init__(self, base: nn.Linear, signal: Signal, latents: int, setting: Setting) -> None:
        super().__init__()
        self.base, self.signal, self.setting = base, signal, setting
        E, R = setting.specialists, setting.rank
        H, of_rank = setting.hidden, setting.rank_hidden
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(E, R, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(E, base.out_features, R))
        self.gate = nn.Sequential(nn.Linear(latents, H), nn.GELU(), nn.Linear(H, E))
        self.rank = nn.Sequential(nn.Linear(latents, of_rank), nn.GELU(), nn.Linear(of_rank, R))

    def weigh(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gate [B, S, E] and rank mask [B, S, R] of features [B, S, N]."""
        logits = self.gate(z)
        if self.setting.active is not None:
            logits = logits.masked_fill(~self.setting.active, -torch.inf)
        probabilities = torch.softmax(logits, -1)
        best = probabilities.topk(self.setting.top_k, -1).indices
        kept = probabilities * torch.zeros_like(probabilities).scatter(-1, best, 1.0)
        gate = kept / (kept.sum(-1, keepdim=True) + 1e-8)
        mask = torch.cumprod(torch.sigmoid(self.rank(z)).clamp(min=1e-4), -1)
        return gate, mask

    def forward(self, x: Tensor) -> Tensor:
        gate, mask = self.weigh(self.signal.z)
        pairs = zip(self.A, self.B, strict=True)
        outputs = torch.stack([((x @ A.t()) * mask) @ B.t() for A, B in pairs], -2)
        update = (gate[..., None] * outputs).sum(-2)  # over specialists, of [B, S, E, D_out]
        return self.base(x) + self.setting.alpha / self.setting.rank * update


class PublishedArrangement(nn.Module):
    """Adapts ``model`` in place, at every decoder layer. Call :meth:`observe`, then the model.

    Args:
        model: a causal language model in the layout of Qwen3.
        saes: {layer: SAE, TopK or ReLU, of the stream that it reads}, for every decoder layer.
        setting: sizes.
        scales: {layer: mean norm of its features}, by which they are divided; 1 where absent.

    Attributes:
        controlled: {(layer, path inside it): adapted linear layer}.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[int, SparseAutoencoder],
        setting: Setting,
        scales: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.base = copy.deepcopy(model.requires_grad_(False))
        self.saes, self.scales, self.outputs = dict(saes), dict(scales or {}), setting.outputs
        self.signals = [Signal() for _ in model.model.layers]
        self.controlled: dict[tuple[int, str], Controlled] = {}
        for index, layer in enumerate(model.model.layers):
            for path, linear in list(layer.named_modules()):
                parent, _, name = path.rpartition(".")
                if name in setting.target_modules:
                    made = Controlled(linear, self.signals[index], saes[index].latents, setting)
                    setattr(layer.get_submodule(parent), name, made.to(linear.weight))
                    self.controlled[index, path] = made

    def trainable(self) -> list[nn.Parameter]:
        parts = (made.parameters() for made in self.controlled.values())
        return [p for part in parts for p in part if p.requires_grad]

    @torch.no_grad()
    def observe(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Read every layer's features of these tokens [B, S] in a forward of the base's copy."""
        last: list[Tensor] = []  # leaves the last layer; transformers' list has it normed
        seen = self.base.model.norm.register_forward_pre_hook(lambda _, given: last.append(*given))
        streams = self.base.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        seen.remove()
        streams = (*streams[:-1], *last)[self.outputs :]
        for index, signal in enumerate(self.signals):
            signal.z = dense_features(self.saes[index], streams[index]) / self.scales.get(index, 1)


def dense_features(sae: SparseAutoencoder, stream: Tensor) -> Tensor:
    """ReLU(TopK((x - b_dec) W_enc + b_enc)), [..., D] -> [..., N]; of a ReLU SAE without the TopK.

    A layer norm of x comes first where the SAE has one.
    """
    if sae.normalize != "none":
        stream = stream - stream.mean(-1, keepdim=True)
        stream = stream / (stream.std(-1, keepdim=True) + 1e-5)
    shift = sae.b_dec if sae.apply_b_dec_to_input else 0
    scores = (stream - shift) @ sae.W_enc + sae.b_enc
    if sae.k is None:
        return scores.relu()
    best = scores.topk(sae.k, -1)
    return torch.zeros_like(scores).scatter(-1, best.indices, best.values.relu())
