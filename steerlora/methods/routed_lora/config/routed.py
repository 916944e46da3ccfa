"""Configuration of low-rank specialists that a router weighs; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Interval

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, Name, NotNegative, OneOf, Positive, Share
from steerlora.errors import UserError
from steerlora.methods.config import MethodConfig, method

if TYPE_CHECKING:
    from torch import nn

    from steerlora.config import Config
    from steerlora.methods.base import DomainRouter, Method, Sources
    from steerlora.methods.routed_lora.learning import RoutedLoRALearner

SIGNALS = ("none", "dense", "sae")
CONTEXTS = ("token", "causal_mean", "ema")
SOURCES = ("inline", "base", "base_last")
READS = ("input", "output")
ISOLATIONS = ("free", "frozen", "own")
SIGNAL_TOKENS = ("text", "all")
COLLAPSES = ("ignore", "warn", "stop")
OF_TASKS = ("mahalanobis", "least_squares")
"""Routers that tell domains apart and are fitted to each as it arrives (``task_routers.py``)."""


@dataclass(frozen=True, kw_only=True)
class LossWeights(Section, key="method.losses"):
    """Weights of the losses; one of weight zero is not computed."""

    task: NotNegative = 1.0
    """Of the next token's cross-entropy."""
    preservation: NotNegative = 0.0
    """Of the squared change of general features; needs ``method.monitor``."""
    steering: NotNegative = 0.0
    """Of the squared distance of a domain's own features from its prototype; needs
    ``method.monitor``."""
    gate_sparsity: NotNegative = 0.0
    """Of the gate's entropy."""
    rank_budget: NotNegative = 0.0
    """Of the mean of the rank mask."""
    load_balance: NotNegative = 0.0
    """Of mean usage's squared distance from uniform over the active specialists."""
    diversity: NotNegative = 0.0
    """Of the squared cosine between specialists."""
    orthogonality: NotNegative = 0.0
    """Of O-LoRA's loss in sequences: the arriving domain's specialist against the earlier ones;
    needs ``method.isolation=own``."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Section, key="method.memory"):
    """The memory policy: specialists are spawned, merged and pruned, in sequences and in joint
    training."""

    enabled: bool = False
    """Whether it acts; it needs a learnt router of SAE features."""
    per_module: bool = False
    """Whether each adapted module decides for itself, by its own routing, as published; otherwise
    one decision is for all. Needs ``method.per_module``."""
    every: Count = 50
    """Steps between its decisions, from 1."""
    warmup: Annotated[int, Interval(ge=0, le=10**9)] = 0
    """Steps of the training, over all domains of a sequence, before its first decision, from 0;
    what is seen in them counts. Published: 400."""
    spawn_confidence: Share = 0.5
    """A specialist is spawned where the gate's mean confidence (0: even over those kept, 1:
    one-hot) is below this, from 0 to 1,"""
    spawn_similarity: Share = 0.95
    """and the text's mean features are less similar (cosine) than this to every active
    specialist's, from 0 to 1."""
    merge_similarity: Share = 0.99
    """Specialists are merged whose mean features are more similar than this, from 0 to 1."""
    prune_usage: Share = 0.1
    """A specialist is dropped whose usage is below this part of the even share, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Section, key="method.health"):
    """The health of routing, measured during training (``methods/routed_lora/health.py``)."""

    log_every: Count = 50
    """Steps between measurements, from 1."""
    collapse: Annotated[str, OneOf(COLLAPSES)] = "warn"
    """What to do when routing collapses in joint training: "ignore", "warn" or "stop". (In a
    sequence one domain at a time may well have one specialist.)"""
    collapse_below: Share = 0.3
    """Usage entropy / log E below which routing has collapsed, from 0 to 1."""


@method("routed_lora")
@dataclass(frozen=True, kw_only=True)
class RoutedLoRAConfig(MethodConfig):
    """Low-rank specialists at and above a control site, weighed token by token by a router.

    Plain LoRA is the case without a signal. The total rank is ``specialists * rank`` in every case.
    """

    kind: str = "routed_lora"
    """Registered name of the kind."""
    signal: Annotated[str, OneOf(SIGNALS)] = "sae"
    """What routes: "sae" (the site's features), "dense" (the hidden state at the site), or "none":
    every specialist always acts, as one plain LoRA of the total rank."""
    source: Annotated[str, OneOf(SOURCES)] = "inline"
    """Where the signal is read: "inline", the current stream at each site; "base", a separate
    forward of the frozen base (with one site the two are equal, and the forward is saved);
    "base_last", the final hidden state of such a forward, for every site (signal "dense" only)."""
    reads: Annotated[str, OneOf(READS)] = "input"
    """Which stream of its layer a site reads: "input", the one that enters it, or "output", the one
    that leaves it, as published. The output steers its own layer, so it is the base's: needs
    ``method.source=base``."""
    context: Annotated[str, OneOf(CONTEXTS)] = "token"
    """Over which tokens the signal is averaged: "token" (each token's own), or the tokens so far,
    "causal_mean" or "ema"."""
    decay: Annotated[float, Interval(gt=0, lt=1)] = 0.9
    """Of "ema": weight of the past, a token, above 0 and below 1."""
    router: Name = "linear"
    """Registered name of the router: "linear" or "mlp" (two layers), learnt, or one that is fitted
    to domains as they arrive: "prototype", each token goes to the specialist of the domain whose
    mean signal its own is nearest to; "mahalanobis" and "least_squares", EPI's and Any-SSR's."""
    signal_tokens: Annotated[str, OneOf(SIGNAL_TOKENS)] = "text"
    """Which tokens carry the signal, and are counted in losses and in the health of routing:
    "text", all but the chat template's header, special tokens and a sequence's first
    (``lm/signal_tokens.py``); "all", every real token."""
    router_hidden: Annotated[int, Interval(ge=1, le=2**17)] = 256
    """Hidden width of "mlp", from 1."""
    rank_hidden: Annotated[int, Interval(ge=1, le=2**17)] | None = None
    """Hidden width of the rank's perceptron, from 1; null: ``router_hidden``, as the gate's."""
    per_module: bool = False
    """A router of its own for every adapted module, in place of one a site."""
    specialists: Annotated[int, Interval(ge=1, le=1024)] = 4
    """E, from 1."""
    active: Annotated[int, Interval(ge=1, le=1024)] | None = None
    """Specialists active at the start, the first ones; null: all. The memory policy spawns
    others."""
    rank: Annotated[int, Interval(ge=1, le=2**14)] = 16
    """R of each specialist, from 1."""
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the specialists' inputs that are dropped in training, as in LoRA; from 0 and below
    1. Each rank and each part of a batch draws its own."""
    top_k: Annotated[int, Interval(ge=1, le=1024)] = 2
    """Specialists kept for each token, from 1; as many as there are: a dense gate."""
    temperature: Positive = 1.0
    """Of the gate's softmax, above 0."""
    prototypes: bool = False
    """A learnt gate is reweighted by the cosine of the signal to the domains' prototypes (domain
    d's goes to specialist d modulo E)."""
    whitened: bool = True
    """"prototype" measures nearness where the signal varies alike in all directions within a
    domain; false: in the signal as it is."""
    hard_gate: bool = True
    """"prototype" keeps the nearest only; false: softmax of the cosines."""
    margin: Annotated[float, Interval(ge=0, le=2)] = 0.05
    """"prototype" leaves a token without any update where the cosines of the nearest two prototypes
    differ by less, from 0 to 2."""
    null_specialist: bool = True
    """"prototype" knows general text too, where the domains have any (``domains.pretraining``), and
    leaves it without any update."""
    dynamic_rank: bool = True
    """Learn a token-dependent rank mask."""
    initial_rank: Positive = 0.75
    """Effective rank at initialisation, a fraction of ``rank``, from 1 / rank and below 1."""
    hard_rank: Share = 0.0
    """Outside training, rank components whose mask is below this are left out and not computed,
    from 0 to 1; 0: the soft mask."""
    isolation: Annotated[str, OneOf(ISOLATIONS)] = "free"
    """Which specialists train in a sequence: "free", all of them in every domain; "frozen", the one
    that a domain used most is frozen when the domain ends; "own", each arriving domain trains one
    of its own, the next, and the others are frozen."""
    losses: LossWeights = field(default_factory=LossWeights)
    """Weights of the losses."""
    published_losses: bool = False
    """Gate sparsity, load balance and diversity have their published formulas
    (``published_losses.py``), and preservation and steering are sums over the sites in place of
    their values at ``monitor``; needs ``method.reads=output`` for these two."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The memory policy."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """The health of routing, measured during training."""

    low_rank: ClassVar[bool] = True
    not_trained: ClassVar[frozenset[str]] = frozenset(
        {"name", "hard_rank", "health.collapse", "health.collapse_below"}
    )
    only_in_sequences: ClassVar[frozenset[str]] = MethodConfig.only_in_sequences | {"isolation"}
    only_in_evaluation: ClassVar[tuple[str, ...]] = ("hard_rank",)

    @property
    def routed(self) -> bool:
        """Whether a router weighs the specialists; otherwise it is plain LoRA."""
        return self.signal != "none"

    @property
    def by_prototype(self) -> bool:
        """Whether tokens go to the specialist of the nearest prototype, and nothing is learnt."""
        return self.routed and self.router == "prototype"

    @property
    def assigns(self) -> bool:
        """Whether the rows of a domain train the domain's specialist, whatever the router says."""
        return self.routed and self.router in OF_TASKS

    @property
    def tells_domains(self) -> bool:
        return self.by_prototype or self.assigns

    @property
    def total_rank(self) -> int:
        """E * R: what plain LoRA of the same size has as its rank."""
        return self.specialists * self.rank

    def rows_of(self, specialist: int) -> slice:
        """A specialist's rows of every A, and columns of every B."""
        return slice(specialist * self.rank, (specialist + 1) * self.rank)

    @property
    def reads_features(self) -> bool:
        return self.signal == "sae"

    @property
    def reads_taxonomy(self) -> bool:
        return self.prototypes or self.compares_sites

    @property
    def _compares(self) -> bool:
        return bool(self.losses.preservation or self.losses.steering)

    @property
    def compares_with_base(self) -> bool:
        return self._compares and not self.published_losses

    @property
    def compares_sites(self) -> bool:
        """A loss of it compares features at every site with the base's."""
        return self._compares and self.published_losses

    @property
    def streams(self) -> list[int]:
        return [site + (self.reads == "output") for site in self.sites]

    @property
    def has_control_signal(self) -> bool:
        return self.signal == "sae"

    @property
    def exports_to_peft(self) -> bool:
        return not self.routed

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"active": self.active or 0, "top_k": self.top_k}.items():
            if value > self.specialists:
                raise UserError(
                    f"method.{name}={value} is more than method.specialists={self.specialists}"
                )
        if not 1 / self.rank <= self.initial_rank < 1 and self.dynamic_rank:
            raise UserError(
                f"method.initial_rank={self.initial_rank}: a fraction of the rank, at least "
                f"1/rank ({1 / self.rank:.3g}) and below 1"
            )
        self._check_signal()
        self._check_specialists()

    def _check_signal(self) -> None:
        """Settings of the signal and the router that make no method together."""
        if not self.routed and self.dynamic_rank:
            raise UserError("method.dynamic_rank=true needs a router: set method.signal=sae")
        if self.tells_domains and (self.dynamic_rank or self.per_module or self.prototypes):
            raise UserError(
                f"method.router={self.router} learns nothing: set method.dynamic_rank, "
                "method.per_module and method.prototypes to false"
            )
        if self.router in ("prototype", *OF_TASKS) and not self.routed:
            raise UserError(
                f"method.router={self.router} needs a signal: method.signal=sae or dense"
            )
        if self.router == "least_squares" and self.kind == "routed_lora":
            raise UserError("method.router=least_squares has settings of its own: method=any_ssr")
        if self.assigns and self.null_specialist:
            raise UserError(
                f"method.router={self.router} knows no general text: set "
                "method.null_specialist=false"
            )
        if self.prototypes and not self.reads_features:
            raise UserError("method.prototypes=true needs method.signal=sae")
        if self.source == "base_last" and self.reads_features:
            raise UserError("method.source=base_last reads hidden states: set method.signal=dense")
        if self.source == "base_last" and self.by_prototype:
            raise UserError(
                "method.router=prototype reads the streams at its sites: set "
                "method.source=inline or base"
            )
        if self.reads == "output" and (self.source != "base" or self.tells_domains):
            raise UserError(
                "method.reads=output reads what a layer has still to compute, from a forward of "
                "the base, into a learnt router: set method.source=base and method.router=linear "
                "or mlp"
            )
        if self.compares_sites and not (self.reads == "output" and self.reads_features):
            raise UserError(
                "method.published_losses=true compares the features of what leaves the sites' "
                "layers: set method.signal=sae and method.reads=output, or "
                "method.losses.preservation and method.losses.steering to 0"
            )
        if self.compares_with_base and self.monitor is None:
            raise UserError(
                "method.losses.preservation and method.losses.steering compare features at a "
                "monitor site: set method.monitor=<layer>, such as the number of layers"
            )

    def _check_specialists(self) -> None:
        """Settings of the specialists in a sequence that make no method together."""
        if self.isolation == "frozen" and not self.routed:
            raise UserError(
                "method.isolation=frozen freezes what routing chose most, and "
                f"method={self.name} has no routing: set it to free or own"
            )
        if self.isolation != "free" and self.optimizer.over_domains:
            raise UserError(
                f"method.isolation={self.isolation}: an optimizer that goes through all domains "
                "would move frozen specialists on: set method.optimizer.over_domains=false"
            )
        if self.memory.enabled and (not self.reads_features or self.tells_domains):
            raise UserError(
                "method.memory.enabled=true needs a learnt router of SAE features: set "
                "method.signal=sae and method.router=linear or mlp"
            )
        if self.memory.per_module and not self.per_module:
            raise UserError(
                "method.memory.per_module=true decides by each module's own routing: set "
                "method.per_module=true"
            )
        if self.losses.orthogonality and self.isolation != "own":
            raise UserError(
                "method.losses.orthogonality keeps an arriving domain's specialist apart from the "
                "others: set method.isolation=own"
            )

    def check(self, config: Config) -> None:
        super().check(config)
        domains = len(config.domains.names)
        for key, wanted in {
            f"router={self.router}": self.tells_domains,
            "isolation=own": self.isolation == "own",
        }.items():
            if wanted and self.specialists < domains:
                raise UserError(
                    f"method.{key} needs a specialist a domain: set method.specialists to at least "
                    f"{domains}"
                )
        given = config.domains
        if self.by_prototype and self.null_specialist and not given.has_general_text:
            raise UserError(
                f"method.null_specialist=true knows general text, and domains={given.name} bring "
                "none: give domains.general=<jsonl file>, or set it to false"
            )
        if self.rank > config.model.width:
            raise UserError(
                f"method.rank={self.rank} is more than model.width={config.model.width}: an update "
                "of the stream has no higher rank"
            )
        if self.isolation != "free" and config.trainer.weight_decay:
            raise UserError(
                f"method.isolation={self.isolation}: weight decay would shrink the frozen "
                "specialists: set trainer.weight_decay=0"
            )

    def check_names(self) -> None:
        from steerlora.methods.routed_lora.routing import ROUTERS

        ROUTERS.check("method.router", self.router)

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        from steerlora.methods.routed_lora.adapter import Adapter

        return Adapter.of(model, self, sources, seed)

    def domain_router(self, width: int, domains: int, seed: int) -> DomainRouter:
        import torch

        from steerlora.methods.routed_lora.routing import ROUTERS

        drawn = torch.Generator().manual_seed(seed)
        config = replace(self, specialists=domains, top_k=1, active=None)
        return ROUTERS[self.router](width, config, 1, drawn)

    def learner(self, method: Method, **settings: Any) -> RoutedLoRALearner:
        from steerlora.methods.routed_lora.learning import RoutedLoRALearner

        return RoutedLoRALearner(method=method, **settings)
