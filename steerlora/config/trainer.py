"""How adapters are trained, and on what hardware."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, NotNegative, OneOf, Positive, Share
from steerlora.errors import UserError

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("single", "ddp", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section, key="trainer.validation"):
    """How an adapter's training is followed on conversations that it does not train on.

    They are taken out of the training rows, so that what is evaluated later has no part in any
    choice made here; an SAE that is trained here has read them, as all training rows. The loss is
    that of the answers' tokens, in nats a token.
    """

    rows: Annotated[int, Interval(ge=0, le=10**9)] = 0
    """Conversations of each domain that are set aside, evenly spaced, at most half of them; what is
    the same word for word is left out of training too. 0 measures nothing. At least 0."""

    every_steps: Count = 50
    """Optimizer steps between two measurements; there is one before the first step and one after
    the last. At least 1."""

    keep_best: bool = False
    """Whether training ends with the weights that had the lowest loss at a measurement, and not
    with the last ones."""

    patience: Count | None = None
    """Measurements in a row without a new lowest loss after which training ends. The learning rate
    follows ``max_steps`` all the same. At least 1; null trains to the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = {"keep_best=true": self.keep_best, f"patience={self.patience}": self.patience}
        for option in (name for name, value in idle.items() if value and not self.rows):
            raise UserError(
                f"trainer.validation.{option}: there is no loss to go by; set "
                "trainer.validation.rows=<conversations of each domain>, such as 64"
            )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Section, key="trainer"):
    """How adapters are trained, and the hardware on which everything is trained."""

    max_steps: Count = 400
    """Optimizer steps of joint adapter training. At least 1."""

    batch_size: Count = 32
    """Conversations in an optimizer step, over all ranks; each rank takes an equal part. With
    ``packing`` it counts rows. At least 1, and a multiple of the number of ranks times
    ``accumulate``."""

    max_length: Count = 128
    """Tokens of a conversation at most. Of a longer one the last answer loses its tail, its end of
    turn included, and then what comes before it its beginning; a warning says of how many. At least
    1."""

    drop_cut: bool = False
    """Whether conversations that do not fit whole are left out of adapter training."""

    last_turn_only: bool = False
    """Whether the loss counts the last answer of a conversation only, and not every answer."""

    packing: bool = False
    """Whether a row of ``max_length`` tokens is filled with several conversations of one domain,
    none of which attends to another."""

    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW. Greater than 0."""

    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW. At least 0."""

    adam_epsilon: Positive = 1e-6
    """Epsilon of AdamW, added to the denominator of its update. Greater than 0."""

    gradient_clip: Positive = 1.0
    """Norm to which a larger gradient is scaled down. Greater than 0."""

    warmup_fraction: Share = 0.05
    """Share of the steps, the first ones, in which the learning rate rises linearly to its peak.
    From 0 to 1."""

    decay_fraction: Share = 0.5
    """Share of the steps, the last ones, in which the learning rate falls linearly to 0. From 0 to
    1."""

    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The loss on conversations that are not trained on, while an adapter trains."""

    precision: Annotated[str, OneOf(PRECISIONS)] = "32-true"
    """"32-true", "bf16-mixed" or "16-mixed", Lightning's names. The weights that are trained are
    float32 in all three. Under a mixed precision, a base model on a GPU is stored in 16 bits. SAEs
    are always float32."""

    accelerator: Annotated[str, OneOf(ACCELERATORS)] = "cpu"
    """"auto", "cpu", "gpu", "cuda" or "mps", Lightning's names. "auto" takes what the machine
    has."""

    strategy: Annotated[str, OneOf(STRATEGIES)] = "single"
    """How ranks share the work: "single" (one rank), "ddp" (every rank holds the whole model),
    "zero2" (optimizer state and gradients are sharded) or "zero3" (weights too). The launcher,
    torchrun or srun, sets the number of ranks."""

    offload: bool = False
    """Whether what ZeRO shards is kept in the CPU's memory. Needs "zero2" or "zero3"."""

    persistent_elements: Annotated[int, Interval(ge=0, le=10**12)] = 1_000_000
    """Under "zero3", a weight tensor of at most this many elements stays whole on every rank. At
    least 0."""

    accumulate: Count = 1
    """Number of parts into which a rank splits its share of a batch. Their gradients are summed
    before the optimizer's step. At least 1."""

    activation_checkpointing: bool = False
    """Whether the backward pass computes activations again in place of storing them: less memory,
    more time."""

    compile: bool = False
    """Whether the decoder's layers are compiled with torch.compile."""

    checkpoint_seconds: Positive = 30.0
    """Seconds between two checkpoints of a training in progress. Greater than 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload and self.strategy not in ("zero2", "zero3"):
            raise UserError(
                f"trainer.offload=true: strategy {self.strategy} shards nothing that could be "
                "offloaded: use trainer=zero3_offload"
            )
