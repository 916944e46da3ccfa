"""What all SAE architectures share: parameters, normalisation, decoding, and the interface.

Shapes: ... any batch dimensions, T tokens, D model width, N latents, K active latents per token.

    u = normalise(x)        z = encode(u)        y = denormalise(z W_dec + b_dec)

Names, parameter shapes and normalisation are those of SAELens v6. Arithmetic is float32 whatever
the type of x.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.distributed.reductions import sum_over_ranks, world
from steerlora.errors import nearest
from steerlora.saes.config import KEEPS_SIZE, NORMALIZATIONS
from steerlora.saes.sparse import SparseFeatures, sparse_decode, sparse_encode

_LAYER_NORM_EPSILON = 1e-5


class NormalizedInput(NamedTuple):
    """An input as the SAE reads it, and what undoes the normalisation (scalars when it is none)."""

    x: Tensor
    """[..., D]"""
    mean: Tensor
    """[..., 1]"""
    scale: Tensor
    """[..., 1]"""


class TrainingErrors(NamedTuple):
    """What an architecture makes of one batch in training."""

    residual: Tensor
    """What the reconstruction leaves of the stream written, [T, D]; in the SAE's own units."""
    penalty: Tensor
    """What else is minimised, already weighted; a mean over tokens, or a ratio of two sums."""
    fired: Tensor
    """On how many tokens each latent was active, [N]."""

    @property
    def error(self) -> Tensor:
        """Squared error of the reconstruction, summed over tokens."""
        return self.residual.square().sum()


