"""What every method's configuration has, and what stages ask of it; free of torch.

``METHODS`` holds one configuration class a kind of method: ``@method("kind")``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Interval, MinLen

from steerlora.config.checks import Section, one_of
from steerlora.config.ranges import Count, Distinct, Label, Layer, NotEmpty, OneOf
from steerlora.errors import UserError
from steerlora.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from steerlora.config import Config
    from steerlora.methods.base import DomainRouter, Learner, Method, Sources

METHODS: Registry[type[MethodConfig]] = Registry(
    "method.kind", "steerlora.methods.*.config", "steerlora.methods.*"
)
method = METHODS.register

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


REPLAYS = ("steps", "rows")


def follows(key: str) -> dict[str, str]:
    """Metadata of a field that is by default what another key of the configuration is."""
    return {"interpolation": f"${{{key}}}"}


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Section, key="method.replay"):
    """Text of earlier domains among a domain's own, in a sequence."""

    ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the steps that repeat a batch, or of the rows that every batch gains, from 0 and
    below 1."""
    batches: Count = 128
    """Batches of each domain that are kept for it, from 1."""
    how: Annotated[str, OneOf(REPLAYS)] = "steps"
    """"steps": a step repeats a batch of an earlier domain and has none of the domain's own;
    "rows": every batch gains rows of all domains so far, as published."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, key="method.optimizer"):
    """How AdamW goes through a method's training, beside what ``trainer`` says."""

    constant_rate: bool = False
    """Whether the learning rate is ``trainer.learning_rate`` in every step, as published; otherwise
    it rises and falls by ``trainer.warmup_fraction`` and ``trainer.decay_fraction``."""
    over_domains: bool = False
    """Whether one optimizer goes through all domains of a sequence, as published; otherwise each
    domain begins with a fresh one."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Section, key="method"):
    """One method: what trains on a frozen base model, and how.

    A kind of method is a subclass, registered by ``@method("kind")``; the package's own are in
    ``methods/<kind>/config.py``. It says by its properties what stages have to know (capabilities),
    and builds the method.
    """

    kind: str = ""
    """Registered name of the kind."""
    name: Label = ""
    """What tables call it."""
    sites: Annotated[list[Layer], MinLen(1), Distinct()] = field(
        default_factory=lambda: [1], metadata=follows("model.control_sites")
    )
    """Control sites: layers whose incoming stream the method reads or changes, in rising order.
    Nothing below the first is adapted."""
    monitor: Layer | None = None
    """Layer whose incoming stream is compared with the base's, by losses that do so and by the
    drift of general features that sequences report: above the first site, at most the number of
    layers (the stream that leaves the last one). Null: none."""
    target_modules: Annotated[list[NotEmpty], MinLen(1), Distinct()] | None = None
    """Linear layers that are adapted, by last name, by path inside a decoder layer, or by a pattern
    of either ("*_proj", "self_attn.*"); null: all."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Text of earlier domains, in a sequence."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How AdamW goes through its training."""
    bundle_sae: bool = False
    """Whether the folder of a trained method holds its SAEs too: it then loads wherever it is
    moved, without the artifacts of the SAEs."""

    # Capabilities: what stages ask in place of the kind

    trains: ClassVar[bool] = True
    """There is something to attach to the base and to train; otherwise it can only be scored."""
    reads_features: ClassVar[bool] = False
    """It needs a trained SAE at every site."""
    reads_taxonomy: ClassVar[bool] = False
    """It needs the features of every site sorted by use (stage ``features``)."""
    compares_with_base: ClassVar[bool] = False
    """A loss of it compares features at ``monitor`` with the base's."""
    tells_domains: ClassVar[bool] = False
    """It tells which domain a text is of, by ``Method.nearness``."""
    has_control_signal: ClassVar[bool] = False
    """Interventions can change the signal that routes it."""
    splices: ClassVar[bool] = False
    """It puts reconstructions of SAEs in the place of the streams that enter its sites."""
    has_units: ClassVar[bool] = False
    """Its layers have units that act or not, token by token, which can be watched and switched off
    (``methods/units.py``): stage ``units`` looks at them."""
    steers_along: ClassVar[str | None] = None
    """It pushes the stream of one site along "latents", which its configuration names, or along a
    "vector", a parameter of that name; each row of a batch as far as its ``factors`` say. Stage
    ``steering`` gives it both."""
    low_rank: ClassVar[bool] = False
    """What it adds to linear layers is of low rank, ``total_rank``, and it gives the matrices."""
    exports_to_peft: ClassVar[bool] = False
    """PEFT can hold it: training writes PEFT's format as well."""
    not_trained: ClassVar[frozenset[str]] = frozenset({"name"})
    """Keys that do not change what training writes, so they are not part of its fingerprint."""
    only_in_sequences: ClassVar[frozenset[str]] = frozenset({"replay", "optimizer.over_domains"})
    """Keys that change how a sequence of domains trains, and not joint training."""
    only_in_evaluation: ClassVar[tuple[str, ...]] = ()
    """Keys that change how a trained method is evaluated, and not how it trains."""

    @property
    def learns_sae_text(self) -> bool:
        """Joint training reads the text that SAEs learn from, in place of the domains' alone."""
        return False

    @property
    def streams(self) -> list[int]:
        """The residual stream that each site reads: the one that enters this layer (the number of
        layers: the one that leaves the last)."""
        return list(self.sites)

    @property
    def at_evaluation(self) -> dict[str, Any]:
        """The values of ``only_in_evaluation``."""
        return {key: getattr(self, key) for key in self.only_in_evaluation}

    def __post_init__(self) -> None:
        super().__post_init__()
        sites = self.sites
        if sorted(sites) != list(sites):
            raise UserError(f"method.sites={sites}: give layers in rising order, each once")
        if self.monitor is not None and self.monitor <= min(sites):
            raise UserError(
                f"method.monitor={self.monitor}: must be above the first control site, "
                f"{min(sites)}; below it nothing is adapted"
            )

    def check(self, config: Config) -> None:
        """Refuse what does not go with other sections of the configuration.

        Raises:
            UserError: says what to set.
        """
        if self.optimizer.over_domains and config.trainer.strategy.startswith("zero"):
            raise UserError(
                f"method.optimizer.over_domains=true: under trainer.strategy="
                f"{config.trainer.strategy} no rank has the whole optimizer; set it to false, or "
                "train with trainer.strategy=single or ddp"
            )
        if config.model.path is None:
            for name in self.target_modules or ():
                if name.isidentifier():  # else a path or a pattern, which the model itself checks
                    one_of("method.target_modules", name, QWEN3_LINEAR)

    def check_trains(self) -> None:
        """Refuse to train, or to break or follow in training, what has nothing to train.

        Raises:
            UserError: says what can be done with it.
        """
        if not self.trains:
            raise UserError(
                f"method={self.name} has nothing to train: stage=evaluate scores it; give another "
                "method=<option>"
            )

    def check_names(self) -> None:
        """Refuse names that nothing is registered under; this may import torch.

        Raises:
            UserError: with the nearest names.
        """

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        """The method, untrained and attached to ``model``.

        Args:
            model: the frozen base; it may lie on the meta device.
            sources: SAEs and features of the sites, as far as the capabilities ask for them.
            seed: of the initial weights.

        Raises:
            ValueError: it does not fit the model.
        """
        raise NotImplementedError

    def domain_router(self, width: int, domains: int, seed: int) -> DomainRouter:
        """Its rule to tell domains apart, where ``tells_domains``, fitted to none yet.

        Args:
            width: of the signal.
            domains: that it can be fitted to.
            seed: of what the rule draws.
        """
        raise NotImplementedError

    def learner(self, method: Method, **settings: Any) -> Learner:
        """How it trains; the arguments are those of :class:`steerlora.methods.base.Learner`."""
        from steerlora.methods.base import Learner

        return Learner(method=method, **settings)
