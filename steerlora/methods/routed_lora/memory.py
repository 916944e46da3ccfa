"""The memory policy of continual adaptation: specialists are spawned, merged and pruned.

B batch, S sequence, T tokens (padding has weight zero), N latents, K active latents, E specialists,
R rank of each, M modules with a router of their own (1 where a site's modules share one).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import Parameter

from steerlora.distributed.ranks import is_main
from steerlora.distributed.reductions import sum_over_ranks
from steerlora.distributed.strategies import editable
from steerlora.methods.routed_lora.adapter import Adapter, Site
from steerlora.methods.routed_lora.config import MemoryConfig
from steerlora.methods.routed_lora.specialists import (
    clear_specialist,
    merge_specialists,
    settle_moments,
)
from steerlora.saes.sparse import sparse_transposed_times
from steerlora.training.loop import begins_step


class MemoryPolicy(Callback):
    """Looks at the routing every so many steps, and changes which specialists there are.

    Over the real tokens of all ranks since the last look, and averaged over sites and modules:

    - *usage* of an active specialist: its mean gate. They sum to one.
    - *confidence*: 1 - H(g) / log(min(top_k, active)), averaged over tokens, with H the entropy of
      the gate as used: 0 where the kept specialists weigh alike, 1 where one takes all. A gate with
      nothing to choose between (top-1, or one active) says nothing: its confidence counts as 0.
    - *similarity*: cosine of the mean features to a specialist's *prototype*, the gate-weighted
      mean of the features of all tokens it has had so far. Features are not negative, so cosines
      lie in [0, 1]: plain, not centred, since two prototypes centred on their own mean are always
      opposite and could never be merged. (Texts share much of what is active: in the micro world a
      new domain comes at 0.83 to 0.97, more of the same at 0.98 to 0.99.)

    So every threshold in (0, 1) can be passed on either side. Then, of specialists that were active
    all the while,

    - *spawn*: confidence below ``spawn_confidence``, similarity to the nearest active specialist
      (as it was before these tokens) below ``spawn_similarity``, and one is inactive: it becomes
      active. It starts with a fresh A and B = 0.
    - *merge*: the two most similar prototypes have a cosine above ``merge_similarity``: the first
      becomes the best rank-R approximation of their mean, weighted by all their usage so far; the
      second becomes inactive.
    - *prune*: usage below ``prune_usage`` / active, and at least ``top_k`` remain: inactive.

    A specialist that becomes inactive is made fresh. It looks at the beginning of a step, before
    its forward, so a checkpoint after the step before holds all that the decision needs, and the
    last step, after which nothing would train, is followed by none.

    A sequence has one policy a domain, each taking over the state of the one before
    (``load_state_dict``); what had been counted since that one's last look is then dropped.

    Args:
        adapter: routed by SAE features, through a learnt router.
        policy: steps between looks, and the thresholds above.
        domain: what trains, for the record.
        module: name in ``adapter.layers`` of the only module that it looks at and changes; None:
            one policy for all.
        position: of the domain in its sequence, from 0: steps of a warm-up count from the first.
        protected: specialists that are neither merged nor pruned.
        seed: of fresh weights.

    Attributes:
        events: what was done, in order: {"step", "domain", "event", "specialists", "why"}; of a
            merge, the specialist that stays is named first.

    Raises:
        ValueError: an adapter without features, or whose router does not use ``active``.
    """

    def __init__(
        self,
        adapter: Adapter,
        policy: MemoryConfig,
        *,
        domain: str,
        module: str | None = None,
        position: int = 0,
        protected: Collection[int] = (),
        seed: int = 0,
    ) -> None:
        config = adapter.config
        if not config.reads_features or config.by_prototype:
            raise ValueError(
                "the memory policy needs a learnt router of SAE features; this adapter has signal "
                f"{config.signal!r}, router {config.router!r}"
            )
        self.adapter, self.policy, self.domain = adapter, policy, domain
        self.module, self.position = module, position
        self.protected, self.seed = frozenset(protected), seed
        names = list(adapter.layers)
        # Its row of `adapter.active`; its layers; where their routing is found.
        self._row: Any = ... if module is None else names.index(module)
        self._layers = list(adapter.layers.values()) if module is None else [adapter.layers[module]]
        self._sites = {
            layer: site
            for layer, site in adapter.sites.items()
            if module is None or module in adapter.modules_of(layer)
        }
        self.events: list[dict[str, Any]] = []
        # Sums over tokens by name: since the last look, and by specialist over everything so far.
        self._window: dict[str, Tensor] = {}
        self._lasting: dict[str, Tensor] = {}

    # When

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._window = {name: held.to(module.device) for name, held in self._window.items()}
        self._lasting = {name: held.to(module.device) for name, held in self._lasting.items()}

    def on_before_backward(
        self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor
    ) -> None:
        for layer, site in self._sites.items():
            self._count(layer, site)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.policy.every == 0 and begins_step(trainer, batch_idx)
        if due and self._window and self._warm(trainer):
            self._window = self._whole_window()
            layers = [p for layer in self._layers for p in (layer.A, layer.B)]
            with editable(trainer, layers, moments=True) as states:
                self._decide(trainer.global_step, states)

    def _warm(self, trainer: L.Trainer) -> bool:
        """Whether the warm-up is over; every domain of a sequence has as many steps."""
        earlier = self.position * trainer.max_steps if self.position else 0
        return earlier + trainer.global_step >= self.policy.warmup

    @property
    def state_key(self) -> str:
        """Under which a checkpoint has it: each module's policy has its own."""
        return f"{type(self).__name__} {self.module}" if self.module else super().state_key

    def state_dict(self) -> dict[str, Any]:
        """The domain, the events (plain JSON), and the sums as a flat {name: tensor}.

        Every rank calls it: each has counted its own tokens.
        """
        window = {f"window.{name}": held.clone() for name, held in self._whole_window().items()}
        lasting = {f"lasting.{name}": held.clone() for name, held in self._lasting.items()}
        return {
            "domain": self.domain,
            "events": list(self.events),
            "tensors": {**window, **lasting},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events = list(state["events"])
        self._window, self._lasting = {}, {}
        for name, held in state["tensors"].items():
            kind, _, name = name.partition(".")
            if kind == "lasting":
                self._lasting[name] = held.clone()
            elif state["domain"] == self.domain:
                # The sum over ranks: one of them goes on from it.
                self._window[name] = held.clone() if is_main() else torch.zeros_like(held)

    # What is seen

    @property
    def active(self) -> Tensor:
        """[E] bool, a view: what it changes."""
        return self.adapter.active[self._row]

    @torch.no_grad()
    def _count(self, layer: int, site: Site) -> None:
        """Add the forward that has just been; nothing here waits for an accelerator."""
        gate = site.routing.gate
        real = self.adapter.tokens_with_signal(gate).flatten()
        gate = gate.flatten(0, 1)
        gate = gate.unsqueeze(1) if gate.dim() == 2 else gate  # [T, M, E]
        if self.module is not None:
            gate = gate[:, [self.adapter.modules_of(layer).index(self.module)]]
        gate = gate.float() * real[:, None, None]
        self._add("usage", gate.mean(1).sum(0))
        self._add("entropy", torch.special.entr(gate).sum(-1).mean(1).sum())
        self._add("tokens", real.sum())
        values, indices = (part.flatten(0, 1) for part in site.features)
        # A last column of ones: the features of all tokens.
        weights = torch.cat([gate.mean(1), real.unsqueeze(-1)], -1).to(values.dtype)
        latents = site.facts.sae.latents
        self._add(f"features.{layer}", sparse_transposed_times(values, indices, weights, latents))

    def _add(self, name: str, value: Tensor) -> None:
        self._window[name] = value + self._window[name] if name in self._window else value

    def _whole_window(self) -> dict[str, Tensor]:
        """The sums since the last look, of all ranks."""
        return dict(zip(self._window, sum_over_ranks(self._window.values()), strict=True))

    def _nearest(self, window: dict[str, Tensor], specialists: list[int]) -> float | None:
        """Similarity of the window to the nearest prototype; None where there is none yet."""
        known = self._known(specialists)
        if not known:
            return None
        means = {name: held[:, -1:] for name, held in _features(window).items()}
        return float(self._cosines(means)[0, known].max())

    def _known(self, specialists: list[int]) -> list[int]:
        """Those that have had any token, and so have a prototype."""
        return [e for e in specialists if self._lasting and self._lasting["usage"][e] > 0]

    def _cosines(self, columns: dict[str, Tensor]) -> Tensor:
        """Cosines of columns [N, C] to the prototypes, averaged over sites: [C, E]."""
        found = [
            F.normalize(part, dim=0).t() @ F.normalize(self._lasting[name], dim=0)
            for name, part in columns.items()
        ]
        return torch.stack(found).mean(0)

    def _remember(self, window: dict[str, Tensor]) -> None:
        for name, held in {"usage": window["usage"], **_features(window)}.items():
            seen = held[..., : self.adapter.config.specialists]
            self._lasting[name] = seen + self._lasting.get(name, torch.zeros_like(seen))

    # What is done

    @torch.no_grad()
    def _decide(self, step: int, states: Mapping[Parameter, dict[str, Tensor]]) -> None:
        window, self._window = self._window, {}
        settled = self.active.nonzero().flatten().tolist()
        usage = (window["usage"] / window["tokens"]).tolist()
        nearest = self._nearest(window, settled)
        self._remember(window)
        spawned = self._spawn(step, self._confidence(window, len(settled)), nearest)
        merged = self._merge(step, settled)
        if merged:
            first, second = merged
            usage[first] += usage[second]
        left = [e for e in settled if e not in merged[1:]]
        pruned = self._prune(step, left, usage, self.policy.prune_usage / len(settled))
        changed = {*spawned, *merged, *pruned}
        settle_moments(self.adapter, states, changed, settled, self._layers)

    def _confidence(self, window: dict[str, Tensor], active: int) -> float:
        choices = min(self.adapter.config.top_k, active)
        if choices == 1:
            return 0.0
        return max(0.0, 1 - float(window["entropy"] / window["tokens"]) / math.log(choices))

    def _spawn(self, step: int, confidence: float, nearest: float | None) -> list[int]:
        inactive = (~self.active).nonzero().flatten().tolist()
        if nearest is None or not inactive:
            return []
        if confidence >= self.policy.spawn_confidence or nearest >= self.policy.spawn_similarity:
            return []
        new = inactive[0]
        self.active[new] = True
        self._record(
            step,
            "spawn",
            [new],
            f"confidence {confidence:.3f} < {self.policy.spawn_confidence}, "
            f"similarity {nearest:.3f} < {self.policy.spawn_similarity}",
        )
        return [new]

    def _merge(self, step: int, settled: list[int]) -> list[int]:
        free = [e for e in self._known(settled) if e not in self.protected]
        if len(free) < 2:
            return []
        cosines = self._cosines(_features(self._lasting))[free][:, free]
        pairs = torch.triu_indices(len(free), len(free), 1).t().tolist()
        similarity, (i, j) = max((float(cosines[i, j]), (i, j)) for i, j in pairs)
        if similarity <= self.policy.merge_similarity:
            return []
        first, second = free[i], free[j]
        masses = self._lasting["usage"][[first, second]]
        shares = (masses / masses.sum()).tolist()
        generator = self._generator(step, first)
        merge_specialists(self.adapter, first, second, shares, generator, self._layers)
        for held in self._lasting.values():
            held[..., first] += held[..., second]
        self._retire(step, second)
        why = f"similarity {similarity:.3f} > {self.policy.merge_similarity}"
        self._record(step, "merge", [first, second], why)
        return [first, second]

    def _prune(self, step: int, settled: list[int], usage: list[float], least: float) -> list[int]:
        pruned = []
        for specialist in sorted(settled, key=usage.__getitem__):
            if usage[specialist] >= least or specialist in self.protected:
                continue
            if int(self.active.sum()) <= self.adapter.config.top_k:
                break
            self._retire(step, specialist)
            why = f"usage {usage[specialist]:.3f} < {least:.3f}"
            self._record(step, "prune", [specialist], why)
            pruned.append(specialist)
        return pruned

    def _retire(self, step: int, specialist: int) -> None:
        self.active[specialist] = False
        generator = self._generator(step, specialist)
        clear_specialist(self.adapter, specialist, generator, self._layers)
        for held in self._lasting.values():
            held[..., specialist] = 0

    def _generator(self, step: int, specialist: int) -> torch.Generator:
        """A function of when and for which specialist, so that a resumed training draws alike."""
        words = f"{self.seed} {self.domain} {step} {specialist}"
        words += f" {self.module}" if self.module else ""
        return torch.Generator().manual_seed(zlib.crc32(words.encode()))

    def _record(self, step: int, event: str, specialists: list[int], why: str) -> None:
        where = {"step": step, "domain": self.domain}
        why = f"{self.module}: {why}" if self.module else why
        self.events.append({**where, "event": event, "specialists": specialists, "why": why})


def _features(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of features among ``sums``, by name."""
    return {name: held for name, held in sums.items() if name.startswith("features.")}