class SparseAutoencoder(nn.Module):
    """What SAE architectures have in common; each is a subclass with a file of its own.

    A subclass names itself, and defines :meth:`encode_normalized` and :meth:`training_errors`. Its
    configuration's own fields are its keyword arguments (:meth:`SAEConfig.build`).

    Parameters are SAELens's: ``W_enc`` [D, N], ``b_enc`` [N], ``W_dec`` [N, D], ``b_dec`` [D].
    ``W_enc`` is kept with its transpose contiguous, since gradients and gathers go by latent.
    It starts as the transpose of ``W_dec``, whose rows start as random unit vectors.

    Args:
        width: D.
        latents: N.
        normalize: ``none``; ``layer_norm``: zero mean and unit (unbiased) deviation per token, of
            what is encoded and reconstructed; ``constant_norm_rescale``: norm sqrt(D) per token, of
            both likewise; ``layer_norm_input``: layer norm of what is encoded alone. The
            activations themselves are then reconstructed, and ``b_dec``, which is one of them, is
            not subtracted before encoding.
        apply_b_dec_to_input: subtract ``b_dec`` before encoding.
        unit_norm: in training, rows of ``W_dec`` are held at unit length and their gradients
            orthogonal to them. It decides no feature.
        seed: of the initial weights.

    Raises:
        ValueError: settings that do not fit together.
    """

    architecture: ClassVar[str]
    """Registered name."""
    own_settings: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments, kept as attributes, that decide the features beside the common ones. Files
    hold them under these names."""
    k: int | None = None
    """K, where it is the same for every token; None: the busiest token of a batch decides."""
    span: int = 0
    """Layers between the stream that is read and the one that is written: 0 but for transcoders,
    whose training reads both, [T, 2, D] in place of [T, D]."""
    in_input_units: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters that grow with the activations, where these are not normalised."""

    def __init__(
        self,
        width: int,
        latents: int,
        *,
        normalize: str = "none",
        apply_b_dec_to_input: bool = True,
        unit_norm: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize '{normalize}': {nearest(normalize, NORMALIZATIONS)}")
        # Numbers of their own: a sharded weight has no shape between its uses.
        self.width, self.latents = width, latents
        self.normalize = normalize
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.unit_norm = unit_norm
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(latents, width, generator=generator), dim=1)
        self.W_enc = nn.Parameter(directions.clone().t())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(width))
        if normalize == "layer_norm_input":
            self.apply_b_dec_to_input = False

    # What an architecture defines

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        """Features [..., K] of x [..., D], which is in the SAE's units; differentiable."""
        raise NotImplementedError

    def training_errors(self, x: Tensor, dead: Tensor) -> TrainingErrors:
        """Errors of a batch, with gradient.

        With ``unit_norm`` the rows of ``W_dec`` are unit vectors, and stay so: its gradient should
        have no part along them (``directions(..., unit_rows=self.unit_norm)``).

        Args:
            x: [T, D], what training reads in the SAE's units; of one rank's tokens.
            dead: [N] bool, latents that have not fired for long.
        """
        raise NotImplementedError

    def training_flops_per_token(self) -> float:
        """Floating-point operations of a training step, forward and backward; 0: unknown."""
        return 0.0

    def initialize_thresholds(self, x: Tensor) -> None:
        """Set what decides how many latents are active at the start of training, if anything does.

        Args:
            x: [T, D] activations, of any type, as training will read them.
        """

    def begin_step(self, progress: float) -> None:
        """Before a step of training, ``progress`` of which, from 0 to below 1, lies behind."""

    def read(self, streams: Tensor) -> Tensor:
        """The stream that is encoded, of what training reads."""
        return streams

    def written(self, streams: Tensor) -> Tensor:
        """The stream that is approximated, of what training reads."""
        return streams

    def output(self, x: Tensor, features: SparseFeatures) -> Tensor:
        """What approximates the stream written, of x [..., D] and its features, in its units."""
        return self.decode(features)

    def for_inference(self) -> SparseAutoencoder:
        """What is saved: an SAE with these features, of an architecture that needs no training."""
        return self

    def continue_from(self, saved: SparseAutoencoder) -> None:
        """Take over what :meth:`for_inference` gave, to train it further."""
        self.load_state_dict(saved.state_dict())

    # What all have

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that decide the features."""
        names = (*self.own_settings, "normalize", "apply_b_dec_to_input")
        return {name: getattr(self, name) for name in names}

    def saelens_keys(self) -> dict[str, Any]:
        """What SAELens' ``cfg.json`` says of this architecture alone."""
        return {name: getattr(self, name) for name in self.own_settings}

    def extra_repr(self) -> str:
        shape = {"width": self.width, "latents": self.latents}
        return ", ".join(f"{name}={value}" for name, value in (shape | self.settings()).items())

    def untrained_like(self, seed: int) -> Self:
        """A randomly initialised SAE with the shape, settings, device and type of this one.

        Its ``b_dec`` is the same, so that the directions alone are random: the control
        ``replace_random_sae``.
        """
        twin = type(self)(self.width, self.latents, **self.settings(), seed=seed).to(self.W_dec)
        with torch.no_grad():
            twin.b_dec.copy_(self.b_dec)
        return twin.requires_grad_(self.W_dec.requires_grad)

    def converted(
        self, architecture: type[SparseAutoencoder], state: dict[str, Tensor], **own: Any
    ) -> SparseAutoencoder:
        """An SAE of another architecture with the shape, common settings, device and type of this.

        Args:
            architecture: its class.
            state: its parameters by name.
            own: settings that the architecture has beside the common ones.
        """
        common = {name: getattr(self, name) for name in ("normalize", "apply_b_dec_to_input")}
        found = architecture(self.width, self.latents, **common, **own).to(self.W_dec)
        found.load_state_dict(state)
        return found.requires_grad_(self.W_dec.requires_grad).train(self.training)

    def normalized(self, x: Tensor) -> NormalizedInput:
        """x [..., D] of any floating type, in float32 and in the SAE's own units."""
        x = x.to(_at_least_float32(self.W_dec.dtype))
        if self.normalize == "layer_norm":
            return _layer_normed(x)
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.width**0.5
            # A token of zeros stays one.
            return NormalizedInput(x / scale.clamp_min(1e-30), x.new_zeros(()), scale)
        return NormalizedInput(x, x.new_zeros(()), x.new_ones(()))

    def encoder_input(self, x: Tensor) -> Tensor:
        """What is encoded of x [..., D], which is in the SAE's units: x, or its layer norm."""
        return _layer_normed(x).x if self.normalize == "layer_norm_input" else x

    def encode(self, x: Tensor) -> SparseFeatures:
        """Features of every token, differentiable in x and in the parameters.

        Args:
            x: [..., D], any floating type.

        Returns:
            [..., K] values and indices.
        """
        return self.encode_normalized(self.normalized(x).x)

    def positive_latents(
        self,
        x: Tensor,
        k: int | None,
        extra_latents: Tensor | None = None,
        extra_k: int = 0,
        *,
        budget: int | None = None,
        bias: Tensor | None = None,
    ) -> SparseFeatures:
        """ReLU of the k largest pre-activations (u - b_dec) W_enc + b_enc; k None: of all.

        Args:
            x: u, [..., D], in the SAE's units.
            k: entries of a token; None: as many as the busiest token has positive ones.
            extra_latents, extra_k, budget: as in ``sparse_encode``.
            bias: [N], in place of ``b_enc``.
        """
        bias = self.b_enc if bias is None else bias
        x = self.encoder_input(x)
        shift = self.b_dec if self.apply_b_dec_to_input else torch.zeros_like(self.b_dec)
        W_enc, bias, shift = full(self.W_enc), full(bias), full(shift)
        with torch.autocast(x.device.type, enabled=False):
            values, indices = sparse_encode(
                x.reshape(-1, self.width), W_enc, bias, shift, k, extra_latents, extra_k, budget
            )
        shape = (*x.shape[:-1], values.shape[-1])
        return SparseFeatures(values.view(shape), indices.view(shape))

    def decode(self, features: SparseFeatures) -> Tensor:
        """Reconstruction in the SAE's own units: before any normalisation is undone.

        Args:
            features: values and indices, [..., K].

        Returns:
            [..., D], float32.
        """
        return self.directions(features) + full(self.b_dec)

    def directions(
        self, features: SparseFeatures, unit_rows: bool = False, frozen: bool = False
    ) -> Tensor:
        """Sum of the active decoder rows, [..., K] -> [..., D]: what decodes a residual (no b_dec).

        ``unit_rows`` is for training with unit-norm rows: see ``sparse_decode``. ``frozen`` gives
        the rows no gradient.
        """
        W_dec = full(self.W_dec.detach() if frozen else self.W_dec)
        flat = SparseFeatures(*(part.reshape(-1, part.shape[-1]) for part in features))
        with torch.autocast(W_dec.device.type, enabled=False):
            rows = sparse_decode(flat, W_dec, unit_rows)
        return rows.view(*features.values.shape[:-1], self.width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream written, in its own units: of an SAE, x. [..., D] -> [..., D], float32."""
        inputs = self.normalized(x)
        output = self.output(inputs.x, self.encode_normalized(inputs.x))
        return output * inputs.scale + inputs.mean

    def times_fired(self, features: SparseFeatures) -> Tensor:
        """On how many tokens of [T, K] each latent is active, [N]."""
        values, indices = features
        fired = values.new_zeros(self.latents)
        return fired.index_add_(0, indices.flatten(), (values > 0).flatten().to(values.dtype))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring every row of ``W_dec`` back to unit length."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def center_on(self, x: Tensor, iterations: int = 20) -> None:
        """Set ``b_dec`` to the geometric median of the stream written, by Weiszfeld's algorithm.

        Args:
            x: what training reads.
        """
        points = self.normalized(self.written(x)).x
        median = points.mean(0)
        for _ in range(iterations):
            weights = 1 / (points - median).norm(dim=1).clamp_min(1e-8)
            median = weights @ points / weights.sum()
        self.b_dec.copy_(median)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Become the same SAE of activations so many times as large: values and outputs grow alike.

        Where the activations are normalised, the features do not know their size: nothing changes.
        """
        if self.normalize not in KEEPS_SIZE:
            return
        for name in self.in_input_units:
            getattr(self, name).mul_(factor)
        if self.normalize == "layer_norm_input":  # the encoder does not see the size
            self.W_enc.mul_(factor)

    @torch.no_grad()
    def exceeded_on(self, x: Tensor, share: float) -> Tensor:
        """What each latent's (u - b_dec) W_enc exceeds on this share of the tokens, [N].

        Args:
            x: [T, D], any floating type.
            share: from 0 to 1; at least one token's.
        """
        rows = self.normalized(x).x
        rows = rows - full(self.b_dec) if self.apply_b_dec_to_input else rows
        count = min(len(rows), max(1, round(share * len(rows))))
        # Some latents at a time: all would be a [T, N] matrix, however many there are.
        return torch.cat(
            [
                (rows @ weights.t()).topk(count, dim=0).values[-1]
                for weights in full(self.W_enc).t().split(4096)
            ]
        )


def squared_deviation(x: Tensor) -> Tensor:
    """Squared deviation of all ranks' rows [T, D] from their mean, over the number of ranks.

    Errors of a rank's own rows over it average, over ranks, to the whole batch's.
    """
    if world() == 1:
        return (x - x.mean(0)).square().sum()
    total, count = sum_over_ranks([x.sum(0), x.new_tensor(float(len(x)))])
    (squares,) = sum_over_ranks([(x - total / count).square().sum()])
    return squares / world()


def _layer_normed(x: Tensor) -> NormalizedInput:
    mean = x.mean(-1, keepdim=True)
    # SAELens divides by the deviation plus epsilon and multiplies back by the deviation.
    scale = x.std(-1, keepdim=True)
    return NormalizedInput((x - mean) / (scale + _LAYER_NORM_EPSILON), mean, scale)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def full(parameter: Tensor) -> Tensor:
    """A parameter in the type of arithmetic: float32, or more where it has more."""
    return parameter.to(_at_least_float32(parameter.dtype))
