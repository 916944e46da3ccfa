"""What is run, followed and compared, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.config.checks import given, one_of, positive, share
from steerlora.errors import UserError

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
    "plan",
)
"""What ``stage=`` may name; all but the last three store an artifact."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Attributes: name: the stage to bring up to date, with whatever it needs."""

    name: str

    def __post_init__(self) -> None:
        one_of("stage.name", self.name, STAGES)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What ``stage=plan`` reckons with: hardware, and what only the text and a run can tell.

    Attributes:
        gpu: the GPU by name, such as "h100-80gb" (steerlora/distributed/devices.py lists them).
        gpus: how many, one rank each.
        mfu: share of a GPU's peak rate that trainings are taken to reach; an assumption, for the
            time only.
        tokens_per_row: mean of real tokens in a row; null: ``trainer.max_length``. Time only:
            memory is that of the longest rows.
        labelled: share of a row's tokens that the loss counts; 1, the worst case, is a batch of
            responses with hardly a prompt.
    """

    gpu: str = "h100-80gb"
    gpus: int = 1
    mfu: float = 0.4
    tokens_per_row: float | None = None
    labelled: float = 1.0

    def __post_init__(self) -> None:
        positive(
            "plan",
            gpus=self.gpus,
            mfu=self.mfu,
            tokens_per_row=self.tokens_per_row,
            labelled=self.labelled,
        )
        share("plan", mfu=self.mfu, labelled=self.labelled)


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
        one_of("logger.name", self.name, ("wandb", "none"))
        one_of("logger.mode", self.mode, ("offline", "online"))
        given("logger.dir", self.dir)


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
        seeds: seeds at the main model.
        scale_seeds: seeds at the other models.
        interventions: controls of the ablation.
        doses: strengths below 1 at which the ablation repeats them.
        retrained: controls under which the ablated method is trained anew.
        ablation_adapter: the method that is ablated.
        orders: orders of the sequences: options of ``order``, random_<seed>, permutation_<index>.
        sequential_adapters: methods trained in sequences.
        paper_method: the method that the paper's claims are about.
        baseline_method: plain LoRA, which forgetting is compared with.
        dense_method: ``paper_method`` with hidden states in place of SAE features.
        own_method: the project's own method.
        variants: {a method that is ``own_method`` with one thing changed: what is changed}.
        workers: stages built side by side, each in a process of its own.
    """

    name: str = "single"
    meaningful: bool = True
    models: list[str] = field(default_factory=list)
    main_model: str = ""
    adapters: list[str] = field(default_factory=list)
    scale_adapters: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    scale_seeds: list[int] = field(default_factory=lambda: [0])
    interventions: list[str] = field(default_factory=list)
    doses: list[float] = field(default_factory=list)
    retrained: list[str] = field(default_factory=list)
    ablation_adapter: str = "sc_lora"
    orders: list[str] = field(default_factory=list)
    sequential_adapters: list[str] = field(default_factory=list)
    paper_method: str
    baseline_method: str
    dense_method: str
    own_method: str
    variants: dict[str, str] = field(default_factory=dict)
    workers: int = 1

    def __post_init__(self) -> None:
        positive("study", workers=self.workers)
        for name in ("seeds", "scale_seeds"):
            if not getattr(self, name):
                raise UserError(f"study.{name}=[]: give at least one seed")
        for dose in self.doses:
            if not 0 < dose < 1:
                raise UserError(f"study.doses={self.doses}: give strengths above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ArtifactsConfig:
    """Attributes: root: folder of all artifacts."""

    root: str = "artifacts"

    def __post_init__(self) -> None:
        given("artifacts.root", self.root)


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Attributes: dir: folder of an experiment's tables, figures and claims."""

    dir: str = "results"

    def __post_init__(self) -> None:
        given("results.dir", self.dir)
