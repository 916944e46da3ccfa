"""What is run, logged and compared, and where its outputs are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from steerlora.config.checks import given, one_of, positive, share
from steerlora.errors import UserError

PARTS = ("base", "sae", "adapter")
"""What a replicate of a study has of its own."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The stage to bring up to date, with whatever it needs."""

    name: str
    """Registered name of a stage, or "status", "runs", "compare", "plan" or "report"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the stage has of its own; it checks them itself."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What ``stage=plan`` assumes about the hardware and the text to estimate memory and time."""

    gpu: str = "h100-80gb"
    """Name of the GPU, one of those in steerlora/distributed/devices.py."""

    gpus: int = 1
    """Number of GPUs, with one rank on each. At least 1."""

    mfu: float = 0.4
    """Model FLOPs utilisation: the share of a GPU's peak rate that training is assumed to reach.
    Changes the estimated time only. Greater than 0, at most 1."""

    tokens_per_row: float | None = None
    """Mean number of real tokens in a row. Changes the estimated time only; memory is estimated
    for the longest rows. Greater than 0; null takes ``trainer.max_length``."""

    labelled: float = 1.0
    """Share of a row's tokens that the loss counts. The default is the worst case, a batch of
    responses with hardly a prompt. Greater than 0, at most 1."""

    def __post_init__(self) -> None:
        positive("plan", self, "gpus mfu tokens_per_row labelled")
        share("plan", self, "mfu labelled")


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Logging to Weights & Biases."""

    name: str = "wandb"
    """"wandb", or "none" for no logging. Nothing else depends on it."""

    mode: str = "offline"
    """"offline" (no account and no network) or "online"."""

    project: str = "steerlora"
    """W&B project."""

    entity: str | None = None
    """W&B user or team. Null takes the account's default."""

    tags: list[str] = field(default_factory=list)
    """W&B tags of every run."""

    group: str = ""
    """W&B group that the stages of this run are listed under. Empty, or "single": none. A sweep
    over a stage gives its own name."""

    varied: list[str] = field(default_factory=list)
    """Keys of the configuration, such as "method.rank", whose values W&B runs are named after. A
    sweep gives those that it varies. Empty: model, method and seed."""

    dir: str = "outputs"
    """Folder that W&B writes its runs to. Not empty."""

    def __post_init__(self) -> None:
        one_of("logger.name", self.name, ("wandb", "none"))
        one_of("logger.mode", self.mode, ("offline", "online"))
        given("logger.dir", self.dir)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What an experiment compares. Names are options of the config groups."""

    name: str = "single"
    """Name of the experiment and title of its report. "single" is no experiment."""

    meaningful: bool = True
    """Whether the results may be read as results. False labels every table and figure of the
    report as a trial run."""

    models: list[str] = field(default_factory=list)
    """Base models to compare, the scale axis."""

    main_model: str = ""
    """Base model of the ablation and of the sequences. The only one of ``models`` that is trained
    with all ``methods`` and ``seeds``."""

    methods: list[str] = field(default_factory=list)
    """Methods to compare on the main model."""

    scale_methods: list[str] = field(default_factory=list)
    """Methods to compare on the other models."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the replicates on the main model. At least one, each once."""

    scale_seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the replicates on the other models. At least one, each once."""

    vary: list[str] = field(default_factory=lambda: [*PARTS])
    """What a replicate makes anew from its seed, initialisation and data order alike: "base" (one
    that is pretrained here), "sae", "adapter". The others have the first seed in all replicates.
    At least one."""

    interventions: list[str] = field(default_factory=list)
    """Interventions of the causal ablation. Empty runs none in an experiment; ``stage=`` alone
    runs all."""

    doses: list[float] = field(default_factory=list)
    """Strengths, besides 1, at which the ablation repeats each intervention. Above 0 and below
    1."""

    retrained: list[str] = field(default_factory=list)
    """Interventions under which the ablated method is trained again, as retrained controls."""

    ablation_method: str = "sc_lora"
    """Method of the causal ablation. It must have a control signal."""

    orders: list[str] = field(default_factory=list)
    """Orders of the sequences: options of ``order``, ``random_<seed>`` or
    ``permutation_<index>``."""

    sequential_methods: list[str] = field(default_factory=list)
    """Methods that are trained on each of the sequences."""

    paper_method: str
    """Method that the paper's claims are about."""

    baseline_method: str
    """Plain LoRA, which forgetting is compared with."""

    dense_method: str
    """``paper_method`` with hidden states in place of SAE features."""

    own_method: str
    """The project's own method."""

    variants: dict[str, str] = field(default_factory=dict)
    """{a method that is ``own_method`` with one thing changed: what is changed}."""

    least_general: float | None = None
    """General knowledge, from 0 to 1, that every base should have; the report names those that
    have less. Null names none."""

    calibrate: list[int] = field(default_factory=list)
    """Numbers of replicates of smaller studies, drawn from this one's, whose intervals and verdicts
    the report compares with the replicates that they leave out. Each at least 2 and less than the
    number of ``seeds``. Empty compares none."""

    calibration: str | None = None
    """``calibration.json`` of a study with ``calibrate``, from which the report says how often
    studies of this size came to a claim's verdict. Null, or a file that is not there: it does
    not."""

    workers: int = 1
    """Number of stages that are built at the same time, each in a process of its own. At least
    1."""

    def __post_init__(self) -> None:
        positive("study", self, "workers")
        for name in ("seeds", "scale_seeds"):
            seeds = getattr(self, name)
            if not seeds:
                raise UserError(f"study.{name}=[]: give at least one seed")
            if len(set(seeds)) < len(seeds):
                raise UserError(f"study.{name}={seeds}: give each seed once")
        if not self.vary:
            raise UserError(f"study.vary=[]: give some of {', '.join(PARTS)}")
        for part in self.vary:
            one_of("study.vary", part, PARTS)
        if self.least_general is not None:
            share("study", self, "least_general")
        for size in self.calibrate:
            if not 2 <= size < len(self.seeds):
                raise UserError(
                    f"study.calibrate={self.calibrate}: give numbers from 2 to "
                    f"{len(self.seeds) - 1}, so that some of study.seeds={self.seeds} is left out"
                )
        for dose in self.doses:
            if not 0 < dose < 1:
                raise UserError(f"study.doses={self.doses}: give strengths above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ArtifactsConfig:
    """Where artifacts are stored."""

    root: str = "artifacts"
    """Folder of all artifacts. Made if it does not exist; not empty."""

    def __post_init__(self) -> None:
        given("artifacts.root", self.root)


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Where an experiment writes its report."""

    dir: str = "results"
    """Folder of the tables, figures, claims and provenance. Made if it does not exist; not
    empty."""

    def __post_init__(self) -> None:
        given("results.dir", self.dir)
