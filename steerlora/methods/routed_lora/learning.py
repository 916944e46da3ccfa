"""How routed specialists train: losses, prototypes, memory, and which of them a domain may change.

T tokens that carry a signal, E specialists, R rank components.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from steerlora.data.batches import ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.distributed.reductions import mean_over_ranks, world
from steerlora.lm.decoder import decoder_of
from steerlora.methods.base import Learner, Task
from steerlora.methods.interventions import INTERVENTIONS
from steerlora.methods.routed_lora import losses, published_losses, published_metrics
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.arrivals import (
    PROTOTYPE_ROWS,
    fit_routers,
    notes_of_prototypes,
)
from steerlora.methods.routed_lora.compared_sites import ComparedSites
from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.methods.routed_lora.isolation import train_only
from steerlora.methods.routed_lora.memory import MemoryPolicy
from steerlora.methods.routed_lora.site import Site
from steerlora.methods.routed_lora.train_under import TrainUnder
from steerlora.methods.routed_lora.watch import RoutingWatch
from steerlora.training.language import next_token_loss

FACT_ROWS = 64
"""Training rows a domain over which mean rank and the domains' specialists are recorded."""
PROBE_ROWS = 16
"""Training rows a domain on which the health of routing is followed."""


@dataclass(kw_only=True)
class RoutedLoRALearner(Learner):
    """Trains an `Adapter`."""

    method: Adapter
    frozen: list[int] = field(default_factory=list)
    """Specialists that train no more, in the order in which they were frozen."""
    memories: list[MemoryPolicy] = field(default_factory=list)
    """The memory policies of the task in training, one or one a module; none where they are off."""
    watch: RoutingWatch | None = None
    """Over the routing of the task in training."""
    arrived: dict[str, int] = field(default_factory=dict)
    """{domain that routers have been fitted to: its specialist}, as they came."""
    _task: Task | None = None
    _under: TrainUnder | None = None
    _sites: ComparedSites | None = None
    _metrics: dict[str, float] = field(default_factory=dict)
    _memory_states: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.config.compares_with_base and self.monitor is None:
            raise ValueError(
                "the preservation and steering losses compare features at a monitor site: give a "
                "monitor, or set both weights to zero"
            )
        self._sites = None
        if self.config.compares_sites:
            self._sites = ComparedSites(self.model, self.method, self.method.taxonomies)

    @property
    def config(self) -> RoutedLoRAConfig:
        return self.method.config

    # Losses

    def losses(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        """The task's loss and the auxiliary ones that are on.

        Of routing that several sites or modules have, a loss is the mean. Usage, for load balance,
        is that of all ranks' parts (of the parts that one rank takes in turn, each has its own).
        """
        weights = self.config.losses
        if self.config.assigns:
            self.method.assigned = self._specialists_of(batch)
        watched = self.monitor if self.config.compares_with_base else self._sites
        with watched.recording() if watched else nullcontext():
            task = next_token_loss(self.model, batch)
        return {"task": (weights.task, task), **self.auxiliary(batch)}

    def _specialists_of(self, batch: ChatBatch) -> Tensor:
        """The specialist of every row's domain, [B]."""
        position = self._task.position if self._task else None
        return batch.domains if position is None else torch.full_like(batch.domains, position)

    def auxiliary(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, value)} of the losses besides the task's, after its forward."""
        on_features = self._on_sites if self._sites else self._on_monitor
        return {**on_features(batch), **self._on_routing(batch), **self._on_weights()}

    def validation_loss(self, batch: ChatBatch) -> Tensor:
        """As trained: under the control that it trains under, which draws the same every time."""
        if self._under:
            self._under.begin(0, batch)
        return super().validation_loss(batch)

    def _on_monitor(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        weights, monitor = self.config.losses, self.monitor
        terms: dict[str, tuple[float, Tensor]] = {}
        if not self.config.compares_with_base:
            return terms
        adapted = monitor.features()
        if weights.preservation:
            value = losses.preservation(adapted, monitor.base_features(), monitor.general)
            terms["preservation"] = (weights.preservation, value * batch.shares.signal)
        if weights.steering:
            value = losses.steering(
                adapted, monitor.prototypes, monitor.domain, self._owners(batch)
            )
            terms["steering"] = (weights.steering, value * batch.shares.owned)
        return terms

    def _on_sites(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        """Preservation and steering as published: summed over the sites."""
        weights = self.config.losses
        kept, steered = [], []
        for adapted, base, taxonomy in self._sites.found():
            if weights.preservation:
                kept.append(losses.preservation(adapted, base, taxonomy.general))
            if weights.steering:
                own = (taxonomy.prototypes, taxonomy.domain, self._owners(batch))
                steered.append(losses.steering(adapted, *own))
        found = {
            "preservation": (weights.preservation, kept, batch.shares.signal),
            "steering": (weights.steering, steered, batch.shares.owned),
        }
        return {
            name: (weight, torch.stack(values).sum() * share)
            for name, (weight, values, share) in found.items()
            if values
        }

    def _on_routing(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        weights, sites = self.config.losses, list(self.method.sites.values())
        counted, share = self._counted(batch), batch.shares.signal
        terms: dict[str, tuple[float, Tensor]] = {}
        if sites and weights.gate_sparsity:
            values = [self._gate_sparsity(site, counted) for site in sites]
            terms["gate_sparsity"] = (weights.gate_sparsity, torch.stack(values).mean() * share)
        if sites and weights.load_balance:
            usages = [site.routing.gate[counted].mean(0) for site in sites]
            if world() > 1:
                usages = [mean_over_ranks(usage * share) for usage in usages]
            form = published_losses if self.config.published_losses else losses
            values = [
                form.load_balance(usage, self.method.active_at(site.layer))
                for usage, site in zip(usages, sites, strict=True)
            ]
            terms["load_balance"] = (weights.load_balance, torch.stack(values).mean())
        if sites and weights.rank_budget and self.config.dynamic_rank:
            values = [losses.rank_budget(site.routing.mask[counted]) for site in sites]
            terms["rank_budget"] = (weights.rank_budget, torch.stack(values).mean() * share)
        return terms

    def _counted(self, batch: ChatBatch) -> Tensor:
        """Tokens over which losses of routing are means, [B, S] bool.

        Where a part of a batch has no token with a signal, all of its own: their mean has the
        weight zero, but it is a number.
        """
        return self.method.with_signal(batch) if batch.shares.signal else batch.attention_mask > 0

    def _gate_sparsity(self, site: Site, counted: Tensor) -> Tensor:
        gate = site.routing.gate[counted]
        if self.config.published_losses:
            return published_losses.gate_sparsity(gate, self.method.active_at(site.layer))
        return losses.gate_sparsity(gate)

    def _owners(self, batch: ChatBatch) -> Tensor:
        """The domain of every token with a signal, [T]; -1: none."""
        counted = self.method.with_signal(batch)
        return batch.domains[:, None].expand_as(counted)[counted]

    def _diversity(self) -> Tensor:
        layers, count = self.method.layers.values(), self.config.specialists
        if self.config.published_losses:
            active = self.method.active.expand(len(layers), count)
            pairs = zip(layers, active, strict=True)
            return published_losses.specialist_diversity(pairs, count)
        return losses.specialist_diversity(layers, count)

    def _on_weights(self) -> dict[str, tuple[float, Tensor]]:
        config, layers = self.config, self.method.layers.values()
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.losses.diversity and config.specialists > 1 and config.routed:
            terms["diversity"] = (config.losses.diversity, self._diversity())
        if config.losses.orthogonality and self._task and self._task.position:
            now = self._task.position
            value = losses.orthogonality(layers, config.specialists, now, range(now))
            terms["orthogonality"] = (config.losses.orthogonality, value)
        return terms

    # Around a task

    def callbacks(self, task: Task) -> list[Callback]:
        config, health = self.config, self.config.health
        probe = [
            (row, self.domains.index(name))
            for name, own in task.rows.items()
            for row in own[:PROBE_ROWS]
        ]
        self.watch = RoutingWatch(
            self.method,
            self.domains,
            collate(*zip(*probe, strict=True), self.pad_token_id),
            # One domain at a time may well have one specialist: that is no collapse.
            health if task.position is None else replace(health, collapse="ignore"),
        )
        found: list[Callback] = [self.watch]
        if self.intervention.retrained:
            self._under = TrainUnder(self.method, self.intervention, self.domains)
            found.append(self._under)
        self.memories = self._new_memories(task) if config.memory.enabled else []
        if task.position is not None and self._memory_states:
            for memory, state in zip(self.memories, self._memory_states, strict=True):
                memory.load_state_dict(state)
        return [*found, *self.memories]

    def _new_memories(self, task: Task) -> list[MemoryPolicy]:
        config = self.config.memory
        return [
            MemoryPolicy(
                self.method,
                config,
                domain=task.name,
                module=module,
                position=task.position or 0,
                protected=self.frozen,
                seed=self.seed,
            )
            for module in (self.method.layers if config.per_module else [None])
        ]

    def training(self, task: Task) -> AbstractContextManager[None]:
        self._task = task
        return self._in_training(task)

    @contextmanager
    def _in_training(self, task: Task) -> Iterator[None]:
        try:
            with self._held(task):
                yield
        finally:
            self.method.assigned = None

    def _held(self, task: Task) -> AbstractContextManager[None]:
        """While open, what a task does not train stays as it is."""
        everyone = set(range(self.config.specialists))
        if task.position is not None and self.config.isolation == "own":
            return train_only(self.method, [task.position])
        if self.frozen:
            return train_only(self.method, everyone - set(self.frozen))
        return nullcontext()

    def begin(self, task: Task) -> None:
        """Fit prototypes: general text, where there is any, is known from the start, a domain from
        its arrival on."""
        if not any(router.fitted for router in self.method.routers.values()):
            return
        wanted = not task.position and self.config.null_specialist
        if wanted and (general := self.general_text(PROTOTYPE_ROWS)):
            self._fit(None, general)
        for specialist, (name, rows) in enumerate(task.rows.items(), task.position or 0):
            self._fit(specialist, rows)
            self.arrived[name] = specialist

    def notes(self, task: Task) -> list[str]:
        new = [name for name in task.rows if name in self.arrived]
        return notes_of_prototypes(self.method, self.arrived, new) if new else []

    def _fit(self, specialist: int | None, rows: list[EncodedChat]) -> None:
        fit_routers(self.model, self.method, specialist, rows, self.pad_token_id)

    def end(self, task: Task) -> None:
        """Joint training: record what interventions need. In a sequence: freeze a specialist."""
        if task.position is None:
            self._record_facts(task)
            if self._sites:
                rows = {name: own[:FACT_ROWS] for name, own in task.rows.items()}
                given = (self.model, self.method, self._sites, rows, self.pad_token_id)
                self._metrics = published_metrics.measure(*given)
        elif self.config.isolation == "frozen":
            self._freeze_most_used(task)

    def _freeze_most_used(self, task: Task) -> None:
        """Freeze the free specialist that the domain used most; one always stays free."""
        free = [e for e in range(self.config.specialists) if e not in self.frozen]
        if len(free) < 2:
            return
        (rows,) = task.rows.values()
        gate = sum(gate for gate, _ in self._usage(rows).values())
        self.frozen.append(max(free, key=lambda specialist: float(gate[specialist])))

    @torch.no_grad()
    def _usage(self, rows: list[EncodedChat]) -> dict[int, tuple[Tensor, Tensor]]:
        """{site: (mean gate [E], token ranks [T])} over the first training rows of one domain."""
        self.model.eval()
        chosen = rows[:FACT_ROWS]
        batch = collate(chosen, [-1] * len(chosen), self.pad_token_id).to(self.model.device)
        decoder_of(self.model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        counted = self.method.with_signal(batch)
        return {
            layer: (routing.gate[counted].mean(0), routing.mask[counted].sum(-1))
            for layer, routing in self.method.routing().items()
        }

    def _record_facts(self, task: Task) -> None:
        """Record, over training rows, the mean rank and each domain's specialist.

        What an adapter was trained under (``oracle_domain``'s specialists, ``fixed_rank``'s rank)
        stays as it was during its training.
        """
        if not self.method.sites:
            return
        fixed: frozenset[str] = frozenset()
        if self.intervention.retrained:
            fixed = INTERVENTIONS[self.intervention.name].fixes
        found = {name: self._usage(own) for name, own in task.rows.items()}
        for layer, site in self.method.sites.items():
            if site.facts is None:
                continue
            if "mean_rank" not in fixed:
                ranks = torch.cat([by_site[layer][1] for by_site in found.values()])
                site.facts.mean_rank = float(ranks.mean())
            if "specialist_of_domain" not in fixed:
                site.facts.specialist_of_domain = {
                    name: int(by_site[layer][0].argmax()) for name, by_site in found.items()
                }

    # From one task to the next

    def state(self) -> dict[str, Any]:
        state = {"frozen": list(self.frozen), "memory": self._states_of_memories()}
        return state | ({"arrived": dict(self.arrived)} if self.arrived else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.frozen, self._memory_states = list(state["frozen"]), list(state["memory"])
        self.arrived = dict(state.get("arrived", {}))

    def _states_of_memories(self) -> list[dict[str, Any]]:
        """Of the policies that have just trained; before the first task, of none."""
        if not self.memories:
            return self._memory_states
        return [memory.state_dict() for memory in self.memories]

    def history(self) -> dict[str, Any]:
        events = [event for state in self._states_of_memories() for event in state["events"]]
        found = {"routing": self.watch.history if self.watch else [], "events": events}
        return found | ({"metrics": self._metrics} if self._metrics else {})
