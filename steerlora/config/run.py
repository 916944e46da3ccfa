"""What is run, logged and compared, and where its outputs are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Interval, MinLen

from steerlora.config.checks import Section
from steerlora.config.ranges import (
    Distinct,
    Label,
    Location,
    Matches,
    Name,
    NotEmpty,
    OneOf,
    Positive,
    Seed,
    Share,
)
from steerlora.errors import UserError

WANDB_NAME = Matches(
    r"[^/\\#?%:\s](?:[^/\\#?%:\x00-\x1f]{0,126}[^/\\#?%:\s])?",
    "a name of W&B's: 1 to 128 characters, none of / \\ # ? % :",
)
Tag = Annotated[str, Matches(r"[^\x00-\x1f]{1,64}", "text of 1 to 64 characters")]
"""A tag of W&B's."""
Colour = Annotated[str, Matches(r"#[0-9A-Fa-f]{6}", 'a colour, such as "#0072B2"')]
"""A colour by its red, green and blue."""
Options = Annotated[list[Name], Distinct()]
"""Names of options, each once."""
Seeds = Annotated[list[Seed], MinLen(1), Distinct()]
"""Seeds of replicates, at least one, each once."""
INSIDE = Interval(gt=0, lt=1)
PART = Interval(gt=0, le=1)
PARTS = ("base", "sae", "adapter")
"""What a replicate of a study has of its own."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(Section, key="stage"):
    """The stage to bring up to date, with whatever it needs."""

    name: Name
    """Registered name of a stage, or "status", "runs", "compare", "plan" or "report"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the stage has of its own; it checks them itself."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Section, key="plan"):
    """What ``stage=plan`` assumes about the hardware and the text to estimate memory and time."""

    gpu: Name = "h100-80gb"
    """Name of the GPU, one of those in steerlora/distributed/devices.py."""

    gpus: Annotated[int, Interval(ge=1, le=2**20)] = 1
    """Number of GPUs, with one rank on each. At least 1."""

    mfu: Annotated[float, PART] = 0.4
    """Model FLOPs utilisation: the share of a GPU's peak rate that training is assumed to reach.
    Changes the estimated time only. Greater than 0, at most 1."""

    tokens_per_row: Positive | None = None
    """Mean number of real tokens in a row. Changes the estimated time only; memory is estimated
    for the longest rows. Greater than 0; null takes ``trainer.max_length``."""

    labelled: Annotated[float, PART] = 1.0
    """Share of a row's tokens that the loss counts. The default is the worst case, a batch of
    responses with hardly a prompt. Greater than 0, at most 1."""


