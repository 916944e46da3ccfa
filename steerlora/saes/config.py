"""Configurations of the SAE architectures that come with the package; free of torch.

``SAES`` holds one configuration class an architecture: ``@sae("name")``. A file of this package, or
a module of the user's (``plugins``), may hold a configuration and its module together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, Location, NotNegative, OneOf, Positive, Seed, Share
from steerlora.errors import UserError
from steerlora.registry import Registry
from steerlora.saes.end_to_end.config import EndToEndConfig

if TYPE_CHECKING:
    from steerlora.saes.base import SparseAutoencoder

SAES: Registry[type[SAEConfig]] = Registry(
    "sae.architecture", "steerlora.saes.config", "steerlora.saes.*"
)
sae = SAES.register

NORMALIZATIONS = ("none", "layer_norm", "layer_norm_input", "constant_norm_rescale")
KEEPS_SIZE = ("none", "layer_norm_input")
"""Normalizations under which the reconstruction is as large as the activations."""
JUMP_PENALTIES = ("l0", "tanh")
HARVESTED, LEAST_HARVESTED = 300, 200_000
"""Tokens a latent, and in all, that are harvested by default."""
TRAINED, LEAST_STEPS = 1600, 1000
"""Tokens a latent that a training by default takes, and its least number of steps."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig(Section, key="sae"):
    """A sparse autoencoder of a control site's activations: what every architecture has.

    An architecture is a subclass that adds the fields that its module takes as keyword arguments,
    and says by :meth:`module` which class that is.
    """

    architecture: str = "topk"
    """Registered name of the architecture."""
    path: Location | None = None
    """Trained SAEs to use, by SAELens, sparsify or dictionary_learning, or of Gemma Scope 1 or 2,
    Llama Scope or Qwen-Scope: a weights file, its folder, a folder of such folders whose names say
    each one's site (``blocks.<site>.hook_resid_pre``), or one of the hub (``owner/name/folder``).
    Their files say what they are, and no other key counts. Null trains one a site."""
    latents: Annotated[int, Interval(ge=1, le=2**24)] = 512
    """N, from 1."""
    normalize: Annotated[str, OneOf(NORMALIZATIONS)] = "none"
    """What is done to every activation before it is encoded: "none", "layer_norm" (zero mean, unit
    deviation; undone after decoding), "layer_norm_input" (likewise, but the decoder reconstructs
    the activation as it was; SAELens has no such SAE), or "constant_norm_rescale" (norm sqrt(D);
    undone after decoding)."""
    max_tokens: Annotated[int, Interval(ge=1, le=10**12)] | None = None
    """Tokens of activations that are harvested, over all domains, from 1; fewer where the text has
    no more. Null: 300 a latent, and at least 200,000."""
    corpus: Location | None = None
    """Text to harvest beside the domains' rows, which then give about half of the tokens: a file of
    rows with ``text`` (.jsonl, .jsonl.gz), a plain text file, a folder of such files, or a dataset
    of the hub with a column ``text`` (``owner/name``, ``owner/name@revision``; its split "train").
    It is read from its beginning, in windows of ``trainer.max_length`` tokens; end-to-end training
    learns from it likewise. Null: none."""
    stream: bool = False
    """Train on activations as the model computes them, beside it on its device, and store none:
    ``max_tokens`` does not count, and the text is read as often as the steps need. SAEs that one
    run trains for the same number of steps share the stream."""
    stream_buffer: Annotated[int, Interval(ge=1, le=2**31)] = 2**17
    """Tokens that are shuffled together with ``stream``, from 1. Two such buffers are held in the
    memory of the model's device."""
    stream_seed: Seed = 0
    """Of the order of tokens with ``stream``, which SAEs of several seeds can so share."""
    steps: Count | None = None
    """Optimizer steps, from 1. Null: as many as ``epochs`` takes; without, those of 1600 tokens a
    latent, and at least 1000."""
    epochs: Count | None = None
    """Passes over the harvested tokens, from 1, which then decide the number of steps; null where
    they do not."""
    batch_size: Count = 1024
    """Tokens a step, from 1."""
    learning_rate: Positive | None = None
    """Adam's peak rate; null: 8e-4 / sqrt(latents / 2**14)."""
    adam_beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """Decay a step of Adam's mean of squared gradients, from 0 to below 1."""
    warmup_fraction: Share = 0.05
    """Share of the steps, at the start, in which the rate rises linearly."""
    decay_fraction: Share = 0.2
    """Share of the steps, at the end, in which the rate falls linearly to 0."""
    scale_inputs: bool = True
    """Train on activations divided by one number, so that their mean norm is sqrt(D), and
    multiply it into the weights of the SAE that is saved. Else a penalty in the activations' units
    has no usual weight, and biases that Adam moves by its rate a step have far to go. Nothing
    changes where ``normalize`` sets the norm."""
    median_start: bool = True
    """Start the decoder's bias at the geometric median of the first batch, rather than at 0."""
    unit_norm: bool = True
    """Hold the decoder's rows at unit length and their gradients orthogonal to them; else both are
    free, which no penalty on the size of features allows."""
    dead_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """A latent is dead that has not fired for this share of the training's tokens."""
    seed: Seed = 0
    """Of initialisation, and of the order of tokens that are stored."""
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    """Training by the model around the SAE, after that on reconstruction or in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path and self.end_to_end.steps and self.end_to_end.start == "new":
            raise UserError(
                "sae.end_to_end.start=new trains an SAE from nothing, and sae.path gives one: set "
                "sae.path=null, or sae.end_to_end.start=trained to fine-tune it"
            )
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"sae.steps={self.steps} and sae.epochs={self.epochs}: give one of them, and null "
                "for the other"
            )

        if self.stream and self.epochs is not None:
            raise UserError(
                f"sae.stream=true with sae.epochs={self.epochs}: what is not stored is not passed "
                "over again; set sae.epochs=null, and sae.steps if the default does not suit"
            )

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        """The class of the SAE, imported here: composing a configuration needs no torch."""
        raise NotImplementedError

    def build(self, width: int) -> SparseAutoencoder:
        """The SAE, untrained, of activations of this width."""
        common = {f.name for f in fields(SAEConfig)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
        common = {"normalize": self.normalize, "unit_norm": self.unit_norm, "seed": self.seed}
        return self.module()(width, self.latents, **common, **own)

    def streams(self, site: int) -> tuple[int, ...]:
        """The streams that the SAE of this site is trained on: those entering these layers."""
        return (site,)

    @property
    def tokens_to_harvest(self) -> int:
        """Tokens that a training here asks for."""
        return self.max_tokens or max(LEAST_HARVESTED, HARVESTED * self.latents)

    def steps_over(self, tokens: int) -> int:
        """Optimizer steps of a training on so many harvested tokens."""
        if self.epochs is not None:
            return max(1, self.epochs * tokens // self.batch_size)
        return self.steps or max(LEAST_STEPS, math.ceil(TRAINED * self.latents / self.batch_size))

    def _at_most_all(self, names: str) -> None:
        """UserError where one of these numbers of active latents exceeds ``latents``."""
        for name in names.split():
            active = getattr(self, name)
            if active is not None and active > self.latents:
                raise UserError(
                    f"sae.{name}={active} is more than sae.latents={self.latents}: "
                    "a token cannot have more active latents than there are"
                )

    def _refuse_free_norm(self, penalty: str) -> None:
        """UserError with ``unit_norm`` off: small features with long rows would cost nothing."""
        if not self.unit_norm:
            raise UserError(
                f"sae.unit_norm=false: {penalty} of sae.architecture={self.architecture} would be "
                "escaped by longer decoder rows; leave it true"
            )


@sae("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """TopK (Gao et al., arXiv 2406.04093): the k largest pre-activations of every token."""

    architecture: str = "topk"
    k: Annotated[int, Interval(ge=1, le=2**24)] = 16
    """Active latents of a token, from 1 to ``latents``."""
    auxiliary: NotNegative = 1 / 32
    """Weight of the auxiliary loss that revives dead latents, from 0 (off)."""
    initial_k: Annotated[int, Interval(ge=1, le=2**24)] | None = None
    """k at the start of training, from 1 to ``latents``, from where it goes to ``k`` linearly;
    null: ``k`` throughout."""
    anneal_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """Share of the steps in which it does, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_most_all("k initial_k")

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.topk import TopK

        return TopK


