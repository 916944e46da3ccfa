"""The typed configuration: what every key means, its unit, and what it may be.

Hydra composes YAML; :func:`from_tree` turns the result into these dataclasses once, at the door.
Everything behind it sees plain frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from steerlora.errors import UserError, nearest

STAGES = (
    "domains",
    "base",
    "activations",
    "sae_training",
    "features",
    "adapter_training",
    "evaluate",
    "causal_ablation",
    "sequential_forgetting",
    "report",
    "status",
)
"""What ``stage=`` may name; all but the last two store an artifact."""

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
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


def _positive(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"{owner}.{name}={value}: must be greater than 0")


def _one_of(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value}: {nearest(value, choices)}")


def _given(key: str, folder: str) -> None:
    # An empty path is the current folder, which would fill with artifacts.
    if not folder.strip():
        raise UserError(f"{key} is empty: give a folder, {key}=<folder>")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Attributes: name: the stage to bring up to date, with whatever it needs."""

    name: str

    def __post_init__(self) -> None:
        _one_of("stage.name", self.name, STAGES)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: one to load (``path``) or one to pretrain here (the sizes below).

    Attributes:
        name: what tables call it.
        path: Hugging Face directory or hub id; null pretrains a small Qwen3 on the domains.
        revision: hub revision of ``path``.
        layers, width, heads, kv_heads, head_width, ffn_width: shape of the model pretrained here.
        vocabulary: entries of a byte-level BPE tokenizer (text domains only).
        control_sites: default of ``control.sites``, about 3/8 of the depth.
        sae_latents: default of ``sae.latents``.
        steps, batch_size, learning_rate: of the pretraining here (steps; documents; AdamW).
        prompt_weight: of prompt tokens in the pretraining loss; responses weigh 1.
        seed: of the pretraining here.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    ffn_width: int = 384
    vocabulary: int = 2048
    control_sites: list[int] = field(default_factory=lambda: [1])
    sae_latents: int = 512
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    prompt_weight: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(
            "model",
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            ffn_width=self.ffn_width,
            vocabulary=self.vocabulary,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            prompt_weight=self.prompt_weight,
        )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class DomainsConfig:
    """The domains' text.

    Attributes:
        name: what tables call it.
        kind: "micro" (generated) or "text" (a folder of jsonl files).
        dir: the folder, for kind "text": ``<domain>_train.jsonl`` with prompt and response.
        names: the domains, in order; for kind "micro" the five of the world.
        broad: the broad domain, which the orders put first or last.
        train_items: rows for adapter training, per domain (at most, for "text").
        evaluation_items: items of each evaluation set (at most, for "text").
        seed: of the generated world, or of the split of the text.
    """

    name: str = "micro"
    kind: str = "micro"
    dir: str | None = None
    names: list[str] = field(
        default_factory=lambda: ["instruction", "math", "code", "medicine", "law"]
    )
    broad: str = "instruction"
    train_items: int = 2000
    evaluation_items: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("domains.kind", self.kind, ("micro", "text"))
        _positive("domains", train_items=self.train_items, evaluation_items=self.evaluation_items)
        if len(set(self.names)) != len(self.names) or not self.names:
            raise UserError(f"domains.names={self.names}: name each domain once")
        _one_of("domains.broad", self.broad, self.names)


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A TopK sparse autoencoder of the control site's activations.

    Attributes:
        path: a trained SAE to use (SAELens layout); null trains one.
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
        _positive(
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
    """

    sites: list[int] = field(default_factory=lambda: [1])
    context: str = "token"
    decay: float = 0.9

    def __post_init__(self) -> None:
        _one_of("control.context", self.context, ("token", "causal_mean", "ema"))
        if not 0 < self.decay < 1:
            raise UserError(f"control.decay={self.decay}: must be above 0 and below 1")
        if not self.sites or sorted(set(self.sites)) != list(self.sites) or min(self.sites) < 0:
            raise UserError(f"control.sites={self.sites}: give layers in rising order, each once")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """How features are sorted into general ones and domains' own (stage ``features``).

    Attributes:
        general_quantile: a general feature's frequency is at or above this quantile.
        largest_variation: its coefficient of variation over domains at most this.
        domain_quantile: a domain's own feature stands out from the other domains at or above this
            quantile.
        least: features of each sort at least (an eighth of ``sae.latents`` at most).
        shown: strongest features listed for each domain.
        examples: tokens in context listed for each of them.
    """

    general_quantile: float = 0.7
    largest_variation: float = 0.8
    domain_quantile: float = 0.8
    least: int = 64
    shown: int = 8
    examples: int = 5

    def __post_init__(self) -> None:
        for name in ("general_quantile", "domain_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"features.{name}={getattr(self, name)}: must be from 0 to 1")
        _positive("features", shown=self.shown, examples=self.examples)
        if self.least < 0 or self.largest_variation < 0:
            raise UserError("features.least and features.largest_variation must not be negative")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter; all methods share one layer class and one total rank, specialists * rank.

    Attributes:
        name: what tables call it.
        routing: "none" (plain LoRA of the total rank), "dense" (gate from the hidden state at the
            site) or "sae" (gate and rank from the site's features).
        specialists: E.
        rank: R of each specialist.
        alpha: the update is scaled by alpha / rank.
        top_k: specialists kept per token.
        temperature: of the gate's softmax.
        dynamic_rank: learn a token-dependent rank mask.
        initial_rank: effective rank at initialisation, a fraction of ``rank``.
        target_modules: linear layers that are adapted, by last name.
        gate_sparsity, rank_budget, load_balance, diversity: weights of the auxiliary losses.
    """

    name: str = "sc_lora"
    routing: str = "sae"
    specialists: int = 4
    rank: int = 16
    alpha: float = 16.0
    top_k: int = 2
    temperature: float = 1.0
    dynamic_rank: bool = True
    initial_rank: float = 0.75
    target_modules: list[str] = field(default_factory=lambda: list(QWEN3_LINEAR))
    gate_sparsity: float = 0.0
    rank_budget: float = 0.0
    load_balance: float = 0.0
    diversity: float = 0.0

    def __post_init__(self) -> None:
        _one_of("adapter.routing", self.routing, ("none", "dense", "sae"))
        _positive(
            "adapter",
            specialists=self.specialists,
            rank=self.rank,
            alpha=self.alpha,
            top_k=self.top_k,
            temperature=self.temperature,
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
        for name in ("gate_sparsity", "rank_budget", "load_balance", "diversity"):
            if getattr(self, name) < 0:
                raise UserError(f"adapter.{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """A change of the control signal while ``stage=evaluate`` scores the adapter.

    Attributes:
        name: "none", or one of the controls of ``steerlora.models.interventions``.
        seed: of its draws.
    """

    name: str = "none"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """The order in which one adapter meets the domains.

    Attributes:
        name: what tables call it.
        kind: "broad_first", "broad_last", "random", or "given" (``sequence``).
        sequence: the domains, for kind "given".
        seed: of a random order.
        steps_per_domain: optimizer steps in each domain.
    """

    name: str = "broad_first"
    kind: str = "broad_first"
    sequence: list[str] = field(default_factory=list)
    seed: int = 0
    steps_per_domain: int = 100

    def __post_init__(self) -> None:
        _one_of("order.kind", self.kind, ("broad_first", "broad_last", "random", "given"))
        _positive("order", steps_per_domain=self.steps_per_domain)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How adapters train, and on what hardware everything trains.

    Attributes:
        max_steps: optimizer steps of adapter training.
        batch_size: conversations a step.
        max_length: tokens of a conversation; longer prompts lose their beginning.
        learning_rate, weight_decay, adam_epsilon: of AdamW.
        gradient_clip: largest gradient norm.
        warmup_fraction: share of the steps in which the learning rate rises.
        decay_fraction: share of the steps, the last ones, in which it falls linearly to zero.
        precision: Lightning's name, such as "32-true" or "bf16-mixed".
        accelerator: Lightning's.
        checkpoint_seconds: time between checkpoints of unfinished training.
    """

    max_steps: int = 400
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.5
    precision: str = "32-true"
    accelerator: str = "cpu"
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        _positive(
            "trainer",
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            gradient_clip=self.gradient_clip,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        _one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        _one_of("trainer.precision", self.precision, PRECISIONS)
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}: must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What lm-eval runs.

    Attributes:
        batch_size: sequences at once.
        limit: items of each task; null: all.
        generation_items: items of lm-eval's own gsm8k and ifeval, where long answers are generated.
        tasks: task names; null: all that the domains bring.
        max_length: tokens of context.
    """

    batch_size: int = 128
    limit: int | None = None
    generation_items: int = 40
    tasks: list[str] | None = None
    max_length: int = 256

    def __post_init__(self) -> None:
        _positive(
            "evaluation",
            batch_size=self.batch_size,
            limit=self.limit,
            generation_items=self.generation_items,
            max_length=self.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Weights & Biases.

    Attributes:
        name: "wandb", or "none" for no logging; nothing else depends on it.
        mode: "offline" (no account, no network) or "online".
        project, entity, tags: W&B's.
        group: W&B's group of this run's stages.
        dir: folder of offline runs.
    """

    name: str = "wandb"
    mode: str = "offline"
    project: str = "steerlora"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    group: str = ""
    dir: str = "outputs"

    def __post_init__(self) -> None:
        _one_of("logger.name", self.name, ("wandb", "none"))
        _one_of("logger.mode", self.mode, ("offline", "online"))
        _given("logger.dir", self.dir)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What an experiment compares. Names are options of the config groups.

    Attributes:
        name: the experiment; the report's title.
        meaningful: false labels every table and figure of the report as a trial run.
        models: the scale axis.
        main_model: the model of the ablation and of the sequences.
        adapters: methods compared at the main model.
        scale_adapters: methods trained at the other models.
        seeds: seeds at the main model; the other models use the first.
        interventions: controls of the ablation.
        ablation_adapter: the method that is ablated.
        orders: orders of the sequences.
        sequential_adapters: methods carried through the sequences.
        workers: stages built side by side, each in a process of its own.
    """

    name: str = "single"
    meaningful: bool = True
    models: list[str] = field(default_factory=list)
    main_model: str = ""
    adapters: list[str] = field(default_factory=list)
    scale_adapters: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    interventions: list[str] = field(default_factory=list)
    ablation_adapter: str = "sc_lora"
    orders: list[str] = field(default_factory=list)
    sequential_adapters: list[str] = field(default_factory=list)
    workers: int = 1

    def __post_init__(self) -> None:
        _positive("study", workers=self.workers)
        if not self.seeds:
            raise UserError("study.seeds=[]: give at least one seed")


@dataclass(frozen=True, kw_only=True)
class ArtifactsConfig:
    """Attributes: root: folder of all artifacts."""

    root: str = "artifacts"

    def __post_init__(self) -> None:
        _given("artifacts.root", self.root)


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Attributes: dir: folder of an experiment's tables, figures and claims."""

    dir: str = "results"

    def __post_init__(self) -> None:
        _given("results.dir", self.dir)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole.

    Attributes:
        stage: the stage to run; null with an experiment.
        seed: of adapters, their data order and the interventions' draws. Domains, base and SAE have
            seeds of their own, so that a sweep over this one trains them once.
    """

    stage: StageConfig | None = None
    model: ModelConfig
    domains: DomainsConfig
    sae: SAEConfig
    control: ControlConfig
    features: FeaturesConfig
    adapter: AdapterConfig
    intervention: InterventionConfig
    order: OrderConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    logger: LoggerConfig
    study: StudyConfig
    artifacts: ArtifactsConfig
    results: ResultsConfig
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model.path is None and max(self.control.sites) >= self.model.layers:
            raise UserError(
                f"control.sites={self.control.sites}: {self.model.name} has layers 0 to "
                f"{self.model.layers - 1}"
            )
        if self.model.path is None:
            for name in self.adapter.target_modules:
                _one_of("adapter.target_modules", name, QWEN3_LINEAR)
        if self.domains.kind == "text" and not self.domains.dir:
            raise UserError("domains.dir is not set: domains.dir=<folder of <domain>_train.jsonl>")
        if self.order.kind == "given" and sorted(self.order.sequence) != sorted(self.domains.names):
            raise UserError(
                f"order.sequence={self.order.sequence}: name each domain once, of "
                f"{', '.join(self.domains.names)}"
            )


GROUPS: dict[str, type] = {
    "stage": StageConfig,
    "model": ModelConfig,
    "domains": DomainsConfig,
    "sae": SAEConfig,
    "control": ControlConfig,
    "features": FeaturesConfig,
    "adapter": AdapterConfig,
    "intervention": InterventionConfig,
    "order": OrderConfig,
    "trainer": TrainerConfig,
    "evaluation": EvaluationConfig,
    "logger": LoggerConfig,
    "study": StudyConfig,
    "artifacts": ArtifactsConfig,
    "results": ResultsConfig,
}
"""The sections of a configuration and their types."""
