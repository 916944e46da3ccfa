"""How training and evaluation go: sequences, trainer, lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.config.checks import not_negative, one_of, positive
from steerlora.errors import UserError

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("single", "ddp", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """The order in which one adapter meets the domains.

    Attributes:
        name: what tables call it.
        kind: "broad_first", "broad_last", "random", "permutation" or "given" (``sequence``).
        sequence: the domains, for kind "given".
        seed: of a random order.
        index: of a permutation, among all of ``domains.names`` in lexicographic order of position.
        steps_per_domain: optimizer steps in each domain.
    """

    name: str = "broad_first"
    kind: str = "broad_first"
    sequence: list[str] = field(default_factory=list)
    seed: int = 0
    index: int = 0
    steps_per_domain: int = 100

    def __post_init__(self) -> None:
        one_of(
            "order.kind",
            self.kind,
            ("broad_first", "broad_last", "random", "permutation", "given"),
        )
        positive("order", steps_per_domain=self.steps_per_domain)
        not_negative("order", index=self.index)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How adapters train, and on what hardware everything trains.

    Attributes:
        max_steps: optimizer steps of adapter training.
        batch_size: conversations a step, over all ranks: each takes its part.
        max_length: tokens of a conversation; longer prompts lose their beginning.
        packing: fill rows of max_length with several conversations of a domain, none of which sees
            another; batch_size then counts rows.
        learning_rate, weight_decay, adam_epsilon: of AdamW.
        gradient_clip: largest gradient norm.
        warmup_fraction: share of the steps in which the learning rate rises.
        decay_fraction: share of the steps, the last ones, in which it falls linearly to zero.
        precision: "32-true", "bf16-mixed" or "16-mixed" (Lightning's names). What trains is float32
            in all of them; mixed, a base on a GPU has half the bits. SAEs are always float32.
        accelerator: Lightning's; "auto" takes what there is.
        strategy: how ranks share the work: "single" (one rank), "ddp" (each rank holds everything),
            "zero2" (optimizer and gradients are sharded), "zero3" (weights too). The number of
            ranks is the launcher's: torchrun's or srun's.
        offload: keep what ZeRO shards in the CPU's memory.
        persistent_elements: weights of at most so many values stay whole on every rank in zero3.
        accumulate: parts, one after the other, of a rank's part of the batch.
        activation_checkpointing: recompute activations in the backward; saves memory, costs time.
        compile: torch.compile the decoder's layers.
        checkpoint_seconds: time between checkpoints of unfinished training.
    """

    max_steps: int = 400
    batch_size: int = 32
    max_length: int = 128
    packing: bool = False
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.5
    precision: str = "32-true"
    accelerator: str = "cpu"
    strategy: str = "single"
    offload: bool = False
    persistent_elements: int = 1_000_000
    accumulate: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        positive(
            "trainer",
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            gradient_clip=self.gradient_clip,
            accumulate=self.accumulate,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        not_negative("trainer", persistent_elements=self.persistent_elements)
        one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        one_of("trainer.precision", self.precision, PRECISIONS)
        one_of("trainer.strategy", self.strategy, STRATEGIES)
        if self.offload and self.strategy not in ("zero2", "zero3"):
            raise UserError(
                f"trainer.offload=true: strategy {self.strategy} shards nothing that could be "
                "offloaded: use trainer=zero3_offload"
            )
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}: must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What lm-eval runs.

    Attributes:
        batch_size: sequences at once.
        limit: items of each task, of each of its parts if it is a group of lm-eval's; null: all.
        generation_items: the same for lm-eval's own tasks with long written answers.
        tasks: task names; null: all in force.
        max_length: tokens of context; null: the model's own.
        max_generated_tokens: tokens of a written answer; null: what its task says. In either case
            no more than half the context.
        groups: {average: tasks}, of lm-eval's registry or the domains', in place of the domains'
            own groups; empty: theirs. The domains' target tasks are scored besides.
        metrics: {task: "metric,filter"}: the one that is the task's score; it goes before what the
            domains say. Of a task that neither names, the first that lm-eval reports.
        shots: {task: solved examples before each item}; else what lm-eval's task says.
        files: {task: a .jsonl file with the columns of the task's data set on the hub, or a folder
            of one a split}, in place of the hub's; lm-eval's own tasks and groups only.
        spread: lay a model that does not train over all visible GPUs, in evaluation and in the
            stages that read it (activations, features, the SAE's quality).
    """

    batch_size: int = 128
    limit: int | None = None
    generation_items: int | None = 40
    tasks: list[str] | None = None
    max_length: int | None = 256
    max_generated_tokens: int | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    shots: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    spread: bool = False

    def __post_init__(self) -> None:
        positive(
            "evaluation",
            batch_size=self.batch_size,
            limit=self.limit,
            generation_items=self.generation_items,
            max_length=self.max_length,
            max_generated_tokens=self.max_generated_tokens,
        )
        not_negative("evaluation.shots", **self.shots)
        if "target" in self.groups:
            raise UserError(
                "evaluation.groups.target: the domains' own tasks have that name; choose another"
            )
        for task, key in self.metrics.items():
            if key.count(",") != 1:
                raise UserError(f"evaluation.metrics.{task}={key}: give metric,filter, as acc,none")