@sae("relu")
@dataclass(frozen=True, kw_only=True)
class ReLUConfig(SAEConfig):
    """ReLU with an L1 penalty (Cunningham et al., arXiv 2309.08600): every positive latent."""

    architecture: str = "relu"
    l1: NotNegative = 1e-3
    """Weight of the L1 norm of a token's features beside the fraction of variance unexplained, from
    0 (off)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_free_norm("the L1 penalty")

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.relu import ReLU

        return ReLU


@sae("batch_topk")
@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig(TopKConfig):
    """BatchTopK (Bussmann et al., arXiv 2412.06410): k is a token's mean over the batch."""

    architecture: str = "batch_topk"

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.batch_topk import BatchTopK

        return BatchTopK


@sae("matryoshka_topk")
@dataclass(frozen=True, kw_only=True)
class MatryoshkaTopKConfig(TopKConfig):
    """Matryoshka (Bussmann et al., arXiv 2503.17547) over TopK: nested prefixes of the latents."""

    architecture: str = "matryoshka_topk"
    levels: Annotated[int, Interval(ge=1, le=24)] = 4
    """Reconstructions, by the first ``latents``, half of them, a quarter, and so on; from 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 ** (self.levels - 1) > self.latents:
            raise UserError(
                f"sae.levels={self.levels} halves sae.latents={self.latents} too often: at most "
                f"{self.latents.bit_length()} levels"
            )

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.matryoshka import MatryoshkaTopK

        return MatryoshkaTopK


@sae("matryoshka_batch_topk")
@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKConfig(MatryoshkaTopKConfig):
    """Matryoshka over BatchTopK."""

    architecture: str = "matryoshka_batch_topk"

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.matryoshka import MatryoshkaBatchTopK

        return MatryoshkaBatchTopK


@sae("skip_transcoder")
@dataclass(frozen=True, kw_only=True)
class SkipTranscoderConfig(TopKConfig):
    """Skip-transcoder (Paulo et al., arXiv 2501.18823): TopK features of a site's stream, and a
    linear map, approximate the stream of a later layer."""

    architecture: str = "skip_transcoder"
    span: Annotated[int, Interval(ge=1, le=1000)] = 1
    """Layers between the stream that is read and the one that is approximated, from 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize != "none":
            raise UserError(
                f"sae.normalize={self.normalize}: a skip-transcoder writes another stream than it "
                "reads, and cannot undo it; leave it none"
            )

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.skip_transcoder import SkipTranscoder

        return SkipTranscoder

    def streams(self, site: int) -> tuple[int, ...]:
        return (site, site + self.span)


