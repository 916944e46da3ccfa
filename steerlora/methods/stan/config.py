"""Configuration of sparse adaptation by units that act token by token (STAN); free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Interval

from steerlora.config.ranges import OneOf, Positive
from steerlora.errors import UserError
from steerlora.methods.config import MethodConfig, method

if TYPE_CHECKING:
    from torch import nn

    from steerlora.config import Config
    from steerlora.methods.base import Learner, Method, Sources

SELECTS = ("value", "absolute")
SCALES = ("1/k", "alpha/k")
ENCODERS = ("learnt", "frozen", "sae")
GATES = ("token", "static", "chosen", "threshold", "random", "shuffled")
REDRAWN = ("random", "shuffled")
"""Gates that draw, in every forward, which units act."""
UnitCount = Annotated[int, Interval(ge=1, le=2**17)]


@method("stan")
@dataclass(frozen=True, kw_only=True)
class StanConfig(MethodConfig):
    """y = W x + (1/k) D TopK_k(E x) at every adapted layer from the first site on.

    STAN, "The Chosen Few: Sparse Adaptation for Large Models" (OpenReview mkx3xkRBkw). Where
    ``units`` is the rank of a LoRA, it has as many parameters.
    """

    kind: str = "stan"
    """Registered name of the kind."""
    units: UnitCount = 64
    """m: rows of E and columns of D in every adapted layer, from 1."""
    k: UnitCount = 16
    """Units that act on each token, from 1 to ``units``."""
    select: Annotated[str, OneOf(SELECTS)] = "value"
    """Which k act: "value", the largest, and of these the positive ones; "absolute", the largest in
    magnitude, with their sign."""
    scale: Annotated[str, OneOf(SCALES)] = "1/k"
    """The update's factor: "1/k", as published, by which a larger k also takes smaller steps, or
    "alpha/k"."""
    alpha: Positive = 16.0
    """Of ``scale`` "alpha/k", above 0."""

    encoder: Annotated[str, OneOf(ENCODERS)] = "learnt"
    """What E is: "learnt"; "frozen", as it was drawn; "sae": the units are the latents of the
    site's frozen SAE, whose features of the stream take the place of E x at all layers that the
    site controls, divided by their mean norm; ``units`` is then the SAE's to say."""
    gate: Annotated[str, OneOf(GATES)] = "token"
    """Which units act: "token", the k that ``select`` means, token by token. The others are
    controls. "static": k units a layer that are drawn once. "chosen": token by token at first, and
    from ``chosen_after`` on the k that acted most. "threshold": ReLU(E x - t), with one t a layer
    that follows what lets k units act on the mean token. "random": as many as "token" has, drawn
    for each token in each forward; "shuffled": those of another real token of the batch. The last
    two keep the norm that the token's own units have, so that only which units act differs; where
    a forward has one token alone, as in cached decoding, "shuffled" changes nothing."""
    chosen_after: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Share of the steps after which "chosen" chooses, above 0 and below 1; in a sequence, of the
    first domain's."""
    gate_in_evaluation: Annotated[str, OneOf(("trained", *REDRAWN))] = "trained"
    """The gate of a trained adapter in evaluation: "trained", the one that it was trained with, or
    a control, "random" or "shuffled"."""

    has_units: ClassVar[bool] = True
    not_trained: ClassVar[frozenset[str]] = frozenset({"name", "gate_in_evaluation"})
    only_in_evaluation: ClassVar[tuple[str, ...]] = ("gate_in_evaluation",)

    @property
    def reads_features(self) -> bool:
        return self.encoder == "sae"

    @property
    def factor(self) -> float:
        """What the update is multiplied by."""
        return (self.alpha if self.scale == "alpha/k" else 1.0) / self.k

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.units:
            raise UserError(
                f"method.k={self.k} is more than method.units={self.units}: choose k from 1 to "
                f"{self.units}, or more units"
            )
        if self.gate == "threshold" and self.select == "absolute":
            raise UserError(
                "method.gate=threshold lets positive units act: set method.select=value"
            )
        if self.reads_features and (self.gate != "token" or self.select == "absolute"):
            raise UserError(
                "method.encoder=sae has the SAE say which units act: set method.gate=token and "
                "method.select=value"
            )
        if self.reads_features and self.gate_in_evaluation != "trained":
            raise UserError(
                "method.gate_in_evaluation draws among units of an encoder of the layer's own: "
                "set method.encoder=learnt or frozen, or method.gate_in_evaluation=trained"
            )

    def check(self, config: Config) -> None:
        super().check(config)
        active = getattr(config.sae, "k", None) or config.sae.latents
        if self.reads_features and self.k > active:
            raise UserError(
                f"method.k={self.k} is more than the {active} latents of the SAE that are active "
                f"on a token: choose k from 1 to {active}"
            )

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        from steerlora.methods.stan.adapter import Stan

        return Stan(model, self, sources, seed=seed).attach(model)

    def learner(self, method: Method, **settings: Any) -> Learner:
        from steerlora.methods.stan.learning import StanLearner

        return StanLearner(method=method, **settings)
