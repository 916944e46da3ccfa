"""Configuration of LoRA around frozen sparse autoencoders; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Interval

from steerlora.config.ranges import OneOf, Positive
from steerlora.errors import UserError
from steerlora.methods.config import MethodConfig, method

if TYPE_CHECKING:
    from torch import nn

    from steerlora.config import Config
    from steerlora.methods.base import Method, Sources
    from steerlora.methods.spliced_lora.learning import SplicedLearner

ADAPTED = ("after", "all", "none")
DICTIONARIES = ("sae", "random", "noise")
OBJECTIVES = ("divergence", "cross_entropy")
TEACHERS = ("base", "shuffled")
TEXTS = ("saes", "domains")
Rank = Annotated[int, Interval(ge=1, le=2**14)]


@method("spliced_lora")
@dataclass(frozen=True, kw_only=True)
class SplicedLoRAConfig(MethodConfig):
    """LoRA that makes up for the reconstructions of SAEs, which stand in place of the streams that
    enter the sites."""

    kind: str = "spliced_lora"
    """Registered name of the kind."""
    adapted: Annotated[str, OneOf(ADAPTED)] = "after"
    """Layers that have LoRA: "after", those from the first site on; "all"; or "none", with a map
    alone."""
    rank: Rank = 16
    """R, from 1."""
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of LoRA's inputs that are dropped in training, from 0 and below 1. Published: 0.1."""
    map_rank: Rank | None = None
    """Rank, from 1, of a linear map of what each SAE writes, x + B A x + b; null: there is none."""
    dictionary: Annotated[str, OneOf(DICTIONARIES)] = "sae"
    """What the stream is replaced by: "sae", its reconstruction; as controls "random", that of an
    untrained SAE of the same shape, or "noise", the stream and an error as long as the SAE's, in a
    direction drawn anew for every token in every forward."""
    objective: Annotated[str, OneOf(OBJECTIVES)] = "divergence"
    """What is minimised: "divergence", KL(base || method); or as a control "cross_entropy" of the
    next token, the streams left as they are."""
    teacher: Annotated[str, OneOf(TEACHERS)] = "base"
    """Whose predictions "divergence" is from: "base", the base's on this text; or as a control
    "shuffled", the base's on another row of the batch."""
    text: Annotated[str, OneOf(TEXTS)] = "saes"
    """What joint training reads: "saes", what SAEs learn from, the domains' rows and as much
    general text as of one domain; or "domains", their rows alone."""
    cached_tokens: Annotated[int, Interval(ge=0, le=10**12)] = 0
    """Training tokens, from 0, whose stream above the first SAE and whose final hidden state of the
    base are kept from their first epoch on, 2 D numbers each; the layers below then run once for
    each. Resumed training equals an unbroken one up to rounding. 0: nothing is kept."""
    spliced: bool = True
    """Whether the SAEs are in place in evaluation; false: the adapter alone."""

    reads_features: ClassVar[bool] = True
    splices: ClassVar[bool] = True
    not_trained: ClassVar[frozenset[str]] = frozenset({"name", "spliced", "cached_tokens"})
    only_in_evaluation: ClassVar[tuple[str, ...]] = ("spliced",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapted == "none" and self.map_rank is None:
            raise UserError(
                "method.adapted=none leaves nothing to train: set method.map_rank=<rank>, or "
                "method.adapted to after or all"
            )
        if self.cached_tokens and self.adapted == "all":
            raise UserError(
                "method.adapted=all changes the layers below the SAEs in every step, so nothing of "
                "them can be kept: set method.cached_tokens=0, or method.adapted=after"
            )
        if self.cached_tokens and self.dictionary == "noise":
            raise UserError(
                "method.dictionary=noise is drawn anew in every step: set method.cached_tokens=0"
            )
        if self.cached_tokens and self.objective == "cross_entropy":
            raise UserError(
                "method.objective=cross_entropy has no SAE and no teacher to keep anything of: set "
                "method.cached_tokens=0"
            )
        if self.teacher != "base" and self.objective == "cross_entropy":
            raise UserError(
                f"method.teacher={self.teacher}: method.objective=cross_entropy has none; set it "
                "to base"
            )

    @property
    def learns_sae_text(self) -> bool:
        return self.text == "saes"

    def check(self, config: Config) -> None:
        super().check(config)
        width = config.model.width
        for key, rank in {"rank": self.rank, "map_rank": self.map_rank or 0}.items():
            if rank > width:
                raise UserError(
                    f"method.{key}={rank} is more than model.width={width}: an update of the "
                    "stream has no higher rank"
                )
        if len(config.sae.streams(0)) > 1:
            raise UserError(
                f"sae.architecture={config.sae.architecture} writes another stream than it reads: "
                f"method={self.name} needs an SAE that reconstructs what it reads"
            )
        trainer = config.trainer
        if self.teacher == "shuffled" and trainer.batch_size < 2 * trainer.accumulate:
            raise UserError(
                "method.teacher=shuffled takes another row of the same part of a batch: set "
                f"trainer.batch_size to at least {2 * trainer.accumulate}"
            )

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        from steerlora.methods.spliced_lora.adapter import SplicedLoRA

        return SplicedLoRA.of(model, self, sources, seed)

    def learner(self, method: Method, **settings) -> SplicedLearner:
        from steerlora.methods.spliced_lora.learning import SplicedLearner

        return SplicedLearner(method=method, **settings)