@sae("jumprelu")
@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(SAEConfig):
    """JumpReLU (Rajamanoharan et al., arXiv 2407.14435): a learnt threshold for every latent."""

    architecture: str = "jumprelu"
    sparsity: NotNegative = 1e-3
    """Weight of the penalty beside the fraction of variance unexplained, from 0 (off)."""
    penalty: Annotated[str, OneOf(JUMP_PENALTIES)] = "l0"
    """What is penalised: "l0" (the number of a token's active latents) or "tanh" (a bounded measure
    of their size)."""
    bandwidth: Positive = 0.5
    """Width of the band about a threshold in which it is learnt, in standard deviations of a
    coordinate of the activations."""
    initial_l0: Annotated[int, Interval(ge=1, le=2**24)] = 32
    """Active latents of a token at the start of training, from 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_most_all("initial_l0")
        if self.penalty == "tanh":
            self._refuse_free_norm("the tanh penalty")

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.jumprelu import JumpReLU

        return JumpReLU


@sae("gated")
@dataclass(frozen=True, kw_only=True)
class GatedConfig(SAEConfig):
    """Gated (Rajamanoharan et al., arXiv 2404.16014): gates and magnitudes apart."""

    architecture: str = "gated"
    l1: NotNegative = 0.1
    """Weight of the L1 norm of a token's gates, relative to the root mean square norm of the
    activations, from 0 (off)."""
    initial_l0: Annotated[int, Interval(ge=1, le=2**24)] = 32
    """Open gates of a token at the start of training, from 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_most_all("initial_l0")
        self._refuse_free_norm("the L1 penalty")

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.gated import Gated

        return Gated
