"""The method: features, control signal, adapter and its controls."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.config.checks import not_negative, one_of, positive, share
from steerlora.errors import UserError

QWEN3_LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""Linear layers of a decoder layer of the models that are pretrained here."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A TopK sparse autoencoder of the control site's activations.

    Attributes:
        path: trained SAEs to use: a folder in SAELens' layout, or a folder of such folders called
            by their hook names (``blocks.<site>.hook_resid_pre``); a Qwen-Scope folder or hub id,
            which has one for every site but 0. Null trains one a site.
        latents: N.
        k: active latents per token.
        max_tokens: tokens of activations that are harvested, over all domains.
        steps: optimizer steps.
        batch_size: tokens a step.
        learning_rate: of Adam; null: 2e-4 / sqrt(latents / 2**14).
        auxiliary: weight of the auxiliary loss that revives dead latents.
        dead_fraction: a latent is dead that has not fired for this share of the training's tokens.
        seed: of initialisation and token order.
    """

    path: str | None = None
    latents: int = 512
    k: int = 16
    max_tokens: int = 200_000
    steps: int = 1000
    batch_size: int = 1024
    learning_rate: float | None = None
    auxiliary: float = 1 / 32
    dead_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        positive(
            "sae",
            latents=self.latents,
            k=self.k,
            max_tokens=self.max_tokens,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )
        if self.k > self.latents:
            raise UserError(
                f"sae.k={self.k} is more than sae.latents={self.latents}: "
                "a token cannot have more active latents than there are"
            )


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Where the control signal is read, and over which tokens.

    Attributes:
        sites: layers whose incoming stream the SAE reads; adapters sit at and above the first.
        context: "token" (each token's own features), or an average over the tokens so far:
            "causal_mean" or "ema".
        decay: of "ema": weight of the past, a token.
        source: "inline" reads the current stream at each site; "base" a separate forward of the
            frozen base (with one site the two are equal, and the forward is saved); "base_last"
            the final hidden state of such a forward, for every site (dense routing only).
        monitor: layer whose incoming stream the preservation and steering losses compare with the
            base's, above the first site and at most the number of layers (the stream that leaves
            the last one); sequences also report the drift of its general features. Null: none.
    """

    sites: list[int] = field(default_factory=lambda: [1])
    context: str = "token"
    decay: float = 0.9
    source: str = "inline"
    monitor: int | None = None

    def __post_init__(self) -> None:
        one_of("control.context", self.context, ("token", "causal_mean", "ema"))
        one_of("control.source", self.source, ("inline", "base", "base_last"))
        if not 0 < self.decay < 1:
            raise UserError(f"control.decay={self.decay}: must be above 0 and below 1")
        if not self.sites or sorted(set(self.sites)) != list(self.sites) or min(self.sites) < 0:
            raise UserError(f"control.sites={self.sites}: give layers in rising order, each once")
        if self.monitor is not None and self.monitor <= min(self.sites):
            raise UserError(
                f"control.monitor={self.monitor}: must be above the first control site, "
                f"{min(self.sites)}; below it nothing is adapted"
            )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """How features are sorted into general ones and domains' own (stage ``features``).

    Attributes:
        general_quantile: a general feature's frequency is at or above this quantile.
        largest_variation: its coefficient of variation over domains at most this.
        domain_quantile: a domain's own feature stands out from the other domains at or above this
            quantile.
        least: features of each sort at least (an eighth of ``sae.latents`` at most).
        instruct_model: folder or hub id of an instruction-tuned version of the base; general
            features must then also drift little between the two. Null: no such condition.
        drift_quantile: a general feature's drift is at or below this quantile.
        shown: strongest features listed for each domain.
        examples: tokens in context listed for each of them.
    """

    general_quantile: float = 0.7
    largest_variation: float = 0.8
    domain_quantile: float = 0.8
    least: int = 64
    instruct_model: str | None = None
    drift_quantile: float = 0.7
    shown: int = 8
    examples: int = 5

    def __post_init__(self) -> None:
        share(
            "features",
            general_quantile=self.general_quantile,
            domain_quantile=self.domain_quantile,
            drift_quantile=self.drift_quantile,
        )
        positive("features", shown=self.shown, examples=self.examples)
        not_negative("features", least=self.least, largest_variation=self.largest_variation)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter; all methods share one layer class and one total rank, specialists * rank.

    Attributes:
        name: what tables call it.
        routing: "none" (plain LoRA of the total rank), "dense" (gate from the hidden state at the
            site) or "sae" (gate and rank from the site's features).
        router: "linear" or "mlp" (two layers, learnt), or "prototype": nothing learnt, each token
            goes to the specialist of the domain whose mean signal its own is nearest to.
        router_hidden: hidden width of "mlp".
        per_module: a router of its own for every adapted module, in place of one a site.
        specialists: E.
        active: specialists active at the start, the first ones; null: all. The memory policy
            (``continual.memory``) spawns others.
        rank: R of each specialist.
        alpha: the update is scaled by alpha / rank.
        top_k: specialists kept per token; as many as there are: a dense gate.
        temperature: of the gate's softmax.
        prototypes: a learnt gate is reweighted by the cosine of the signal to the domains'
            prototypes (domain d's goes to specialist d modulo E).
        whitened: "prototype" measures nearness where the signal varies alike in all directions
            within a domain; false: in the signal as it is.
        hard_gate: "prototype" keeps the nearest only; false: softmax of the cosines.
        margin: "prototype" leaves a token without any update where the cosines of the nearest two
            prototypes differ by less.
        null_specialist: "prototype" knows general text too, and leaves it without any update.
        dynamic_rank: learn a token-dependent rank mask.
        initial_rank: effective rank at initialisation, a fraction of ``rank``.
        hard_rank: outside training, rank components whose mask is below this are left out and
            not computed; 0: the soft mask.
        target_modules: linear layers that are adapted, by last name, by path inside a decoder
            layer, or by a pattern of either ("*_proj", "self_attn.*"); null: all.
        task, preservation, steering, gate_sparsity, rank_budget, load_balance, diversity: weights
            of the losses; preservation and steering need ``control.monitor``.
        orthogonality: weight of O-LoRA's loss in sequences: the arriving domain's specialist
            against the earlier ones (``continual.specialists=own``).
    """

    name: str = "sc_lora"
    routing: str = "sae"
    router: str = "linear"
    router_hidden: int = 256
    per_module: bool = False
    specialists: int = 4
    active: int | None = None
    rank: int = 16
    alpha: float = 16.0
    top_k: int = 2
    temperature: float = 1.0
    prototypes: bool = False
    whitened: bool = True
    hard_gate: bool = True
    margin: float = 0.05
    null_specialist: bool = True
    dynamic_rank: bool = True
    initial_rank: float = 0.75
    hard_rank: float = 0.0
    target_modules: list[str] | None = None
    task: float = 1.0
    preservation: float = 0.0
    steering: float = 0.0
    gate_sparsity: float = 0.0
    rank_budget: float = 0.0
    load_balance: float = 0.0
    diversity: float = 0.0
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        one_of("adapter.routing", self.routing, ("none", "dense", "sae"))
        one_of("adapter.router", self.router, ("linear", "mlp", "prototype"))
        positive(
            "adapter",
            specialists=self.specialists,
            rank=self.rank,
            alpha=self.alpha,
            router_hidden=self.router_hidden,
            active=self.active,
            top_k=self.top_k,
            temperature=self.temperature,
        )
        if (self.active or 0) > self.specialists:
            raise UserError(
                f"adapter.active={self.active} is more than adapter.specialists={self.specialists}"
            )
        if self.top_k > self.specialists:
            raise UserError(
                f"adapter.top_k={self.top_k} is more than adapter.specialists={self.specialists}"
            )
        if not 1 / self.rank <= self.initial_rank < 1 and self.dynamic_rank:
            raise UserError(
                f"adapter.initial_rank={self.initial_rank}: a fraction of the rank, at least "
                f"1/rank ({1 / self.rank:.3g}) and below 1"
            )
        if self.routing == "none" and self.dynamic_rank:
            raise UserError("adapter.dynamic_rank=true needs a router: set adapter.routing=sae")
        if self.router == "prototype" and (self.dynamic_rank or self.per_module or self.prototypes):
            raise UserError(
                "adapter.router=prototype learns nothing: set adapter.dynamic_rank, "
                "adapter.per_module and adapter.prototypes to false"
            )
        if self.router == "prototype" and self.routing == "none":
            raise UserError("adapter.router=prototype needs a signal: adapter.routing=sae or dense")
        if self.prototypes and self.routing != "sae":
            raise UserError("adapter.prototypes=true needs adapter.routing=sae")
        share("adapter", hard_rank=self.hard_rank)
        not_negative("adapter", margin=self.margin, **self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """{loss: its weight}."""
        names = ("task", "preservation", "steering", "gate_sparsity", "rank_budget")
        names = (*names, "load_balance", "diversity", "orthogonality")
        return {name: getattr(self, name) for name in names}

    @property
    def monitored(self) -> bool:
        """Whether a loss compares the adapted stream's features with the base's."""
        return bool(self.preservation or self.steering)


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """The health of routing during training (steerlora/methods/routed_lora/health.py).

    Attributes:
        log_every: steps between measurements.
        collapse: what to do when routing collapses in joint training: "ignore", "warn" or "stop".
            (In a sequence one domain at a time may well have one specialist.)
        collapse_below: usage entropy / log E below which it has collapsed.
    """

    log_every: int = 50
    collapse: str = "warn"
    collapse_below: float = 0.3

    def __post_init__(self) -> None:
        positive("routing", log_every=self.log_every)
        one_of("routing.collapse", self.collapse, ("ignore", "warn", "stop"))
        share("routing", collapse_below=self.collapse_below)


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """A change of the control signal.

    Attributes:
        name: "none", or one of the controls of ``steerlora.methods.routed_lora.interventions``.
        seed: of its draws.
        strength: from 0 (intact) to 1: how much of the intervened signal is mixed in.
        sites: control sites that it changes; empty: all.
        domains: domains whose tokens it changes; empty: all.
        phase: "evaluation" (the causal test of a trained adapter), or "training": the adapter is
            trained and evaluated under it (a retrained control).
    """

    name: str = "none"
    seed: int = 0
    strength: float = 1.0
    sites: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    phase: str = "evaluation"

    def __post_init__(self) -> None:
        share("intervention", strength=self.strength)
        one_of("intervention.phase", self.phase, ("evaluation", "training"))