@dataclass(frozen=True, kw_only=True)
class LoggerConfig(Section, key="logger"):
    """Logging to Weights & Biases."""

    name: Annotated[str, OneOf(("wandb", "none"))] = "wandb"
    """"wandb", or "none" for no logging. Nothing else depends on it."""

    mode: Annotated[str, OneOf(("offline", "online"))] = "offline"
    """"offline" (no account and no network) or "online"."""

    project: Annotated[str, WANDB_NAME] = "steerlora"
    """W&B project."""

    entity: Annotated[str, WANDB_NAME] | None = None
    """W&B user or team. Null takes the account's default."""

    tags: Annotated[list[Tag], Distinct()] = field(default_factory=list)
    """W&B tags of every run."""

    group: Label = ""
    """W&B group that the stages of this run are listed under. Empty, or "single": none. A sweep
    over a stage gives its own name."""

    varied: Annotated[list[NotEmpty], Distinct()] = field(default_factory=list)
    """Keys of the configuration, such as "method.rank", whose values W&B runs are named after. A
    sweep gives those that it varies. Empty: model, method and seed."""

    dir: Location = "outputs"
    """Folder that W&B writes its runs to. Not empty."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Section, key="study"):
    """What an experiment compares. Names are options of the config groups."""

    name: Name = "single"
    """Name of the experiment and title of its report. "single" is no experiment."""

    meaningful: bool = True
    """Whether the results may be read as results. False labels every table and figure of the
    report as a trial run."""

    stage: Label = ""
    """Stage whose artifacts the experiment is about, and which writes its report. Empty: the
    comparison that the keys below say."""

    settings: dict[str, Any] = field(default_factory=dict)
    """What that stage has of its own, as ``stage.settings`` for the stage alone."""

    models: Options = field(default_factory=list)
    """Base models to compare, the scale axis."""

    main_model: Label = ""
    """Base model of the ablation and of the sequences, and the only one of ``models`` that is
    trained with all ``methods`` and ``seeds``. By default the one that ``model`` is; where that is
    none of ``models``, or ``model.path`` gives all of them one base, the others are left out."""

    methods: Options = field(default_factory=list)
    """Methods to compare on the main model."""

    scale_methods: Options = field(default_factory=list)
    """Methods to compare on the other models."""

    seeds: Seeds = field(default_factory=lambda: [0])
    """Seeds of the replicates on the main model. At least one, each once."""

    scale_seeds: Seeds = field(default_factory=lambda: [0])
    """Seeds of the replicates on the other models. At least one, each once."""

    vary: Annotated[list[Annotated[str, OneOf(PARTS)]], MinLen(1), Distinct()] = field(
        default_factory=lambda: [*PARTS]
    )
    """What a replicate makes anew from its seed, initialisation and data order alike: "base" (one
    that is pretrained here), "sae", "adapter". The others have the first seed in all replicates.
    At least one."""

    interventions: Options = field(default_factory=list)
    """Interventions of the causal ablation. Empty runs none in an experiment; ``stage=`` alone
    runs all."""

    doses: Annotated[list[Annotated[float, INSIDE]], Distinct()] = field(default_factory=list)
    """Strengths, besides 1, at which the ablation repeats each intervention. Above 0 and below
    1."""

    retrained: Options = field(default_factory=list)
    """Interventions under which the ablated method is trained again, as retrained controls."""

    ablation_method: Name = "sc_lora"
    """Method of the causal ablation. It must have a control signal."""

    orders: Options = field(default_factory=list)
    """Orders of the sequences: options of ``order``, ``random_<seed>``, ``permutation_<index>`` or
    ``listed_<name>``."""

    sequential_methods: Options = field(default_factory=list)
    """Methods that are trained on each of the sequences."""

    paper_method: Name
    """Method that the paper's claims are about."""

    baseline_method: Name
    """Plain LoRA, which forgetting is compared with."""

    dense_method: Name
    """``paper_method`` with hidden states in place of SAE features."""

    own_method: Name
    """The project's own method."""

    variants: dict[str, NotEmpty] = field(default_factory=dict)
    """{a method that is ``own_method`` with one thing changed: what is changed}."""

    objective: NotEmpty = "average/target"
    """Figure of the stage, by its name in W&B's summary, that a job gives to a sweeper of Hydra's
    that searches, such as Optuna's. Not empty."""

    colours: dict[str, Colour] = field(default_factory=dict)
    """{method: its colour in every figure}, such as "#0072B2". Methods that are not named get one
    of their own, which may differ between reports."""

    least_general: Share | None = None
    """General knowledge, from 0 to 1, that every base should have; the report names those that
    have less. Null names none."""

    calibrate: Annotated[list[Annotated[int, Interval(ge=2)]], Distinct()] = field(
        default_factory=list
    )
    """Numbers of replicates of smaller studies, drawn from this one's, whose intervals and verdicts
    the report compares with the replicates that they leave out. Each at least 2 and less than the
    number of ``seeds``. Empty compares none."""

    calibration: Location | None = None
    """``calibration.json`` of a study with ``calibrate``, from which the report says how often
    studies of this size came to a claim's verdict. Null, or a file that is not there: it does
    not."""

    workers: Annotated[int, Interval(ge=1, le=1000)] = 1
    """Number of stages that are built at the same time, each in a process of its own. At least
    1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.methods and not self.models and self.name != "single":
            raise UserError(
                f"study.models=[]: give the models that study.methods={self.methods} are compared "
                "on, or study.methods=[] too"
            )
        for size in self.calibrate:
            if size >= len(self.seeds):
                raise UserError(
                    f"study.calibrate={self.calibrate}: give numbers from 2 to "
                    f"{len(self.seeds) - 1}, so that some of study.seeds={self.seeds} is left out"
                )


@dataclass(frozen=True, kw_only=True)
class ArtifactsConfig(Section, key="artifacts"):
    """Where artifacts are stored."""

    root: Location = "artifacts"
    """Folder of all artifacts. Made if it does not exist; not empty."""


@dataclass(frozen=True, kw_only=True)
class ResultsConfig(Section, key="results"):
    """Where an experiment writes its report."""

    dir: Location = "results"
    """Folder of the tables, figures, claims and provenance. Made if it does not exist; not
    empty."""
